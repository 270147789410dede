"""Read and write files with clear errors: JSON, safetensors, what is in a model's folder. Never a pickle."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tqdit.errors import InputError
from tqdit.system.reading import check_regular, parse_json, read_bytes
from tqdit.system.swap import partial_file, rename_new, sync

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # the index of weights in several files
TRANSFORMER = "transformer"  # the folder of a pipeline's model
MANIFEST = "tqdit.json"  # the seal of an artifact
MODEL_CARD = "README.md"
EDITABLE = (MODEL_CARD, ".gitattributes")  # people and the Hub change these files in a published folder
PIPELINE_FILES = ("model_index.json", "id2label.json", "scheduler/scheduler_config.json", "vae/config.json")
DEBRIS = re.compile(r"\.DS_Store|\._.*|\.ipynb_checkpoints|\.cache")  # left by programs that show or download a folder
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
