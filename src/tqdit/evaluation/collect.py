"""The features of a set of images, drawn together by all processes and summarized as they come."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tqdit.errors import InputError
from tqdit.evaluation.image_sets import ImageSet
from tqdit.evaluation.moments import Gaussian, Moments, joined
from tqdit.evaluation.networks import Features, Network
from tqdit.evaluation.scores import InceptionScore
from tqdit.system.distributed import batches, current

BATCH = 50  # images that a network is given at a time: a fixed division, whatever the number of processes
BLOCK = 20  # batches of a block, which moments are taken of at a time
KEPT = 50_000  # images whose features are kept for precision, recall and the kernel distance: the first ones


@dataclass(frozen=True)
class Collected:
    """The part of a set of images that scores need.

    `features` [N, D]: those of the first images; None where only statistics are known. `gaussian` and `spatial`: of all
    images. `inception_score`: of all images, where the network has classes.
    """

    count: int
    features: Tensor | None
    gaussian: Gaussian
    spatial: Gaussian | None = None
    inception_score: float | None = None


class _Running:
    """Moments and scores of the features so far."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.spatial: Moments | None = None
        self.classes: InceptionScore | None = None
        self.kept: list[Tensor] = []
        self.count = 0

    def add(self, block: Features, device: torch.device) -> None:
        """Add the features of the next images. Moments are taken on `device`."""
        if self.count < KEPT:
            self.kept.append(block.pooled[: KEPT - self.count])
        self.count += len(block.pooled)
        self.moments = joined(self.moments, Moments.of(block.pooled.to(device)))
        if block.spatial is not None:
            self.spatial = joined(self.spatial, Moments.of(block.spatial.to(device)))
        if block.probabilities is not None:
            self.classes = self.classes or InceptionScore()
            self.classes.add(block.probabilities)

    def collected(self) -> Collected:
        assert self.moments is not None
        spatial = Gaussian.of(self.spatial) if self.spatial else None
        score = self.classes.value if self.classes else None
        return Collected(self.count, torch.cat(self.kept), Gaussian.of(self.moments), spatial, score)


def collect(images: ImageSet, network: Network, progress: Callable[[float], None] = lambda _: None) -> Collected:
    """Return what scores need of a set of images, the same bits for every number of processes on like devices.

    Processes share the batches of a block; then each has the features of the whole block, and takes them in the order
    of the images. Memory holds one block, and the pooled features of the first 50,000 images. Raises `InputError` as
    the network does, and for fewer than two images.
    """
    if images.count < 2:
        raise InputError(f"an evaluation needs at least 2 images, got {images.count}")
    running, members = _Running(), batches(images.count, BATCH)
    moments_on = network.device if network.device.type == "cuda" else torch.device("cpu")  # others may lack float64
    progress(0.0)
    for start in range(0, len(members), BLOCK):
        block = members[start : start + BLOCK]
        running.add(_features(images, network, block), moments_on)
        progress(block[-1].stop / images.count)
    return running.collected()


def _features(images: ImageSet, network: Network, block: list[range]) -> Features:
    """Return the features of consecutive batches, on every rank; each rank computes its share."""
    world = current()
    own = [_of_batch(images.read(indices), network) for indices in world.share(block)]
    kinds = [f for f in ("pooled", "spatial", "probabilities") if own and getattr(own[0], f) is not None]
    if world.size > 1:
        kinds = _agreed(kinds)
    found = {kind: torch.cat(world.gather([getattr(part, kind) for part in own], len(block))) for kind in kinds}
    return Features(**found)


def _of_batch(images: Tensor, network: Network) -> Features:
    """Return the features of at most `BATCH` images, which the network is always given as many of.

    A short batch is filled up by its last image: a product of another size may round in another way.
    """
    count = len(images)
    filled = torch.cat([images, images[-1:].expand(BATCH - count, -1, -1, -1)])
    found = network(filled)
    parts = (found.pooled, found.spatial, found.probabilities)
    return Features(*(None if part is None else part[:count] for part in parts))  # type: ignore[arg-type]


def _agreed(kinds: list[str]) -> list[str]:
    """Return the kinds that any rank has: one without a batch of this block knows none."""
    every = ["pooled", "spatial", "probabilities"]
    there = current().add(torch.tensor([kind in kinds for kind in every], dtype=torch.int32))
    return [kind for kind, count in zip(every, there.tolist(), strict=True) if count]
