"""Load a model to run it: an artifact in integers, anything else in float."""

from pathlib import Path

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.runtime import fitting
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Device, Dtype, Target, dtype_name
from tqdit.sources.resolve import load_float, resolve
from tqdit.sources.source import ModelSource
from tqdit.system.deprecation import formerly_positional
from tqdit.system.isolation import isolated


@formerly_positional("backend", "device", "dtype")
@isolated()
def load(model: str | Path, *, backend: str = "auto", device: Device = "auto", dtype: Dtype = "float32") -> nn.Module:
    """Load a transformer to run it: an artifact in integers on `backend`, any other model in fp32.

    `device`: "auto" is a GPU where there is one, else the CPU. `dtype`: float32, float16 or bfloat16 (or torch's
    own), of an artifact's residual stream; that of float16 is float32 where fp16 might not hold it.
    """
    return load_source(resolve(model), Target(backend, device, dtype))


@isolated()
def load_source(source: ModelSource, target: Target) -> nn.Module:
    """Load a model that is found already, as `load` does."""
    if source.quantized:
        return convert(fitting.read(source.folder, source.root), target.backend, target.device, target.dtype)
    if target.dtype is not torch.float32:
        raise InputError(
            f"'{source.name}' is a float model and runs in float32; dtype '{dtype_name(target.dtype)}' is for artifacts"
        )
    if target.backend != "auto":
        raise InputError(
            f"'{source.name}' is a float model, which torch runs; backend '{target.backend}' is for artifacts"
        )
    return load_float(source).to(target.device)
