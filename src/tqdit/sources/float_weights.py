"""Find the float weights of a diffusers folder, and check them against the config before a model is built."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tqdit.architectures.registry import architecture
from tqdit.errors import AssumptionWarning, InputError
from tqdit.system.files import INDEX, WEIGHTS, is_there, read_json, read_tensors, read_weights

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PREFIXES = ("_orig_mod.", "module.", "model.")  # what torch.compile, DataParallel and trainers add
VARIANT = re.compile(r"diffusion_pytorch_model\.([\w-]+)\.safetensors")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a float model's folder by diffusers' names, in the dtype of the file.

    Weights that exist as one variant only, such as fp16, are taken with an `AssumptionWarning`. Raises `InputError`
    that names the folder or file.
    """
    return unwrapped(_read(folder))


def variants_alone(folder: Path) -> dict[str, Path]:
    """Return the files of a folder's variants, such as fp16, by variant; empty if weights have no variant."""
    if is_there(folder / INDEX) or is_there(folder / WEIGHTS):
        return {}
    return {found[1]: path for path in sorted(folder.glob("*.safetensors")) if (found := VARIANT.fullmatch(path.name))}


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files whose tensors `read` returns, including files that are missing."""
    if is_there(folder / INDEX):
        weight_map = read_json(folder / INDEX).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        return sorted({shard for shard in shards if isinstance(shard, str)})
    return [path.name for path in variants_alone(folder).values()] or [WEIGHTS]


def _read(folder: Path) -> dict[str, torch.Tensor]:
    if is_there(folder / INDEX) or is_there(folder / WEIGHTS):
        return read_weights(folder)
    variants = variants_alone(folder)
    if len(variants) == 1:
        ((variant, path),) = variants.items()
        message = f"{folder} has weights as the variant {variant} only, which are taken"
        warnings.warn(message, AssumptionWarning, stacklevel=2)
        return read_tensors(path)
    if variants:
        names = ", ".join(variants)
        raise InputError(f"{folder} has weights as the variants {names} only; keep one, or name it {WEIGHTS}")
    if sharded := sorted(folder.glob("*.index.*.json")):
        raise InputError(f"{folder} has a variant in several files only, {sharded[0].name}; save it without a variant")
    return read_weights(folder)


def unwrapped(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors without the prefix that all their names have if the model was wrapped when it was saved."""
    found = dict(tensors)
    while prefix := next((p for p in PREFIXES if found and all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def check_sizes(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Raise `InputError` if the config's sizes are not those of the tensors.

    A model of these sizes can then be built without weights: the file bounds its tables and its number of modules.
    """
    architecture(config).check_sizes(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def check_shapes(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` that names the first tensor that is missing, of another shape than expected, or left over."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise InputError(f"weights lack tensor '{name}'")
        if tensors[name].shape != tensor.shape:
            shape, needed = tuple(tensors[name].shape), tuple(tensor.shape)
            raise InputError(f"tensor '{name}' has shape {shape}, the config needs {needed}")
    if extra := sorted(set(tensors) - set(expected)):
        raise InputError(f"unexpected tensor '{extra[0]}'")


def checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in fp32.

    Raises `InputError` that names the tensor and its dtype, or the first value that is not finite.
    """
    if tensor.dtype not in FLOATS:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise InputError(
            f"tensor '{name}' is stored as {str(tensor.dtype).removeprefix('torch.')}; float weights are {legal} "
            "(quantized weights have to be converted back with their scales)"
        )
    value = tensor.float()
    if not bool(torch.isfinite(value).all()):
        index = (~torch.isfinite(value)).nonzero()[0].tolist()
        found = tensor[tuple(index)].item()
        large = ", which is too large for fp32" if torch.isfinite(tensor[tuple(index)]) else ""
        raise InputError(f"tensor '{name}' is {found} at index {index}{large}; weights have to be finite")
    return value
