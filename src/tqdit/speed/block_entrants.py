"""Make the entrants of a race of transformer blocks: a float model, ours, and torchao's, each eager or compiled.

The repeated blocks of a model are compiled, not the model: one compilation serves all blocks of a kind, as users of
large models do it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tqdit.calibration.call_values import mapped
from tqdit.errors import InputError
from tqdit.graph import Graph
from tqdit.recipe import Recipe
from tqdit.recorded import quantize_recorded
from tqdit.speed.baselines import RECOMPILE_LIMIT, TORCHAO_OPTIONS, missing, quiet
from tqdit.speed.machine import synchronise

# Entrant -> (weights, options of torch.compile or None for an eager model). Entrants of equal weights share a model.
AUTOTUNED: Mapping[str, Any] = {"max_autotune": True, "coordinate_descent_tuning": True}  # its mode without CUDA graphs
ENTRANTS: Mapping[str, tuple[str, Mapping[str, Any] | None]] = {
    "bf16-eager": ("bf16", None),
    "bf16-compiled": ("bf16", {}),
    "bf16-autotuned": ("bf16", AUTOTUNED),
    "fp32-compiled": ("fp32", {}),  # faster than bf16 on processors without bf16 products
    "ours-eager": ("ours", None),
    "ours-compiled": ("ours", {}),
    "torchao-int8": ("torchao-int8", TORCHAO_OPTIONS),
    "torchao-fp8": ("torchao-fp8", TORCHAO_OPTIONS),
}
OURS = ("ours-eager", "ours-compiled")
FLOATS = ("bf16-eager", "bf16-compiled", "bf16-autotuned")
DEFAULT = ("bf16-eager", "bf16-compiled", "torchao-int8", "torchao-fp8")  # whom ours is compared with


def rivals(names: Sequence[str]) -> tuple[str, ...]:
    """Return the entrants that are meant by names or by the families "bfloat16" and "torchao".

    Raises `InputError` naming an unknown one.
    """
    known = [name for name in ENTRANTS if name not in OURS]
    families = {"bfloat16": known[:2], "torchao": [name for name in known if name.startswith("torchao")]}
    for name in names:
        if name not in (*known, *families):
            raise InputError(f"unknown baseline '{name}'; known: {', '.join([*families, *known])}")
    return tuple(name for name in known if name in names or any(name in families.get(given, ()) for given in names))


@dataclass(frozen=True)
class Entrant:
    """One that takes part: `call` runs the whole model, `linears` its linear layers alone; both are synchronised."""

    name: str
    call: Callable[[], Any]
    linears: Callable[[], Any]


class Linears(nn.Module):
    """The layers of one block of each kind that are quantized with their inputs; called with these inputs."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        names = [linear.modules for linear in first_linears(graph)]
        self.sites = nn.ModuleList(nn.ModuleList(model.get_submodule(name) for name in some) for some in names)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of all layers."""
        pairs = zip(inputs, self.sites, strict=True)
        return [layer(x) for x, layers in pairs for layer in layers]  # type: ignore[attr-defined]


def first_linears(graph: Graph) -> list[Any]:
    """Return the linear layers, by input, of the first block of each kind."""
    kinds: dict[str, Any] = {}
    for block in graph.blocks:
        kinds.setdefault(block.prefix.rpartition(".")[0], block)
    return [linear for block in kinds.values() for linear in block.linears]


def inputs_of(model: nn.Module, graph: Graph, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the inputs that a call of the float model gives to `first_linears`."""
    taken: dict[str, torch.Tensor] = {}
    names = [linear.modules[0] for linear in first_linears(graph)]

    def take(name: str) -> Any:
        return lambda _, given: taken.setdefault(name, given[0].detach().clone())

    handles = [model.get_submodule(name).register_forward_pre_hook(take(name)) for name in names]
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return [taken[name] for name in names]


def weights(name: str, model: nn.Module, graph: Graph, recipe: Recipe, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the model of an entrant's weights. Raises `InputError` where it cannot run here."""
    kind, _ = ENTRANTS[name]
    if kind == "bf16":
        return model
    if kind == "fp32":
        return copy.deepcopy(model).float()
    if kind == "ours":
        given = {key: value for key, value in arguments.items() if key != "return_dict"}
        return quantize_recorded(model, recipe, calls=[given])
    if reason := missing(name, next(model.parameters()).device):
        raise InputError(reason)
    return _torchao(name, copy.deepcopy(model), graph)


def entrant(
    name: str, model: nn.Module, graph: Graph, arguments: Mapping[str, Any], inputs: Sequence[torch.Tensor]
) -> Entrant:
    """Return an entrant with compiled blocks, or an eager one. Compilation happens in its first calls."""
    kind, options = ENTRANTS[name]
    device = inputs[0].device
    if kind == "fp32":
        arguments, inputs = mapped(dict(arguments), _in_fp32), [x.float() for x in inputs]
    linears: nn.Module = Linears(model, graph)
    blocks = [model.get_submodule(block.prefix) for block in graph.blocks]
    compiled = _compiled([*blocks, linears], options)

    @torch.no_grad()
    def call() -> Any:
        with _in_use(compiled):
            found = model(**arguments)
            synchronise(device)
        return found

    @torch.no_grad()
    def alone() -> Any:
        with _in_use(compiled):
            found = linears(*inputs)
            synchronise(device)
        return found

    return Entrant(name, call, alone)


def _in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _compiled(parts: Sequence[nn.Module], options: Mapping[str, Any] | None) -> dict[nn.Module, Any]:
    """Return the compiled call of every part; nothing for an eager entrant."""
    if options is None:
        return {}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    given = {"options": dict(options)} if options else {}
    made = {}
    for part in parts:
        part.compile(dynamic=False, fullgraph=True, **given)
        made[part] = part._compiled_call_impl
        part._compiled_call_impl = None  # set while the entrant runs: an eager one has the same model
    return made


@contextmanager
def _in_use(compiled: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let modules run compiled for the time of a block."""
    for module, call in compiled.items():
        module._compiled_call_impl = call
    try:
        yield
    finally:
        for module in compiled:
            module._compiled_call_impl = None


def _torchao(name: str, model: nn.Module, graph: Graph) -> nn.Module:
    """Quantize by torchao, in place, the layers that ours quantizes with their inputs."""
    with quiet():
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )

        names = {name for block in graph.blocks for linear in block.linears for name in linear.modules}
        if name == "torchao-fp8":
            config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        else:
            config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        quantize_(model, config, lambda _, path: path in names)
    return model
