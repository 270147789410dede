"""References: the real images, or statistics of them, that generated images are measured against."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tqdit.errors import InputError
from tqdit.evaluation.collect import Collected, collect
from tqdit.evaluation.image_sets import IMAGES, ImageSet, NpzImages, file_sha256, folder_images
from tqdit.evaluation.moments import Gaussian
from tqdit.evaluation.networks import FASHION, MOST_FEATURES, Features, Network
from tqdit.quality import fashion, features
from tqdit.system.reading import check_regular

FASHION_TEST = "fashion-test"  # the bundled features of Fashion-MNIST's test images
LEGAL = f"a reference is an .npz file, a folder of images, or '{FASHION_TEST}'"
POOLED, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")  # of the statistics in an ADM batch


@dataclass(frozen=True)
class Reference:
    """A reference, of which there are `images`, statistics under some network, or `bundled` features.

    Statistics go before the images: ADM's file for ImageNet has those of the whole training set, and 10,000 images for
    precision and recall.
    """

    name: str
    sha256: str
    images: ImageSet | None = None
    gaussian: Gaussian | None = None
    spatial: Gaussian | None = None
    bundled: bool = False

    def collected(self, network: Network, progress: Callable[[float], None] = lambda _: None) -> Collected:
        """Return what scores need of the reference under a network; processes share the work."""
        if self.bundled:
            return _fashion_test()
        if self.images is None:
            assert self.gaussian is not None
            return Collected(0, None, self.gaussian, self.spatial)
        found = collect(self.images, network, progress)
        if self.gaussian is None:
            return found
        return replace(found, gaussian=self.gaussian, spatial=self.spatial, inception_score=None)

    def check(self, features: Features) -> None:
        """Raise `InputError` if a network's features are of another width than the statistics."""
        for kind, theirs, own in (
            ("features", self.gaussian, features.pooled),
            ("spatial features", self.spatial, features.spatial),
        ):
            if theirs is not None and own is not None and len(theirs.mean) != own.shape[1]:
                raise InputError(
                    f"reference '{self.name}' has statistics of {len(theirs.mean)} {kind}, the network gives "
                    f"{own.shape[1]}; they are of another network"
                )

    def figures(self) -> dict[str, object]:
        """Return what the protocol says of a reference."""
        count = self.images.count if self.images else fashion.TEST_IMAGES if self.bundled else 0
        return {"sha256": self.sha256, "images": count, "statistics": self.gaussian is not None}


def check_name(name: str | Path) -> None:
    """Raise `InputError` for a reference that is neither there nor the bundled one; called before anything is read."""
    path = Path(name)
    if str(name) != FASHION_TEST and not path.is_dir():
        check_regular(path, LEGAL)


def open_reference(name: str | Path, network: Network) -> Reference:
    """Return the reference that a user names: an `.npz` file, a folder of images, or the bundled "fashion-test".

    An `.npz` file has images (`arr_0`, uint8 [N, H, W, C]), statistics (`mu` [D], `sigma` [D, D], and `mu_s`, `sigma_s`
    of spatial features), or both. Raises `InputError` that names the file, and for "fashion-test" beside another
    network than the bundled classifier.
    """
    if str(name) == FASHION_TEST:
        if network.name != FASHION:
            raise InputError(f"reference '{FASHION_TEST}' has features of the network '{FASHION}' alone; give images")
        return Reference(FASHION_TEST, file_sha256(fashion.FEATURES_FILE), bundled=True)
    check_name(name)
    path = Path(name)
    if path.is_dir():
        images = folder_images(path)
        return Reference(path.resolve().name, images.sha256(), images)
    arrays = _arrays(path)
    images_there = NpzImages(path) if IMAGES in arrays else None
    gaussian, spatial = (_gaussian(path, arrays, names) for names in (POOLED, SPATIAL))
    if images_there is None and gaussian is None:
        raise InputError(f"{path} has neither images ('{IMAGES}') nor statistics ('mu', 'sigma')")
    return Reference(path.name, file_sha256(path), images_there, gaussian, spatial)


def _arrays(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            archived = zipfile.is_zipfile(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if not archived:  # numpy would speak of a pickle, and of how to load it
        raise InputError(f"{path} is no .npz file; {LEGAL}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except Exception as error:  # numpy and zipfile fail in many ways
        raise InputError(f"{path} is no .npz file: {str(error).partition(chr(10))[0]}") from None


def _gaussian(path: Path, arrays: list[str], names: tuple[str, str]) -> Gaussian | None:
    """Return the mean and the covariance with these names, or None where the file has neither."""
    there = [name for name in names if name in arrays]
    if not there:
        return None
    if len(there) == 1:
        raise InputError(f"{path} has '{there[0]}' but not both of '{names[0]}' and '{names[1]}'")
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = (_floats(archive[name]) for name in names)
    except Exception as error:  # an array of objects, or a damaged one
        raise InputError(f"{path}: '{names[0]}' or '{names[1]}' cannot be read: {error}") from None
    width = len(mean) if mean.ndim == 1 else 0
    if not 0 < width <= MOST_FEATURES or covariance.shape != (width, width):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise InputError(f"{path}: '{names[0]}' and '{names[1]}' must be [D] and [D, D], got {shapes}")
    scale = covariance.abs().max()
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise InputError(f"{path}: '{names[0]}' or '{names[1]}' has NaN or Inf")
    if (covariance - covariance.T).abs().max() > 1e-6 * scale or covariance.diagonal().min() < 0:
        raise InputError(f"{path}: '{names[1]}' is no covariance: it is not symmetric, or has a negative variance")
    return Gaussian(mean, covariance)


def _floats(array: np.ndarray) -> Tensor:
    if array.dtype.kind != "f":
        raise InputError(f"numbers of the type {array.dtype}, not floats")
    return torch.from_numpy(array.astype(np.float64))


def _fashion_test() -> Collected:
    """Return the bundled features, which are rounded to half precision, and the exact statistics."""
    return Collected(fashion.TEST_IMAGES, fashion.load_real_features(), Gaussian(*features.load_real_statistics()))
