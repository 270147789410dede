"""Measure the bytes of a float model: as stored, in fp32 and in bf16."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from tqdit.sources import float_weights
from tqdit.sources.checkpoints import Checkpoint
from tqdit.sources.source import ModelSource

SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class FloatSizes:
    """The bytes of a float model: its weights as they were given, in their `file_dtype`, and in fp32 and bf16."""

    file_bytes: int
    file_dtype: str
    float32_bytes: int
    bfloat16_bytes: int


def float_sizes(source: ModelSource, model: nn.Module) -> FloatSizes:
    """Return the sizes of `model`, which was loaded from `source`.

    A tensor that is stored in several places counts once for each. Only those weights of a training checkpoint count
    that are used, not the rest of the file.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    by_dtype = _folder(source.folder) if source.opened is None else _checkpoint(source.opened)
    file_bytes = sum(by_dtype.values())
    return FloatSizes(file_bytes, by_dtype.most_common(1)[0][0], 4 * count, 2 * count)


def _checkpoint(found: Checkpoint) -> Counter[str]:
    """Return the bytes of a checkpoint's tensors, by the name of their dtype."""
    counts: Counter[str] = Counter()
    for tensor in found.tensors.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return counts


def _folder(folder: Path) -> Counter[str]:
    """Return the bytes of the tensors in the files that `float_weights.read` reads, by the name of their dtype."""
    counts: Counter[str] = Counter()
    for name in float_weights.weight_files(folder):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(key)
                kind = SAFETENSORS[part.get_dtype()]  # the dtype is known, since `load_float` has read the file
                counts[kind] += getattr(torch, kind).itemsize * math.prod(part.get_shape())
    return counts
