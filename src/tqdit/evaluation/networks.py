"""Feature networks: the Inception network of papers, any other network in a file, and the bundled classifier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tqdit.errors import InputError
from tqdit.evaluation import inception
from tqdit.evaluation.exported import load_exported, short_reason
from tqdit.evaluation.image_sets import file_sha256
from tqdit.quality import features
from tqdit.system.reading import check_regular

FASHION = "fashion"  # the bundled classifier of Fashion-MNIST
MOST_FEATURES = 2**14  # of an image
SPATIAL, CLASSES = "spatial", "classes"  # what a network may lack


@dataclass(frozen=True)
class Features:
    """The features of N images: `pooled` [N, D], and `spatial` [N, S] and class `probabilities` [N, K], if any.

    All are float32 on the CPU.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Network:
    """A feature network: `compute` maps uint8 images [N, C, H, W] on `device` to their features.

    `channels`: those of its images; None for a network that takes what it is given. `missing`: why it has no "spatial"
    features or no "classes". `inception`: whether it has the interface of the Inception network.
    """

    name: str
    sha256: str
    compute: Callable[[Tensor], Features]
    device: torch.device
    channels: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    inception: bool = False

    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 images [N, C, H, W].

        Raises `InputError` for images that the network does not take, and for features that are not finite.
        """
        images = _with_channels(images, self.channels, self.name)
        try:
            # A TorchScript module that is optimized while it runs could round its first batches in another way.
            with torch.inference_mode(), torch.jit.optimized_execution(False):
                found = self.compute(images.to(self.device))
        except (torch.OutOfMemoryError, InputError):
            raise
        except Exception as error:  # a program of the user's, with errors of its own
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise InputError(f"network '{self.name}' fails on images {list(images.shape)}: {reason:.200}") from None
        for part in (found.pooled, found.spatial, found.probabilities):
            if part is not None and part.shape[1] > MOST_FEATURES:
                raise InputError(
                    f"network '{self.name}' gives {part.shape[1]} features of an image; at most {MOST_FEATURES} have a "
                    "covariance that fits into memory"
                )
            if part is not None and not part.isfinite().all():
                raise InputError(f"network '{self.name}' gives NaN or Inf")
        return found


def load_network(name: str | Path, device: torch.device | str = "cpu") -> Network:
    """Return the feature network that a user names: "fashion", a TorchScript file, or a `.pt2` of `torch.export`.

    The Inception network is known by its interface. Any other network is a function of uint8 images [N, C, H, W] that
    returns features [N, D], or a tuple of these, a spatial map [N, C, H, W] and class logits [N, K], from which the
    other scores follow; it can leave the last ones out. Raises `InputError` that names the file.
    """
    device = torch.device(device)
    if str(name) == FASHION:
        return _fashion(device)
    path = Path(name)
    check_regular(path, f"a network is a TorchScript file, a .pt2 of torch.export, or '{FASHION}'")
    module = load_exported(path) if path.suffix == ".pt2" else _load_script(path)
    module = module.to(device)
    if inception.has_interface(module):
        return _inception(module, path, device)
    return _other(module, path, device)


def _load_script(path: Path) -> nn.Module:
    """Return a TorchScript module on the CPU, in evaluation mode.

    torch reads it without Python: its unpickler, in C++, makes tensors, plain values and instances of the TorchScript
    classes in the file, and refuses every other name. The module itself is a program of torch's operators.
    """
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} is damaged or no TorchScript file: {short_reason(error)}") from None


def _fashion(device: torch.device) -> Network:
    classifier = features.load_fashion_classifier(device)

    def compute(images: Tensor) -> Features:
        pooled = features.image_features(images.float() / 127.5 - 1, classifier)
        return Features(pooled.cpu(), None, classifier.head(pooled).softmax(1).cpu())

    lacks = {SPATIAL: "the bundled classifier gives no spatial features"}
    return Network(FASHION, file_sha256(features.CLASSIFIER_FILE), compute, device, 1, lacks)


def _inception(module: nn.Module, path: Path, device: torch.device) -> Network:
    pattern = torch.arange(2 * 3 * 64 * 48, device=device)
    probe = (pattern * pattern % 251).to(torch.uint8).view(2, 3, 64, 48)  # not square: height and width may differ
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        problems = {
            SPATIAL: inception.problem_of_spatial_features(module, probe),
            CLASSES: inception.problem_of_probabilities(module, probe),
        }
    lacks = {part: problem for part, problem in problems.items() if problem}

    def compute(images: Tensor) -> Features:
        pooled = module(images, return_features=True).flatten(1).float()
        spatial = None if SPATIAL in lacks else inception.spatial_features(module, images).float().cpu()
        classes = None if CLASSES in lacks else inception.probabilities(module, pooled).cpu()
        return Features(pooled.cpu(), spatial, classes)

    return Network(path.name, file_sha256(path), compute, device, 3, lacks, inception=True)


def _other(module: nn.Module, path: Path, device: torch.device) -> Network:
    def compute(images: Tensor) -> Features:
        found = module(images)
        parts = list(found) if isinstance(found, tuple | list) else [found]
        pooled, spatial, logits = [*parts, None, None][:3]
        if not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(images):
            raise ValueError(f"it must return features [{len(images)}, D] first")
        if spatial is not None:
            spatial = spatial[:, : inception.SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu()
        classes = None if logits is None else logits.float().softmax(1).cpu()
        return Features(pooled.float().cpu(), spatial, classes)

    lacks = {SPATIAL: "the network returns no spatial map", CLASSES: "the network returns no class logits"}
    return Network(path.name, file_sha256(path), compute, device, None, lacks)


def _with_channels(images: Tensor, channels: int | None, name: str) -> Tensor:
    """Return the images with the channels of a network: grey ones repeated, or one of three equal channels."""
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    if not torch.equal(images, images[:, :1].expand_as(images)):
        raise InputError(f"network '{name}' takes grey images, these have colours")
    return images[:, :1]
