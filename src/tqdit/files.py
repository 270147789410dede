"""Files in and out: JSON and safetensors read with clear errors, folders replaced atomically. Never a pickle."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tqdit.errors import InputError
from tqdit.reading import check_regular, parse_json, read_bytes

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
TRANSFORMER = "transformer"  # the folder of a pipeline that has the model
MANIFEST = "tqdit.json"  # what makes a folder an artifact
QUANT_METHOD = "tqdit"  # in the `quantization_config` of an artifact's config


def read_json(path: Path, why: str = "") -> dict[str, Any]:
    """A JSON object from a file, or an `InputError` that names the file; `why` says what it is needed for."""
    data = read_bytes(path, why=why)
    try:
        return parse_json(data)
    except InputError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def is_there(path: Path) -> bool:
    """Whether anything has this name: what is there and is no regular file is to be refused, not passed over."""
    return os.path.lexists(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or an `InputError` that names the file."""
    check_regular(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from None
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # a dtype or shape torch lacks
        raise InputError(f"{path} has a tensor that cannot be read: {error}") from None


def model_folder(root: Path) -> Path:
    """The folder that has the model's config.json: a pipeline's `transformer`, else `root` itself."""
    return root / TRANSFORMER if (root / TRANSFORMER).is_dir() else root


def is_artifact(root: Path) -> bool:
    """Whether a folder is an artifact of ours, sealed or only with our config."""
    if (root / MANIFEST).is_file():
        return True
    try:
        quantization = read_json(model_folder(root) / CONFIG).get("quantization_config")
    except InputError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder, from one safetensors file or from shards with an index.

    Raises `InputError` that names the file.
    """
    if is_there(folder / INDEX):
        index = read_json(folder / INDEX, "sharded weights have one")
        return _read_shards(folder, index.get("weight_map"))
    if not is_there(folder / WEIGHTS) and list(folder.glob("*.bin")):
        raise InputError(f"{folder} has only pickled .bin weights; save it as safetensors first")
    return read_tensors(folder / WEIGHTS)


def _read_shards(folder: Path, weight_map: Any) -> dict[str, torch.Tensor]:
    """The tensors of every file that the index names. Which of them has which tensor is read from the files."""
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of tensor names to files")
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise InputError(f"{folder / INDEX} names '{shard}', which is not a file of the folder")
        tensors = read_tensors(folder / shard)
        if repeated := sorted(found.keys() & tensors.keys()):
            raise InputError(f"{folder / shard} has tensor '{repeated[0]}', and so has another file of {INDEX}")
        found |= tensors
    return found


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file in the order of names; no two tensors may share memory. Raises `OSError` naming the file."""
    try:
        save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})
        path.chmod(0o644)  # as every file beside it
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{path} cannot be written: {error}") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: an error or interrupt leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """JSON that a person can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


@contextmanager
def replacing(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill that becomes `target` on success; on any error or interrupt `target` is as it was.

    Raises `InputError` as `check_target` does. A symbolic link to a folder stays; what it points to is replaced.
    """
    check_target(target, overwrite)
    target = _real(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for file in [p for p in partial.rglob("*") if p.is_file()]:
            _sync(file)
        _swap(partial, target, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise `InputError` if a folder `target` cannot be written, or would lose something; called before any work."""
    if target.is_symlink() and not target.exists():
        raise InputError(f"output {target} is a symbolic link to nothing; remove it or choose another folder")
    target = _real(target)
    if target.exists() and not overwrite:
        raise InputError(f"output {target} exists; choose another folder or pass --overwrite")
    if target.exists() and not target.is_dir():
        raise InputError(f"output {target} is a file; an artifact is a folder")
    if target.is_dir() and any(target.iterdir()) and not is_artifact(target):
        raise InputError(f"output {target} is not an artifact; refusing to overwrite it")
    _check_parent(target)


def check_file(path: Path) -> None:
    """Raise `InputError` if `path` cannot be written as a file; called before any work."""
    if path.is_dir():
        raise InputError(f"output {path} is a folder; give a file")
    if path.exists() and not path.is_file():
        raise InputError(f"output {path} is not a regular file")
    _check_parent(path)


def _real(path: Path) -> Path:
    """Without symbolic links; `Path.resolve`, but a circle of links is no error."""
    return Path(os.path.realpath(path))


def _check_parent(path: Path) -> None:
    """The nearest parent that exists must be a folder we may write into."""
    parent = next(p for p in path.absolute().parents if p.exists() or p.is_symlink())
    if not parent.is_dir():
        raise InputError(f"output {path} cannot be made: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {path} cannot be made: {parent} is not writable")


def _swap(partial: Path, target: Path, overwrite: bool) -> None:
    if not target.exists():
        partial.rename(target)
        return
    assert overwrite
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old)  # onto an empty folder: atomic on POSIX
        partial.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
