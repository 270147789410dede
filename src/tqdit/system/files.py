"""Files in and out: JSON and safetensors read with clear errors, folders replaced atomically. Never a pickle."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tqdit.errors import InputError
from tqdit.system import swap
from tqdit.system.reading import check_regular, parse_json, read_bytes
from tqdit.system.swap import Place, partial_file, rename_new, sync

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # the index of weights in several files
TRANSFORMER = "transformer"  # the folder of a pipeline's model
MANIFEST = "tqdit.json"  # the seal of an artifact
MODEL_CARD = "README.md"
EDITABLE = (MODEL_CARD, ".gitattributes")  # people and the Hub change these files in a published folder
PIPELINE_FILES = ("model_index.json", "id2label.json", "scheduler/scheduler_config.json", "vae/config.json")
WEIGHT_FILE = re.compile(r"diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors")
DEBRIS = re.compile(r"\.DS_Store|\._.*|\.ipynb_checkpoints|\.cache")  # left by programs that show or download a folder
OVERWRITE = "--overwrite, in Python overwrite=True"  # how a user allows it
Kind = Callable[[Path], bool]  # says whether a folder is of some kind
QUANT_METHOD = "tqdit"  # in the `quantization_config` of an artifact's config


def read_json(path: Path, why: str = "") -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises `InputError` that names the file; `why` says what the file is needed for.
    """
    data = read_bytes(path, why=why)
    try:
        return parse_json(data)
    except InputError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def is_there(path: Path) -> bool:
    """Say whether anything has this name.

    What is there and is no regular file is to be refused, not passed over.
    """
    return os.path.lexists(path)


def hidden(path: Path) -> bool:
    """Say whether a relative path has a part with a leading dot, as files of editors, file managers and hubs do."""
    return any(part.startswith(".") for part in path.parts)


def is_debris(path: Path) -> bool:
    """Say whether a path, relative to a model's folder, is a file that programs leave there and nobody misses."""
    return any(DEBRIS.fullmatch(part) for part in path.parts)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file. Raises `InputError` that names the file."""
    check_regular(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from None
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # an unknown dtype or shape
        raise InputError(f"{path} has a tensor that cannot be read: {error}") from None


def model_folder(root: Path) -> Path:
    """Return the folder that has the model's config.json: a pipeline's `transformer`, else `root` itself."""
    return root / TRANSFORMER if (root / TRANSFORMER).is_dir() else root


def is_artifact(root: Path) -> bool:
    """Say whether a folder is an artifact of ours, according to the model's config in it."""
    try:
        quantization = read_json(model_folder(root) / CONFIG).get("quantization_config")
    except InputError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model's folder, from one safetensors file or from shards with an index.

    Raises `InputError` that names the file.
    """
    if is_there(folder / INDEX):
        index = read_json(folder / INDEX, "sharded weights have one")
        return _read_shards(folder, index.get("weight_map"))
    if not is_there(folder / WEIGHTS) and list(folder.glob("*.bin")):
        raise InputError(f"{folder} has only pickled .bin weights; save it as safetensors first")
    return read_tensors(folder / WEIGHTS)


def _read_shards(folder: Path, weight_map: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of every file that the index names.

    Which file has which tensor is read from the files.
    """
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
    """Write a safetensors file with the tensors in the order of their names; no two may share memory.

    Raises `OSError` that names the file.
    """
    try:
        save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})
        path.chmod(0o644)  # the mode of every file beside it
    except SafetensorError as error:  # the disk may be full
        raise OSError(f"{path} cannot be written: {error}") from None


