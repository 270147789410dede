"""Make a traced model out of a Solution: diffusers' own model, its linear layers on codes."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures.traced import layer_names, traced
from tqdit.errors import InputError
from tqdit.graph import Graph, Linear
from tqdit.layers.clock import Clock
from tqdit.layers.codes import LayerCodes
from tqdit.layers.quantized import QuantizedLinear
from tqdit.layers.shared_input import Source
from tqdit.ops.dispatch import get_backend
from tqdit.ops.schema import WeightParams
from tqdit.runtime.traced import TracedModel, kernels_of, make_traced
from tqdit.runtime.traced_tensors import ModelFloats, WholeLayer
from tqdit.spec import Solution


def convert_traced(
    solution: Solution,
    backend: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    into: nn.Module | None = None,
) -> TracedModel:
    """Return the runnable model of a traced solution; see `runtime.convert.convert`.

    `dtype`: of the parameters that stay in float, but for those that the class keeps in fp32; None keeps the dtypes of
    the solution. Floats of the solution are shared where neither device nor dtype changes. `into`: the float model of
    the solution, which is made the runnable one itself. Each of its layers is freed once it has been replaced.
    """
    architecture, graph = traced(solution.model_config["_class_name"]), solution.graph
    assert graph is not None
    model: Any = architecture.empty(solution.model_config) if into is None else into
    device = torch.device(device)
    owners = _assemble(solution, graph, model, backend, device, dtype)
    _fill(solution, model, device, dtype)
    make_traced(model, architecture)
    chosen = get_backend(backend, device)
    model.requested_backend, model.quantization_backend = backend, chosen.NAME
    model.site_kernels, model.deviating = kernels_of(solution, chosen), getattr(chosen, "deviating", None)
    model.prepared_for = device.type
    model.clock_argument = _position(architecture.model_class().forward, graph.timestep)
    places: Any = {f"{name}.weight": WholeLayer(layer) for name, layer in owners.items()}
    sites = {layer.source.params.spec.name: layer.source.params for layer in owners.values() if layer.source}
    codes = LayerCodes(places, sites, {})
    model.solution = replace(solution, codes=codes, floats=ModelFloats(model, owners, solution.floats))
    return cast(TracedModel, model.eval().requires_grad_(False))


def _assemble(
    solution: Solution, graph: Graph, model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype | None
) -> dict[str, QuantizedLinear]:
    """Put layers on codes into an empty model; return them by name."""
    clock = Clock(solution.time_groups).to(device)
    layers: dict[str, QuantizedLinear] = {}
    linears = {name: linear for block in graph.blocks for linear in block.linears for name in linear.modules}
    sources: dict[str, Source] = {}
    for name in layer_names(graph):
        if f"{name}.weight" not in solution.params:  # an end that stays in float
            continue
        source = _source(solution, linears.get(name), sources, clock, device)
        layers[name] = _layer(solution, name, source, backend, device, _dtype_in(model, name, dtype))
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        owner._modules[leaf] = layers[name]
    if any(source.timed for source in sources.values()):
        model.add_module("clock", clock)
    return layers


def _source(
    solution: Solution, linear: Linear | None, made: dict[str, Source], clock: Clock, device: torch.device
) -> Source | None:
    """Return the source of a layer, one for all layers of its input; None for a layer on float inputs."""
    if linear is None:
        return None
    site = linear.source.name
    if site not in made:
        made[site] = Source(solution.params[site], clock, len(linear.modules)).to(device)
    return made[site]


def _layer(
    solution: Solution, name: str, source: Source | None, backend: str, device: torch.device, dtype: torch.dtype | None
) -> QuantizedLinear:
    site, bias = f"{name}.weight", solution.floats.get(f"{name}.bias")
    params = solution.params[site]
    weight = WeightParams(solution.codes[site].to(device), params.scale.reshape(-1).to(device), params.spec.bits)
    like = dtype or (_common_dtype(solution) if bias is None else bias.dtype)
    return QuantizedLinear(weight, None if bias is None else bias.float().to(device), source, backend, like)


def _dtype_in(model: nn.Module, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a layer or parameter in a model of `dtype`: fp32 for what its class keeps so."""
    kept: Iterable[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if dtype is not None and any(part in name.split(".") for part in kept) else dtype


def _common_dtype(solution: Solution) -> torch.dtype:
    """Return the dtype that most of the solution's floats have."""
    dtypes = [tensor.dtype for tensor in solution.floats.values() if tensor.is_floating_point()]
    return max(set(dtypes), key=dtypes.count, default=torch.float32)


def _fill(solution: Solution, model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Put the parameters and buffers that stay in float into a model, and move what it computed for itself."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            continue
        for held in (module._parameters, module._buffers):
            for leaf, tensor in list(held.items()):
                name = f"{path}.{leaf}" if path else leaf
                value = solution.floats.get(name)
                if value is None and (tensor is None or _is_part(module)):
                    continue
                value = tensor if value is None else value
                assert value is not None
                assert not value.is_meta, f"not filled: {name}"
                cast_too = value.is_floating_point() and name in solution.floats
                value = value.to(device, _dtype_in(model, name, dtype) if cast_too else None)
                held[leaf] = nn.Parameter(value, requires_grad=False) if held is module._parameters else value


def _is_part(module: nn.Module) -> bool:
    """Say whether a module belongs to a layer on codes, and is filled already."""
    return type(module).__module__.startswith("tqdit.") or hasattr(module, "unpacked")


def _position(forward: Callable[..., Any], name: str) -> tuple[str, int]:
    """Return an argument's name and its position after `self`."""
    names = list(inspect.signature(forward).parameters)[1:]
    if name not in names:
        raise InputError(f"the model's forward has no argument '{name}', which its time groups are of")
    return name, names.index(name)
