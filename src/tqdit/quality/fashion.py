"""Read Fashion-MNIST's test images, and read or write their features by the bundled classifier.

The images come from the data set's own IDX file, plain or with gzip. Their features are a small file that can be
bundled: 10,000 rows of 128 half-precision numbers are 2.56 MB.
"""

import gzip
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tqdit.errors import InputError
from tqdit.quality.features import DATA, FEATURES, image_features, load_fashion_classifier, load_real_statistics
from tqdit.system.files import read_tensors, write_tensors
from tqdit.system.reading import check_regular

FEATURES_FILE = DATA / "test-features.safetensors"
NAME = "features"  # of the tensor in the file
TEST_IMAGES = 10_000
IMAGES_FILE = "t10k-images-idx3-ubyte"
SIDE, BORDER = 28, 2  # pixels of an image in the file, and of its margin as the models see it
MAGIC = 2051  # first number of an IDX file of unsigned bytes with three dimensions
HEADER = 16  # bytes: the magic number, and the number of images, rows and columns
FASHION = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def is_fashion(labels: Mapping[int, str], shape: Sequence[int]) -> bool:
    """Say whether a model with these class names makes Fashion-MNIST's images; `shape` is (C, H, W) of one image."""
    return tuple(shape) == (1, 32, 32) and dict(labels) == dict(enumerate(FASHION))


def read_test_images(path: Path) -> Tensor:
    """Return Fashion-MNIST's test images, float32 [N, 1, 32, 32] in [-1, 1], padded with -1.

    `path`: an IDX file of images, plain or with gzip (.gz), or the folder that has `t10k-images-idx3-ubyte` or the
    same name with .gz. Raises `InputError` that names a file which is missing or is no such file.
    """
    if path.is_dir():
        plain = path / IMAGES_FILE
        path = plain if plain.is_file() else plain.with_name(f"{IMAGES_FILE}.gz")
    check_regular(path, "it has the real images")
    content = _content(path)
    magic, count, rows, columns = (int.from_bytes(content[i : i + 4], "big") for i in range(0, HEADER, 4))
    if (magic, rows, columns) != (MAGIC, SIDE, SIDE) or count == 0 or len(content) != HEADER + count * SIDE**2:
        raise InputError(f"{path} is no IDX file of images with {SIDE} x {SIDE} pixels")
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=HEADER)
    return F.pad(pixels.view(count, 1, SIDE, SIDE).float() / 127.5 - 1, (BORDER,) * 4, value=-1.0)


def _content(path: Path) -> bytes:
    """Return the bytes of an IDX file, no more than the largest file of the data set has and one."""
    most = HEADER + 60_000 * SIDE**2
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            return bytes(file.read(most + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def write_real_features(images: Tensor, path: Path = FEATURES_FILE) -> None:
    """Write the shipped classifier's features of the 10,000 test images in half precision.

    The classifier runs on the images' device. Raises `InputError` for features that `load_real_features` would refuse.
    """
    features = image_features(images, load_fashion_classifier(images.device)).half().cpu()
    _check(features, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {NAME: features})


def load_real_features(path: Path = FEATURES_FILE) -> Tensor:
    """Return the features of the 10,000 real test images, float32 [10000, 128], in the order of the data set's file.

    Raises `InputError` for a file that is missing, damaged, or of another classifier than the shipped one.
    """
    features = read_tensors(path).get(NAME)
    if features is None:
        raise InputError(f"{path} has no tensor '{NAME}'")
    _check(features, path)
    return features.float()


def _check(features: Tensor, path: Path) -> None:
    """Raise `InputError` naming the file if these are not the features that the shipped statistics are of."""
    if features.dtype != torch.float16 or features.shape != (TEST_IMAGES, FEATURES):
        kind = f"{features.dtype} {list(features.shape)}"
        raise InputError(f"{path} must hold torch.float16 features of shape [{TEST_IMAGES}, {FEATURES}], not {kind}")
    mean, covariance = load_real_statistics()
    error = (features.double().mean(0) - mean).abs()
    # Rounding to half precision moves a mean by far less than a hundredth of the feature's standard deviation.
    if not bool((error <= 0.01 * covariance.diagonal().sqrt() + 1e-4).all()):
        raise InputError(f"{path} has other features than the shipped statistics of the test images")
