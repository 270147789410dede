"""Write a run as one safetensors file, and read it. Nothing in it is a pickle.

The tensor `tqdit.run` is the run as JSON (uint8); `images/N` are the images of a row, uint8 (count, C, H, W). The
metadata has the sha256 of the JSON, and the JSON those of the images, so that damage is found.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save

from tqdit.errors import InputError
from tqdit.quality.run import VERSION, Run
from tqdit.system import files, outputs
from tqdit.system.reading import check_regular, parse_json
from tqdit.system.validation import reason

SEAL = "tqdit.run"  # the name of the JSON's tensor, and of its sha256 in the metadata
IMAGES = "images/"
SUFFIX = ".safetensors"
WRITTEN_BY = "`tqdit compare --out` writes runs"
MOST_BYTES = 2**30  # of a file; a run of 20 images of 512 x 512 in colour for each of 10 models has 160 MB


class _VersionError(ValueError):
    """A run is of another version of the format, and not damaged."""


def check_path(path: Path) -> None:
    """Raise `InputError` for a path that cannot be a run's file; called before any work."""
    if path.suffix != SUFFIX:
        raise InputError(f"a run is saved as a {SUFFIX} file, got '{path}'")
    outputs.check_file(path)


def write(path: Path, run: Run, images: Mapping[int, torch.Tensor]) -> None:
    """Write a run whole or not at all. `images`: of the rows that name them, uint8 (count, C, H, W)."""
    check_path(path)
    stored = {f"{IMAGES}{number}": pixels.contiguous() for number, pixels in images.items()}
    value = {**run.model_dump(mode="json"), "sha256": {name: _digest(pixels) for name, pixels in stored.items()}}
    text = json.dumps(value, allow_nan=False).encode()
    stored[SEAL] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    files.write_bytes(path, save(dict(sorted(stored.items())), {SEAL: hashlib.sha256(text).hexdigest()}))


def read(path: Path) -> tuple[Run, dict[int, torch.Tensor]]:
    """Return a run and the images of its rows. Raises `InputError` naming the file and what is wrong with it."""
    size = check_regular(path, WRITTEN_BY).st_size
    if size > MOST_BYTES:
        raise InputError(f"{path} has {size} bytes; a run has at most {MOST_BYTES}")
    try:
        tensors = files.read_tensors(path)
    except InputError as error:
        raise InputError(f"{error}; {WRITTEN_BY}") from None
    if SEAL not in tensors:
        raise InputError(f"{path} is no run that `tqdit compare --out` saved")
    try:
        with safe_open(path, framework="pt") as file:
            seal = (file.metadata() or {}).get(SEAL)
        return _checked(tensors, seal)
    except _VersionError as error:
        raise InputError(f"{path} {error}") from None
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {reason(error)}") from None
    except (InputError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _checked(tensors: dict[str, torch.Tensor], seal: str | None) -> tuple[Run, dict[int, torch.Tensor]]:
    text = tensors.pop(SEAL).numpy().tobytes()
    if hashlib.sha256(text).hexdigest() != seal:
        raise ValueError(f"'{SEAL}' was changed")
    value = parse_json(text, infinite=False)
    if value.get("version") != VERSION:
        raise _VersionError(f"has a run of version {value.get('version')!r:.80}; this tqdit reads {VERSION}")
    digests = value.pop("sha256", None)
    run = Run.model_validate(value)
    if not isinstance(digests, dict) or digests.keys() != tensors.keys():
        raise ValueError("its images are not those that it lists")
    for name, pixels in tensors.items():
        if _digest(pixels) != digests[name]:
            raise ValueError(f"'{name}' was changed")
    return run, _images(run, tensors)


def _images(run: Run, tensors: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the images of rows by number. In a part all rows with images have as many, of one size."""
    found = {}
    for part in run.parts:
        shapes = set()
        for row in (part.reference, *part.models):
            if row.images is None:
                continue
            pixels = tensors.get(f"{IMAGES}{row.images}")
            if pixels is None:
                raise ValueError(f"the images of '{row.name}' are missing")
            if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.numel():
                raise ValueError(f"the images of '{row.name}' are {pixels.dtype} {tuple(pixels.shape)}")
            shapes.add(pixels.shape)
            found[row.images] = pixels
        if len(shapes) > 1:
            raise ValueError("its models have images of different sizes")
    return found


def _digest(pixels: torch.Tensor) -> str:
    header = f"{pixels.dtype} {tuple(pixels.shape)} ".encode()
    return hashlib.sha256(header + pixels.contiguous().numpy().tobytes()).hexdigest()
