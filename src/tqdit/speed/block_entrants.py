"""Make the entrants of a race of transformer blocks: a float model, ours, and torchao's, each eager or compiled.

The repeated blocks of a model are compiled, not the model: one compilation serves all blocks of a kind, as users of
large models do it.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.calibration.call_values import mapped
from tqdit.errors import InputError
from tqdit.graph import Graph
from tqdit.recipe import Recipe
from tqdit.recorded import quantize_recorded
from tqdit.speed.baselines import (
    AUTOTUNED,
    FAMILIES,
    FP8_OPTIONS,
    RECOMPILE_LIMIT,
    TORCHAO_OPTIONS,
    missing,
    torchao_config,
)
from tqdit.speed.machine import synchronise
from tqdit.speed.quiet import quiet
from tqdit.system.hooks import hooks


class Kind(NamedTuple):
    """The way an entrant runs: its weights, options of torch.compile or None for an eager model, and whether in graphs.

    Entrants of equal weights share a model.
    """

    weights: str
    options: Mapping[str, Any] | None = None
    graphs: bool = False


ENTRANTS: Mapping[str, Kind] = {
    "bf16-eager": Kind("bf16"),
    "bf16-compiled": Kind("bf16", {}),
    "bf16-graphs": Kind("bf16", {}, graphs=True),
    "bf16-autotuned": Kind("bf16", AUTOTUNED),
    "fp32-compiled": Kind("fp32", {}),  # faster than bf16 on processors without bf16 products
    "ours-eager": Kind("ours"),
    "ours-compiled": Kind("ours", {}),
    "ours-graphs": Kind("ours", {}, graphs=True),
    "torchao-int8": Kind("torchao-int8", TORCHAO_OPTIONS),
    "torchao-fp8": Kind("torchao-fp8", {**TORCHAO_OPTIONS, **FP8_OPTIONS}),
}
OURS = ("ours-eager", "ours-compiled", "ours-graphs")
BFLOAT16 = ("bf16-eager", "bf16-compiled", "bf16-graphs")
FLOATS = (*BFLOAT16, "bf16-autotuned")
DEFAULT = (*BFLOAT16, "torchao-int8", "torchao-fp8")  # whom ours is compared with
CHAIN = 4  # times that a part of a model runs on a GPU before the GPU is waited for, as it would in a deep model
CAPTURE_CALLS = 3  # before a part is captured as a CUDA graph


def rivals(names: Sequence[str]) -> tuple[str, ...]:
    """Return the entrants that are meant by names or by the families "bfloat16" and "torchao".

    Raises `InputError` naming an unknown one, and one that only artifacts and DiT shapes are compared with.
    """
    known = [name for name in ENTRANTS if name not in OURS]
    families = {"bfloat16": list(BFLOAT16), "torchao": [name for name in known if name.startswith("torchao")]}
    here = ", ".join([*families, *known])
    for name in (name for name in names if name not in (*known, *families)):
        if name in (*FAMILIES, *itertools.chain(*FAMILIES.values())):
            raise InputError(f"baseline '{name}' is for artifacts and DiT shapes; for published models: {here}")
        raise InputError(f"unknown baseline '{name}'; known: {here}")
    return tuple(name for name in known if name in names or any(name in families.get(given, ()) for given in names))


@dataclass(frozen=True)
class Entrant:
    """A participant of a race. Each of `parts` runs a part of the model and waits for the device."""

    name: str
    parts: Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Inputs:
    """The inputs that a call of the float model gives to `first_linears`, and to the first block of each kind.

    `blocks`: path of a list of blocks -> arguments and keyword arguments.
    """

    linears: Sequence[torch.Tensor]
    blocks: Mapping[str, tuple[tuple[Any, ...], Mapping[str, Any]]]

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Inputs":
        """Return the inputs with every tensor changed."""
        blocks = {
            path: (tuple(mapped(value, change) for value in given), mapped(dict(named), change))
            for path, (given, named) in self.blocks.items()
        }
        return Inputs([change(x) for x in self.linears], blocks)


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


def first_blocks(graph: Graph) -> dict[str, Any]:
    """Return the first block of each kind by the path of its list."""
    kinds: dict[str, Any] = {}
    for block in graph.blocks:
        kinds.setdefault(block.prefix.rpartition(".")[0], block)
    return kinds


def first_linears(graph: Graph) -> list[Any]:
    """Return the linear layers, by input, of the first block of each kind."""
    return [linear for block in first_blocks(graph).values() for linear in block.linears]


def inputs_of(model: nn.Module, graph: Graph, arguments: Mapping[str, Any]) -> Inputs:
    """Return the inputs that a call of the float model gives to its parts."""
    taken: dict[str, Any] = {}
    linears = [linear.modules[0] for linear in first_linears(graph)]
    blocks = {path: block.prefix for path, block in first_blocks(graph).items()}

    def take(name: str) -> Any:
        return lambda _, given, named: taken.setdefault(name, (given, named))

    with hooks() as keep, torch.no_grad():
        for name in {*linears, *blocks.values()}:
            keep(model.get_submodule(name).register_forward_pre_hook(take(name), with_kwargs=True))
        model(**arguments)
    found = Inputs([taken[name][0][0] for name in linears], {path: taken[name] for path, name in blocks.items()})
    return found.mapped(lambda tensor: tensor.detach().clone())


def weights(name: str, model: nn.Module, graph: Graph, recipe: Recipe, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the model of an entrant's weights. Raises `InputError` where it cannot run here."""
    kind = ENTRANTS[name].weights
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


