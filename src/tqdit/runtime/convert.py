"""`convert` makes a Solution a runnable transformer. No other module swaps layers."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures.building import empty_model
from tqdit.architectures.parts import Parts
from tqdit.architectures.registry import architecture
from tqdit.artifact.tensors import decisive
from tqdit.errors import InputError
from tqdit.layers.call import GroupLookup
from tqdit.layers.codes import LayerCodes
from tqdit.ops.dispatch import get_backend, kernel_name
from tqdit.ops.modules import Fingerprint, state_names
from tqdit.runtime.calls import Runtime
from tqdit.runtime.fitting import check_solution
from tqdit.runtime.integer import make_integer
from tqdit.runtime.traced_assembly import convert_traced
from tqdit.spec import Solution

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convert(
    solution: Solution,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    memory: str | torch.device | None = None,
) -> nn.Module:
    """Return a diffusers transformer in eval mode that runs on the codes of `solution`.

    The float weights are never materialised: the structure is built empty, then filled. The model's class is the
    integer one of the solution's architecture. The model has `quantization_backend`, `quantization_report` (site name
    -> kernel) and `solution`, whose codes are those of the model's layers.

    `backend`: a name, or "auto". A model with the backend "auto" is converted again by a call on another kind of
    device. `device`: where the model runs. `dtype`: float32, float16 or bfloat16, of inputs and outputs as
    `torch_dtype` of diffusers, and of the residual stream; None is float32, or for a traced model as stored. Under
    float16 the stream is float32 unless the solution `fits_float16`: `stream_dtype` of the model says which. `memory`:
    the device that holds the tensors of a model that is offloaded, whose parts are moved to `device` one at a time; by
    default `device` itself.

    A traced model (with a graph of its own, see `runtime.traced`) runs diffusers' own code around its layers; `dtype`
    is that of the parameters that stay in float.

    Raises `InputError` if the solution does not fit the model that its config describes (see `runtime.fitting`), and if
    the backend cannot run on the device.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    check_solution(solution)
    if solution.graph is not None:
        return cast(nn.Module, convert_traced(solution, backend, device, dtype))
    return _converted(solution, backend, device, dtype or torch.float32, memory)


def _converted(
    solution: Solution,
    backend: str,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    memory: str | torch.device | None = None,
) -> nn.Module:
    chosen = get_backend(backend, device)
    described = architecture(solution.model_config)
    model: Any = empty_model(solution.model_config)
    parts = Parts(solution, chosen, described.graph(solution.model_config), model)
    described.assemble(parts)
    parts.fill(model)
    groups = GroupLookup(solution.time_groups)
    model.add_module("runtime", Runtime(described, groups, chosen.GRAPHS, getattr(chosen, "compile_ahead", None)))
    make_integer(model, described)
    empty_yet = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    assert not empty_yet, f"not filled: {empty_yet}"
    model.quantization_backend = chosen.NAME
    model.site_kernels = {name: kernel_name(params, chosen) for name, params in solution.params.items()}
    model.deviating = getattr(chosen, "deviating", None)
    model.solution = replace(solution, codes=LayerCodes(parts.places, parts.sites, parts.float_ends))
    model.reconvert = partial(_converted, backend=backend)  # the solution was checked before
    model.io_dtype = dtype
    model.fits_float16 = solution.fits_float16
    model.prepared_for = torch.device(device).type
    model.fingerprint = Fingerprint(_described(solution, chosen.NAME, device))
    model.fixed = frozenset(state_names(model))
    return model.eval().requires_grad_(False).to(device if memory is None else memory)


def _described(solution: Solution, backend: str, device: str | torch.device) -> dict[str, Any]:
    """Describe a converted model without its tensors: grids, time groups, provenance and layout of layers."""
    return {
        "model_config": decisive(solution.model_config),
        "time_groups": asdict(solution.time_groups),
        "sites": [asdict(spec) for spec in solution.sites],
        "provenance": solution.provenance.to_json(),
        "layout": [backend, torch.device(device).type],
    }