def write_bytes(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a file whole or not at all: an error, an interrupt or a kill leaves what was there.

    Without `replace`, what is there stays. Raises `OSError` naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(path) as (partial, file):
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            with suppress(FileExistsError):
                rename_new(partial, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write JSON that a person can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


@contextmanager
def replacing(
    target: Path, overwrite: bool = False, replaceable: Kind = is_artifact, in_pipeline: bool = False
) -> Iterator[Path]:
    """Yield a new folder to fill, which becomes `target` on success.

    On any error or interrupt `target` stays as it was. Raises `InputError` as `check_target` does, and if another
    process is writing `target`. A symbolic link to a folder stays; what it points to is replaced. `replaceable`,
    `in_pipeline`: as in `check_target`.
    """
    with reserved(target, replaceable) as place, filled(place, overwrite, replaceable, in_pipeline) as folder:
        yield folder


@contextmanager
def reserved(target: Path, replaceable: Kind = is_artifact) -> Iterator[Place]:
    """Keep other processes from writing `target` while the block runs.

    What a killed process left of `target` is repaired first. `replaceable`: what a folder must be to be put back as
    `target`. Raises `InputError` if another process is writing it, and if it cannot be made.
    """
    _check_link(target)
    target = _real(target)
    check_parent(target)
    with swap.reserved(target, replaceable) as place:
        yield place


def repair(target: Path, replaceable: Kind = is_artifact) -> None:
    """Repair what a killed run left of `target`, as `reserved` does; called before any work."""
    with reserved(target, replaceable):
        pass


@contextmanager
def filled(
    place: Place, overwrite: bool = False, replaceable: Kind = is_artifact, in_pipeline: bool = False
) -> Iterator[Path]:
    """Do as `replacing` for a target that is reserved already."""

    def check() -> None:  # checked again at the end: hours may have passed
        check_target(place.target, overwrite, replaceable, in_pipeline)

    check()
    with place.filled(check) as folder:
        yield folder


def check_target(target: Path, overwrite: bool, replaceable: Kind = is_artifact, in_pipeline: bool = False) -> None:
    """Raise `InputError` if a folder `target` cannot be written, or would lose something; called before any work.

    `replaceable`: whether a folder that is not empty may be overwritten, if it has a model's own files alone.
    `in_pipeline`: whether `target` may be a transformer of a pipeline.
    """
    _check_link(target)
    target = _real(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"output {target} is a file; an artifact is a folder")
    if target.exists() and not overwrite:
        raise InputError(f"output {target} exists; choose another folder, or overwrite it ({OVERWRITE})")
    if target.is_dir() and any(target.iterdir()):
        if not replaceable(target):
            kind = "an artifact" if replaceable is is_artifact else "of the kind that is written here"
            raise InputError(f"output {target} is not {kind}; refusing to overwrite it")
        if foreign := foreign_file(target):
            raise InputError(f"{target} has '{foreign}', which is no part of the model and would be lost; move it")
    if target.is_mount():
        raise InputError(f"output {target} is a mount point, which cannot be replaced; choose a folder inside it")
    part = in_pipeline and target.name.startswith(TRANSFORMER)  # some pipelines have a transformer_2
    check_outside(target.parent if part else target)
    check_parent(target)


def check_outside(target: Path) -> None:
    """Raise `InputError` if a folder or file `target` would be inside an artifact."""
    if around := next((folder for folder in _real(target).parents if is_artifact(folder)), None):
        raise InputError(f"output {target} is inside the artifact {around}; choose a place outside of it")


def check_file(path: Path) -> None:
    """Raise `InputError` if `path` cannot be written as a file; called before any work."""
    if path.is_dir():
        raise InputError(f"output {path} is a folder; give a file")
    if path.exists() and not path.is_file():
        raise InputError(f"output {path} is not a regular file")
    check_outside(path)
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise `InputError` if the nearest parent that exists is no folder, or takes no small file."""
    parent = _nearest(path)
    if not parent.is_dir():
        raise InputError(f"output {path} cannot be made: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent) as file:  # it has no name where the file system allows that
            file.write(bytes(4096))
    except OSError as error:
        raise InputError(f"output {path} cannot be made: {parent} is not writable ({error.strerror})") from None


def check_space(target: Path, needed: int) -> None:
    """Raise `InputError` if the disk of an output has less than `needed` bytes free; called before any work."""
    parent = _nearest(target)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise InputError(
            f"output {target} takes about {needed / 1e6:.1f} MB, and {parent} has {free / 1e6:.1f} MB free"
        )


def foreign_file(folder: Path) -> str | None:
    """Return the first file in a model's folder that replacing the model would lose: it is not the model's own.

    What people edit in such a folder is kept, see `model_card`.
    """
    model = model_folder(folder)
    own = {folder / name for name in PIPELINE_FILES}
    for root in {folder, model}:
        own |= {root / name for name in (CONFIG, MANIFEST, INDEX, *EDITABLE)}
        own |= {path for path in root.glob("*") if WEIGHT_FILE.fullmatch(path.name)}
        own |= {root / name for name in _sealed(root / MANIFEST)}
    own |= set((folder / "vae").glob("*.safetensors"))
    if not is_there(folder / MANIFEST):  # else the folder's seal lists the components
        for name in components_named(folder):
            own |= {folder / name, *(folder / name).rglob("*")}
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = (path.relative_to(folder) for path in files if path not in own)
    return next((path.as_posix() for path in foreign if not is_debris(path)), None)


def components_named(folder: Path) -> set[str]:
    """Return the names that a pipeline's model_index.json puts into its folder besides transformer and scheduler.

    These are components, and a Python file of the pipeline's own class. Empty where the index cannot be read.
    """
    try:
        index = read_json(folder / PIPELINE_FILES[0])
    except InputError:
        return set()
    code = index.pop("_class_name", None)
    named = {name for name, entry in index.items() if isinstance(entry, list) and name[:1] != "_"}
    if isinstance(code, list) and code and isinstance(code[0], str):
        named.add(f"{code[0]}.py")
    return {name for name in named if Path(name).name == name} - {TRANSFORMER, "scheduler"}


def _sealed(manifest: Path) -> list[str]:
    """Return the names that a seal lists, and none where the seal cannot be read."""
    try:
        names = read_json(manifest).get("files")
    except InputError:
        return []
    return list(names) if isinstance(names, dict) else []


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise InputError(f"output {path} is a symbolic link to nothing; remove it or choose another folder")


def _real(path: Path) -> Path:
    """Return a path without symbolic links, as `Path.resolve` does, but a circle of links is no error."""
    return Path(os.path.realpath(path))


def _nearest(path: Path) -> Path:
    """Return the nearest parent that exists."""
    return next(p for p in path.absolute().parents if p.exists() or p.is_symlink())
