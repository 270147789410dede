"""Traced models under torch.compile: one graph, for all timesteps, with the codes of a shared input made once."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified
from zoo import ZOO

import tqdit
from tqdit.layers.quantized import QuantizedLinear
from tqdit.quality.metrics import sqnr_db

DIT, WAN = "DiTTransformer2DModel", "WanTransformer3DModel"
WITHOUT = ("ZImageTransformer2DModel",)  # diffusers' own code breaks its graph
STATIC = {
    "input_grid": "uniform", "groups": 2, "samples": 2, "rounds": 0, "hessian": "none", "fallback": 0.0, "rotation": 0,
    "rounding": "nearest",
}  # fmt: skip


def run(model: nn.Module, name: str, timestep: torch.Tensor | None = None) -> torch.Tensor:
    entry = ZOO[name]
    call = entry.call() if timestep is None else {**entry.call(), entry.timestep: timestep}
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def quantized(name: str, grid: str = "row", **changed: Any) -> nn.Module:
    entry = replace(ZOO[name], config={**ZOO[name].config, **changed})
    if grid == "row":
        return tqdit.quantize(entry.build(), tqdit.Recipe("dynamic"), calls=[entry.call()])
    times = entry.call()[entry.timestep]
    calls = [{**entry.call(i), entry.timestep: (times * f).to(times.dtype)} for i, f in enumerate((0.2, 0.8, 1.2, 1.8))]
    return tqdit.quantize(entry.build(), tqdit.Recipe("plus", **STATIC), calls=calls)


class Backend:
    """aot_eager, which counts the operators of every graph that it is given."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1

        def counted(lowered: Any, _: Any) -> Any:
            names = (getattr(node.target, "__name__", "") for node in lowered.graph.nodes if node.op == "call_function")
            self.operators.update(name.split(".")[0] for name in names)
            return lowered

        return aot_module_simplified(graph, inputs, fw_compiler=counted)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def sources(model: nn.Module) -> tuple[int, int]:
    """The number of sources, and of layers that read them."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.source is not None]
    return len({id(layer.source) for layer in layers}), len(layers)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["row", "uniform"])
def test_one_graph_for_all_timesteps(grid: str) -> None:
    model, backend = quantized(DIT, grid, num_layers=1), Backend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for times in ([500, 500], [90, 90], [910, 910], [100, 900]):
        t = torch.tensor(times)
        assert sqnr_db(run(model, DIT, t), run(compiled, DIT, t)) > 60
    assert backend.graphs == 1
    inputs, readers = sources(model)
    assert backend.operators["quantize_rows" if grid == "row" else "quantize"] == inputs
    assert backend.operators["linear"] == readers > inputs


@pytest.mark.slow
def test_repeated_blocks() -> None:
    model = quantized(WAN)
    compiled, backend = copy.deepcopy(model), Backend()
    compiled.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert sqnr_db(run(model, WAN), run(compiled, WAN)) > 60
    assert backend.graphs == 1  # for all blocks
    assert not [module for module in compiled.modules() if getattr(module, "_in_graph", None) is not None]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ZOO if name not in WITHOUT])
def test_every_class(name: str) -> None:
    model, backend = quantized(name), Backend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert sqnr_db(run(model, name), run(compiled, name)) > 60
    assert backend.operators["quantize_rows"] == sources(model)[0]


@pytest.mark.long
def test_inductor() -> None:
    model = quantized(DIT, "uniform")
    compiled = torch.compile(model, fullgraph=True)
    for times in ([500, 500], [100, 900]):
        assert sqnr_db(run(model, DIT, torch.tensor(times)), run(compiled, DIT, torch.tensor(times))) > 50
    assert counters["stats"]["unique_graphs"] == 1