def entrant(name: str, model: nn.Module, graph: Graph, arguments: Mapping[str, Any], inputs: Inputs) -> Entrant:
    """Return an entrant with compiled blocks, or an eager one. Compilation happens in its first calls.

    Its parts are "call", a call of the whole model; "linears", `first_linears` alone; and the path of each list of
    blocks, the first of them alone. With CUDA graphs, whose capture compiles, there is no "call".
    """
    kind, device = ENTRANTS[name], inputs.linears[0].device
    if kind.weights == "fp32":
        arguments, inputs = mapped(dict(arguments), _in_fp32), inputs.mapped(_in_fp32)
    linears: nn.Module = Linears(model, graph)
    firsts = {path: model.get_submodule(block.prefix) for path, block in first_blocks(graph).items()}
    blocks = [model.get_submodule(block.prefix) for block in graph.blocks]
    compiled = _compiled([*(firsts.values() if kind.graphs else blocks), linears], kind.options)
    runs: dict[str, Callable[[], Any]] = {"linears": lambda: linears(*inputs.linears)}
    for path, block in firsts.items():
        given, named = inputs.blocks[path]
        runs[path] = functools.partial(block, *given, **named)

    def part(run: Callable[[], Any], times: int) -> Callable[[], Any]:
        @torch.no_grad()
        def repeated() -> Any:
            with _in_use(compiled):
                for _ in range(times):
                    found = run()
                synchronise(device)
            return found

        return repeated

    if kind.graphs:
        with _in_use(compiled), torch.no_grad():
            runs = {path: captured(run) for path, run in runs.items()}
        return Entrant(name, {path: part(run, CHAIN) for path, run in runs.items()})
    parts = {path: part(run, chain(device)) for path, run in runs.items()}
    return Entrant(name, {"call": part(lambda: model(**arguments), 1), **parts})


def chain(device: torch.device) -> int:
    """Return how often a part runs before the device is waited for; a CPU is never ahead."""
    return CHAIN if device.type == "cuda" else 1


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of a function, which reads the same tensors each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
    names = {name for block in graph.blocks for linear in block.linears for name in linear.modules}
    with quiet():
        from torchao.quantization import quantize_

        quantize_(model, torchao_config(name), lambda _, path: path in names)
    return model
