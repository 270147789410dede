"""Sets of images on disk, read batch by batch: ADM's `.npz` batches and folders of image files."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tqdit.errors import InputError
from tqdit.system.reading import check_regular
from tqdit.system.swap import partial_file, sync

IMAGES = "arr_0"  # of the images in a batch
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = {"L": 1, "RGB": 3}  # of Pillow, and their channels


class ImageSet(Protocol):
    """`count` images of one size, which are read in any order, fastest in their own."""

    @property
    def count(self) -> int:
        """The number of images."""

    def read(self, indices: range) -> Tensor:
        """Return consecutive images as uint8 [N, C, H, W]. Raises `InputError` that names the file."""

    def sha256(self) -> str:
        """Return a hash of the bytes on disk."""


class NpzImages:
    """The array `arr_0` of an ADM batch: uint8 [N, H, W, C], read from its file as it is needed.

    Raises `InputError` for a file without one, and for an array of another kind. Nothing is unpickled: an array of
    objects is refused by its dtype.
    """

    def __init__(self, path: Path, first: int | None = None) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._next = 0  # the image at which the open file stands
        with self._opened() as file:
            shape, fortran, dtype = array_header(file, path)
        if len(shape) != 4 or dtype != np.uint8 or fortran or shape[3] not in MODES.values() or not all(shape):
            raise InputError(
                f"{path}: '{IMAGES}' must be uint8 [N, H, W, C] with 1 or 3 channels, got {dtype} {list(shape)}"
            )
        self.count, (height, width, channels) = int(shape[0]), map(int, shape[1:])
        self.shape = (channels, height, width)
        if first is not None:
            if first > self.count:
                raise InputError(f"{path} has {self.count} images, {first} are asked for")
            self.count = first

    def _opened(self) -> IO[bytes]:
        try:
            return zipfile.ZipFile(self.path).open(f"{IMAGES}.npy")
        except KeyError:
            raise InputError(f"{self.path} has no array '{IMAGES}'") from None
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{self.path} is no .npz file: {error}") from None

    def read(self, indices: range) -> Tensor:
        """Return consecutive images as uint8 [N, C, H, W]."""
        channels, height, width = self.shape
        size = channels * height * width
        if self._file is None or self._next > indices.start:
            self._file, self._next = self._opened(), 0
            array_header(self._file, self.path)
        try:
            self._skip((indices.start - self._next) * size)
            content = self._file.read(len(indices) * size)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path} is damaged: {error}") from None
        if len(content) != len(indices) * size:
            raise InputError(f"{self.path} is truncated: '{IMAGES}' ends before image {indices.stop}")
        self._next = indices.stop
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(len(indices), height, width, channels)
        return pixels.permute(0, 3, 1, 2).contiguous()

    def _skip(self, size: int) -> None:
        """Read on by `size` bytes, little by little: a compressed file has no other way."""
        while size and self._file is not None:
            done = len(self._file.read(min(size, 2**24)))
            if done == 0:
                return
            size -= done

    def sha256(self) -> str:
        """Return the hash of the file."""
        return file_sha256(self.path)


class FileImages:
    """Image files in their order; all have the size and channels of the first."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._shape = read_image(files[0]).shape

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self._files)

    def read(self, indices: range) -> Tensor:
        """Return consecutive images as uint8 [N, C, H, W]."""
        found = []
        for path in self._files[indices.start : indices.stop]:
            image = read_image(path)
            if image.shape != self._shape:
                raise InputError(f"{path} has shape {list(image.shape)}, {self._files[0].name} {list(self._shape)}")
            found.append(image)
        return torch.stack(found)

    def sha256(self) -> str:
        """Return a hash over the bytes of all images in their order."""
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(bytes.fromhex(file_sha256(path)))
        return digest.hexdigest()


def folder_images(folder: Path) -> FileImages:
    """Return the image files of a folder in the order of their names; other files do not count.

    Raises `InputError` for a folder without images.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not found:
        raise InputError(f"{folder} has no images; their suffixes are {', '.join(SUFFIXES)}")
    return FileImages(found)


def read_image(path: Path) -> Tensor:
    """Return an image file as uint8 [C, H, W], of 1 or 3 channels. Raises `InputError` that names the file."""
    from PIL import Image

    check_regular(path)
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise InputError(f"{path} has pixels of mode {image.mode}; legal: {', '.join(MODES)} (8 bits)")
            pixels = torch.from_numpy(np.array(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no image that can be read: {error}") from None
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def array_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, Any]:
    """Return (shape, whether the order is Fortran's, dtype) of an array in numpy's format; the file stands behind it.

    Raises `InputError` naming `path` for what is no such header.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: '{IMAGES}' is no array of numpy: {str(error).partition(chr(10))[0]}") from None


def file_sha256(path: Path) -> str:
    """Return the hash of a file. Raises `InputError` that names the file."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_npz(path: Path, images: ImageSet, labels: Sequence[int] | None = None, batch: int = 100) -> None:
    """Write an ADM batch: `arr_0` uint8 [N, H, W, 3], and `arr_1` int64 [N] where there are class labels.

    Grey images get three equal channels, as evaluators of others expect. The images are written as they are read,
    `batch` at a time. The file is there whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = images.read(range(1)).shape[2:]
    with partial_file(path) as (partial, file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(_entry(IMAGES), "w", force_zip64=True) as array:
                _write_header(array, np.dtype(np.uint8), (images.count, height, width, 3))
                for start in range(0, images.count, batch):
                    pixels = images.read(range(start, min(start + batch, images.count)))
                    array.write(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            if labels is not None:
                with archive.open(_entry("arr_1"), "w") as array:
                    _write_header(array, np.dtype(np.int64), (len(labels),))
                    array.write(np.asarray(labels, dtype=np.int64).tobytes())
        file.flush()
        partial.chmod(0o644)
        partial.replace(path)
    sync(path.parent)


def _entry(name: str) -> zipfile.ZipInfo:
    """Return the entry of an array, without the time of day: the same images give the same bytes."""
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))


def _write_header(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
