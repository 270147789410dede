"""Draw all images of a job, which one object describes, by as many processes as there are.

Batches are a fixed division of the indices, and whole batches are dealt out: every image is computed in the same
company whatever the number of processes, so that its pixels are the same even where a batch decides the rounding.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.errors import InputError
from tqdit.imaging import generate
from tqdit.sampling.guidance import Conditions, Sampling, conditions_sha256
from tqdit.sampling.schedules import resolved, schedule
from tqdit.sampling.trajectory import Progress
from tqdit.sources.source import ModelSource
from tqdit.system import distributed
from tqdit.system.files import CONFIG, read_json, write_bytes
from tqdit.system.outputs import check_file, check_outside
from tqdit.system.validation import check_counts, check_seed

BATCH = 16
RUN = "run.json"  # in a folder of images: what they are images of
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xae\x42\x60\x82"


@dataclass(frozen=True)
class Images:
    """Description of `num` images. Image i has condition `classes[i % len(classes)]`; it depends on it and (seed, i).

    `classes` are indices into `conditions`, which are the model's own classes if not given. Raises `InputError` for
    settings that are not legal and for latents that could not be decoded.
    """

    source: ModelSource
    classes: Sequence[int]
    num: int
    sampling: Sampling
    seed: int = 0
    batch: int = BATCH
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        check_counts(num=self.num, batch=self.batch)
        check_seed(self.seed)
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling must be a tqdit.Sampling, got {self.sampling!r:.80}")
        sample = registry.sample(self.source.config)
        generate.check_decodable(sample.shape[0], self.source.vae)
        schedule(self.source.scheduler, self.sampling, sample)

    @property
    def labels(self) -> list[int]:
        """Return the condition of every image, by its index."""
        return [self.classes[i % len(self.classes)] for i in range(self.num)]

    @property
    def drawn_with(self) -> Sampling:
        """Return the sampling with the name of the sampler that "auto" stands for."""
        return resolved(self.sampling, self.source.scheduler)

    @property
    def batches(self) -> list[range]:
        """Return the indices of the images, batch by batch."""
        return distributed.batches(self.num, self.batch)

    @cached_property
    def run(self) -> dict[str, Any]:
        """Return what decides the images, as JSON values; their number does not. The model's files are read once.

        The batch does by the rounding of float operations, and so does where they run: see `drawing.sample_folder`.
        """
        settings = {"seed": self.seed, **asdict(self.drawn_with), "classes": list(self.classes), "batch": self.batch}
        if self.conditions is not None:
            settings["conditions_sha256"] = conditions_sha256(self.conditions)
        return {"model": self.source.name, "model_sha256": _fingerprint(self.source), **settings}


def draw(images: Images, model: nn.Module, members: Sequence[range], progress: Progress) -> Iterator[torch.Tensor]:
    """Yield the pixels of each batch in `members` when it is finished: (len(batch), C, H, W) in [-1, 1], on the CPU."""
    decode = generate.decoder(images.source.vae, next(iter(model.buffers())).device)
    scheduler, labels, sampling = images.source.scheduler, images.labels, images.sampling
    states = generate.sample_batches(
        model, scheduler, labels, sampling, images.seed, members, progress, images.conditions
    )
    for latents in states:
        yield decode(latents)


def gathered(images: Images, model: nn.Module, progress: Progress) -> torch.Tensor:
    """Return all images, (num, C, H, W) in [-1, 1], on every rank; each rank draws its share."""
    world = distributed.current()
    parts = list(draw(images, model, world.share(images.batches), progress))
    return torch.cat(world.gather(parts, len(images.batches)))


def check_folder(folder: Path, run: dict[str, Any]) -> None:
    """Raise `InputError` if images of `run` cannot be put into `folder`, or would mix with others there."""
    check_file(folder / RUN)
    check_outside(folder)
    found = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.is_dir() else set()
    if RUN not in found:
        if found:
            raise InputError(f"output {folder} has files but no {RUN}; choose a new or empty folder")
        return
    before = read_json(folder / RUN)
    differing = [key for key in {**run, **before} if run.get(key) != before.get(key)]
    if set(differing) - {"model"}:  # a model of the same hash may have moved
        key = next(key for key in differing if key != "model")
        raise InputError(
            f"output {folder} has images of another run: {key} was {before.get(key)}, now it is {run.get(key)}; "
            "choose another folder"
        )


def into_folder(images: Images, run: dict[str, Any], model: nn.Module, folder: Path, progress: Progress) -> int:
    """Write the images that `folder` lacks, each as soon as its batch is finished; returns how many were new.

    A file that is no whole PNG counts as lacking.

    `run`: all that decides their pixels, `images.run` and where they are drawn; see `check_folder`. Each rank draws its
    share of the batches that are not whole; a batch is drawn as a whole, as it was at first. Files are `000017.png`,
    whole or not there at all. Ranks may see the same folder or, on other machines, one of their own.
    """
    world = distributed.current()
    check_folder(folder, run)
    progress(0.0)
    write_bytes(folder / RUN, (json.dumps(run, indent=1) + "\n").encode(), replace=False)
    check_folder(folder, run)  # another process may have begun there meanwhile
    here = torch.tensor([is_whole_png(image_file(folder, i)) for i in range(images.num)], dtype=torch.int32)
    there = world.add(here).bool().tolist()
    share = world.share([indices for indices in images.batches if not all(there[i] for i in indices)])
    for indices, pixels in zip(share, draw(images, model, share, progress), strict=True):
        for i, image in zip(indices, pixels, strict=True):
            if not there[i]:
                generate.save_image(image, image_file(folder, i))
    world.wait()  # the folder is finished when every rank is
    return there.count(False)


def image_file(folder: Path, index: int) -> Path:
    """Return the path at which `into_folder` writes image `index`."""
    return folder / f"{index:06d}.png"


def is_whole_png(path: Path) -> bool:
    """Say whether a file begins and ends as a PNG does; one whose end a disk has lost does not."""
    try:
        with path.open("rb") as file:
            if file.read(len(PNG_START)) != PNG_START:
                return False
            file.seek(-len(PNG_END), io.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def _fingerprint(source: ModelSource) -> str:
    """Return the sha256 of everything on disk that images depend on: config, weights, schedule and decoder."""
    digest = hashlib.sha256(json.dumps(source.scheduler, sort_keys=True).encode())
    folders = [folder for folder in (source.folder, source.vae) if folder is not None]
    files = [file for folder in folders for file in sorted([folder / CONFIG, *folder.glob("*.safetensors")])]
    for file in files if source.checkpoint is None else [source.checkpoint]:
        digest.update(b"" if file == source.checkpoint else file.name.encode())  # a checkpoint may be renamed
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
