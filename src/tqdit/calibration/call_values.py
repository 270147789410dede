"""Handle the arguments of a model's call: nested dicts, lists and tuples of tensors and plain values."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tqdit.errors import InputError

MAX_DEPTH = 16  # dicts, lists and tuples in each other; those of diffusers have 3 levels at most
LARGEST = 2**63  # integers have 64 bits, as in every JSON file of ours
STORED = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
Keep = Callable[[torch.Tensor], torch.Tensor]


def kept(value: Any, name: str, keep: Keep, depth: int = 0) -> Any:
    """Return a copy of an argument in which `keep` has replaced every tensor; later changes to the argument don't show.

    `name`: the argument's, for messages. Mappings become dicts, and subclasses of str, int, float and tuple the plain
    types. Raises `InputError` naming the argument for a value that cannot be stored, such as a cache or a function.
    """
    if depth > MAX_DEPTH:
        raise InputError(f"argument '{name}' has more than {MAX_DEPTH} dicts, lists and tuples in each other")
    if isinstance(value, torch.Tensor):
        return keep(_checked(value, name))
    if isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, str) and type(key) is not int]:
            raise InputError(f"argument '{name}' has the key {other[0]!r}; keys must be strings or whole numbers")
        return {_plain(key, name): kept(part, f"{name}.{key}", keep, depth + 1) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [kept(part, f"{name}[{i}]", keep, depth + 1) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return _plain(value, name)


def mapped(value: Any, function: Keep) -> Any:
    """Return a copy of an argument that `kept` returned, with `function` applied to every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(part, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(part, function) for part in value)
    return value


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Return every tensor of an argument with its name, such as "cap_feats[0]"."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from tensors(part, f"{name}[{index}]")


def floats_of(tree: Any) -> Iterator[torch.Tensor]:
    """Return the floating-point tensors of an output: a tensor, a sequence, a table or an object with fields."""
    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from floats_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from floats_of(value)
    elif hasattr(tree, "__dict__"):
        yield from floats_of(vars(tree))


def encoded(value: Any, reference: Callable[[torch.Tensor], str]) -> Any:
    """Return an argument as JSON; `reference` says under which name a tensor is found again."""
    if isinstance(value, torch.Tensor):
        return {"tensor": reference(value)}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {"dict": {key: encoded(part, reference) for key, part in value.items()}}
        return {"pairs": [[key, encoded(part, reference)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [encoded(part, reference) for part in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def decoded(value: Any, find: Callable[[str], torch.Tensor]) -> Any:
    """Return the argument that `encoded` made JSON of. Raises `ValueError` for anything else."""
    if not isinstance(value, dict | list):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("an argument's value is malformed")
    ((kind, content),) = value.items()
    if kind == "tensor" and isinstance(content, str):
        return find(content)
    if kind == "dict" and isinstance(content, dict):
        return {key: decoded(part, find) for key, part in content.items()}
    if kind == "pairs" and isinstance(content, list) and all(isinstance(pair, list) for pair in content):
        return {key: decoded(part, find) for key, part in content}
    if kind in ("list", "tuple") and isinstance(content, list):
        parts = [decoded(part, find) for part in content]
        return parts if kind == "list" else tuple(parts)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    raise ValueError(f"an argument's value is of the unknown kind '{kind}'")


def digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a CPU tensor's dtype, shape and values."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy on the CPU that autograd may use, though it may be made under inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def largest(time: Any) -> float | None:
    """Return the largest of the numbers of a time argument; None if it is no finite real number, or tensor of such."""
    if isinstance(time, torch.Tensor):
        if time.dtype.is_complex or time.dtype is torch.bool or not time.numel():
            return None
        values = time.detach().double()
        return float(values.max()) if bool(values.isfinite().all()) else None
    if isinstance(time, list | tuple) and time:
        parts = [largest(part) for part in time]
        return None if None in parts else max(part for part in parts if part is not None)
    if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time):
        return None
    return float(time)


def _checked(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.dtype not in STORED:
        raise InputError(f"argument '{name}' is a tensor of dtype {tensor.dtype}, which cannot be stored")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "the meta device" if tensor.is_meta else f"layout {tensor.layout}"
        raise InputError(f"argument '{name}' is a tensor of {kind}, which cannot be stored")
    return tensor


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if not -LARGEST <= value < LARGEST:
            raise InputError(f"argument '{name}' is an integer of more than 64 bits")
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise InputError(f"argument '{name}' is of type {type(value).__name__}, which cannot be stored with the call")
