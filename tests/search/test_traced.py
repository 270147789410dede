"""Solving traced models: outliers, rotation, static grids where they are as good, and layers that fall back."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO

from tqdit.architectures.traced_graph import trace
from tqdit.artifact.model_card import model_card
from tqdit.calibration import replay
from tqdit.calibration.calls import Calls
from tqdit.calibration.records import LinearRecord, Records
from tqdit.calibration.statistics import RangeStats
from tqdit.graph import Block, Graph, Linear, Operand
from tqdit.ops.rotation import rotate
from tqdit.plan import plan
from tqdit.provenance import Provenance
from tqdit.quality.metrics import sqnr_db
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.search import linears, objectives, second_order
from tqdit.search.direct import direct_solution
from tqdit.search.linears import LinearProblem, LinearSolution
from tqdit.search.solver import solve
from tqdit.spec import Grid, Role, Solution

FLUX = ZOO["FluxTransformer2DModel"]
TINY: dict[str, Any] = {"rows": 96, "groups": 2, "candidates": 10}
CHANNELS, OUT, ROWS = 256, 96, 512


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# One layer -----------------------------------------------------------------------------------------------------------


def problem(x: torch.Tensor, weight: torch.Tensor, bits: str = "w8a8", **settings: Any) -> LinearProblem:
    """A layer whose input is quantized apart, with records of its rows in two time groups."""
    recipe = Recipe("plus", bits, **{"hessian": "none", "candidates": 10, **settings})
    source = Operand("x", Role.INPUT, quantized_by_row=True, apart=True)
    graph = Graph((Block("b", (Linear(source, ("b.fc",)),)),), (), {"b.fc.weight": weight.shape})
    planned, ones = plan(graph, recipe, 2), torch.ones(len(x))
    group = (torch.arange(len(x)) >= len(x) // 2).long()
    ends = [torch.stack([getattr(x[group == g].float(), end)(0) for g in (0, 1)]) for end in ("amin", "amax")]
    channels = RangeStats(*ends)
    return LinearProblem(
        planned["x"], LinearRecord(x, group, ones, ones), channels.over_units(),
        channels if planned["x"].channels else None, [planned["b.fc.weight"].spec], [weight], None,
        recipe,
    )  # fmt: skip


def outputs(solved: LinearSolution) -> torch.Tensor:
    return solved.activation.fake() @ (solved.codes.float() * solved.weight_scale[:, None]).t()


def sqnr(asked: LinearProblem) -> float:
    return sqnr_db(asked.record.x @ asked.weights[0].t(), outputs(linears.solve(asked)))


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
def test_outlier_channels_cost_nothing(scale: float, rounding: str) -> None:
    """Channels 1,000 or 10,000 times as large as the others, with weights that leave them the same share of outputs."""
    x, weight = normal(ROWS, CHANNELS), normal(OUT, CHANNELS, seed=1)
    large, small = x.clone(), weight.clone()
    large[:, [3, 77]] *= scale
    small[:, [3, 77]] /= scale
    before, after = (sqnr(problem(*pair, rounding=rounding)) for pair in ((x, weight), (large, small)))
    assert after > before - 1
    assert sqnr(problem(large, small, rounding=rounding, input_channels="one")) < 3


def test_outliers_whose_weights_are_as_large_as_others() -> None:
    x, weight = normal(ROWS, CHANNELS), normal(OUT, CHANNELS, seed=1)
    before = sqnr(problem(x, weight))
    for scale in (1e3, 1e4):
        large = x.clone()
        large[:, [3, 77]] *= scale
        assert sqnr(problem(large, weight)) > before - 1


def test_relative_weights_protect_the_rows_of_other_tokens() -> None:
    """One row in a hundred is 10,000 times as large: second-order rounding for its error alone would spoil the rest."""
    x, weight = normal(ROWS, CHANNELS), normal(OUT, CHANNELS, seed=1)
    x[::100, [3, 77]] *= 1e4
    others = torch.arange(ROWS) % 100 != 0
    found = {}
    for errors in (None, linears.relative_weights(x, [weight])):
        solved = linears.solve(replace(problem(x, weight), error_weights=errors))
        found[errors is None] = sqnr_db((x @ weight.t())[others], outputs(solved)[others])
    assert found[False] > 39
    assert found[True] < found[False] - 3


def test_rotated_layers_compute_the_same_product() -> None:
    x, weight = normal(ROWS, CHANNELS), normal(OUT, CHANNELS, seed=1)
    x[:, 9] *= 50
    asked = problem(x, weight, rotation=256, input_channels="one")
    solved = linears.solve(asked)
    assert solved.activation.spec.grid is Grid.ROW
    assert torch.equal(solved.activation.values, rotate(x, 256))
    restored = rotate(solved.codes.float() * solved.weight_scale[:, None], 256)
    assert sqnr_db(weight, restored) > 35
    plain = problem(x, weight, input_channels="one")
    assert sqnr(asked) > sqnr(plain) + 6


@pytest.mark.parametrize("rows_differ", [True, False])
def test_a_static_scale_is_kept_where_it_is_as_good(rows_differ: bool) -> None:
    x, weight = normal(ROWS, CHANNELS).clamp(-2, 2), normal(OUT, CHANNELS, seed=1)
    x[:, 0] = 2  # every row has the same largest magnitude
    x = x * (torch.logspace(0, -2, ROWS)[:, None] if rows_differ else 1.0)
    asked = problem(x.abs(), weight, input_grid="best", input_channels="one")  # a zero point is worth a bit here
    spec = linears.solve(asked).activation.spec
    assert spec.grid is (Grid.ROW if rows_differ else Grid.UNIFORM)
    assert spec.groups == (1 if rows_differ else 2)
    losses = [linears._Attempt(asked, tried, None).loss for tried in asked.site.tried]
    assert (losses[0] <= losses[1]) is not rows_differ


def test_inputs_and_weights_in_bf16_are_solved_in_fp32() -> None:
    x, weight = normal(ROWS, CHANNELS).bfloat16(), normal(OUT, CHANNELS, seed=1).bfloat16()
    half, whole = linears.solve(problem(x, weight)), linears.solve(problem(x.float(), weight.float()))
    assert torch.equal(half.codes, whole.codes)
    assert torch.equal(half.weight_scale, whole.weight_scale)
    assert half.sqnr == whole.sqnr


def test_the_measure_of_the_fallback_says_what_inputs_cost() -> None:
    x, weight = normal(ROWS, CHANNELS), normal(OUT, CHANNELS, seed=1)
    fine, coarse = (linears.solve(problem(x, weight, bits)).sqnr for bits in ("w8a8", "w3a8"))
    assert fine == pytest.approx(coarse)
    assert 38 < fine < 43
    assert linears.solve(problem(x, weight, fallback=0.0)).sqnr is None
    exact = torch.ones(4, 8)
    assert objectives.sqnr_db(exact, exact) == math.inf


@pytest.mark.parametrize("bits", [3, 8])
def test_parts_of_a_weight_have_the_same_codes(bits: int, monkeypatch) -> None:
    """Rows are rounded in as many parts as the workspace asks for."""
    weight, x = normal(100, 48), normal(300, 48, seed=1)
    hessian = second_order.hessian(x)
    whole = second_order.scaled_codes(weight, hessian, bits, linears.SHARES)
    monkeypatch.setattr(second_order, "WORKSPACE", 7 * 48 * second_order.ROW_BYTES)
    calls: list[int] = []
    original = second_order._scaled_codes

    def counted(part: torch.Tensor, *arguments: Any) -> Any:
        calls.append(len(part))
        return original(part, *arguments)

    monkeypatch.setattr(second_order, "_scaled_codes", counted)
    parts = second_order.scaled_codes(weight, hessian, bits, linears.SHARES)
    assert sum(calls) == 100
    assert max(calls) <= 7
    assert all(map(torch.equal, whole, parts))


# A model -------------------------------------------------------------------------------------------------------------


def spoiled(model: nn.Module, name: str) -> nn.Module:
    """A copy in which one layer's input has a large mean, which its weights cancel: integers see nothing else."""
    changed = copy.deepcopy(model)
    layer = changed.get_submodule(name)
    layer.weight -= layer.weight.mean(1, keepdim=True)
    layer.register_forward_pre_hook(lambda _, args: (args[0] + 1000,))
    return changed


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return FLUX.build().requires_grad_(False)


@pytest.fixture(scope="module")
def flux_calls(flux) -> Calls:
    return Calls.of(flux, [{**FLUX.call(s, 1), "timestep": torch.full((1,), 0.2 + 0.2 * s)} for s in range(4)])


@pytest.fixture(scope="module")
def flux_graph(flux) -> Graph:
    return trace(flux, FLUX.call(batch=1), "timestep")


@pytest.fixture(scope="module")
def flux_records(flux, flux_graph, flux_calls) -> Records:
    return replay.record(flux, flux_graph, flux_calls, flux_calls.time_groups(2), Recipe("plus", **TINY))


def solved(model: nn.Module, graph: Graph, records: Records, bits: str = "w8a8", **settings: Any) -> Solution:
    assert records.time_groups is not None
    recipe = Recipe("plus", bits, **{**TINY, **settings})
    provenance = Provenance(recipe=recipe.model_dump(mode="json"))
    return solve(model, records, recipe, records.time_groups, provenance, graph=graph)


@pytest.mark.parametrize(
    "settings",
    [
        {"rotation": 256},
        {"input_grid": "best", "input_channels": "one"},
        {"rounding": "nearest", "hessian": "none"},
    ],
)
def test_a_traced_model_is_solved_and_runs(flux, flux_graph, flux_records, flux_calls, settings: dict) -> None:
    solution = solved(flux, flux_graph, flux_records, **settings)
    assert list(solution.params) == list(plan(flux_graph, Recipe("plus", **TINY, **settings), 2))
    assert solution.graph == flux_graph
    assert solution.notes == {}
    assert {*solution.codes, *solution.floats} == set(flux.state_dict())
    arguments = flux_calls[1].to("cpu")
    with torch.no_grad():
        expected, found = (m(**arguments).sample for m in (flux, convert(solution, "reference", "cpu", torch.float32)))
    assert sqnr_db(expected, found) > 30
    rotated = {params.rotation for params in solution.params.values()}
    assert rotated == ({0, 256} if "rotation" in settings else {0})


@pytest.mark.parametrize("rotation", [0, 128])
def test_a_solution_without_records_is_that_of_the_same_recipe(flux, flux_graph, flux_records, rotation: int) -> None:
    """A recipe that needs no records gets the same scales and codes with them."""
    recipe = Recipe("dynamic", **TINY, rotation=rotation)
    direct = direct_solution(flux, flux_graph, recipe, Provenance())
    assert flux_records.time_groups is not None
    with_records = solve(flux, flux_records, recipe, flux_records.time_groups, Provenance(), graph=flux_graph)
    layers = {name for name, params in direct.params.items() if params.spec.role is not Role.WEIGHT_ONLY}
    assert {direct.params[name].rotation for name in layers} == {0, rotation}
    for name in layers:
        first, second = direct.params[name], with_records.params[name]
        assert (first.spec, first.rotation) == (second.spec, second.rotation)
        assert torch.equal(first.scale, second.scale)
    for name in layers & set(direct.codes):
        assert torch.equal(direct.codes[name], with_records.codes[name])


def test_the_same_records_give_the_same_solution(flux, flux_graph, flux_records) -> None:
    first, second = (solved(flux, flux_graph, flux_records) for _ in range(2))
    assert all(torch.equal(codes, second.codes[name]) for name, codes in first.codes.items())
    assert all(torch.equal(p.scale, second.params[name].scale) for name, p in first.params.items())


def test_floats_keep_the_dtype_of_the_model(flux, flux_graph, flux_calls) -> None:
    model = copy.deepcopy(flux).bfloat16()
    records = replay.record(model, flux_graph, flux_calls, flux_calls.time_groups(2), Recipe("plus", **TINY))
    solution = solved(model, flux_graph, records)
    assert {tensor.dtype for tensor in solution.floats.values()} == {torch.bfloat16}
    assert {p.scale.dtype for p in solution.params.values()} == {torch.float32}
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in solution.floats.items())


@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
def test_a_layer_that_integers_spoil_takes_float_inputs(flux, flux_graph, flux_calls, rounding: str) -> None:
    block = flux_graph.blocks[0]
    linear = next(linear for linear in block.linears if len(linear.modules) == 1)
    site, weight = linear.source.name, linear.weights[0]
    model = spoiled(flux, linear.modules[0])
    recipe = Recipe("plus", **TINY, rounding=rounding)
    records = replay.record(model, flux_graph, flux_calls, flux_calls.time_groups(2), recipe)
    kept = solved(model, flux_graph, records, "w4a8", rounding=rounding, fallback=0.0)
    assert site in kept.params
    assert kept.notes == {}

    solution = solved(model, flux_graph, records, "w4a8", rounding=rounding)
    assert site not in solution.params
    assert set(solution.params) == set(kept.params) - {site}
    spec = solution.params[weight].spec
    assert (spec.role, spec.bits) == (Role.WEIGHT_ONLY, 6)
    assert solution.graph is not None
    moved = solution.graph.blocks[0]
    assert moved.float_input == (*block.float_input, *linear.modules)
    assert linear not in moved.matmuls
    assert list(solution.params) == list(plan(solution.graph, recipe, 2))
    note = solution.notes[site]
    share = records.tokens[site] * math.prod(flux_graph.features(linear))
    total = sum(
        records.tokens[one.source.name] * math.prod(flux_graph.features(one))
        for each in flux_graph.blocks for one in each.linears
    )  # fmt: skip
    assert f"{share / total:.1%} of the linear layers' arithmetic" in note
    values = solution.codes[weight] * solution.params[weight].scale[0][:, None]
    assert sqnr_db(model.state_dict()[weight], values) > 20
    assert convert(solution, "reference", "cpu", torch.float32) is not None
    noted = replace(solution, notes={**solution.notes, "fisher": "not made"})  # which is of no layer
    assert "| on float inputs after all | 1 |" in model_card(noted, "FLUX", 1)
    assert "after all" not in model_card(replace(kept, notes={"fisher": "not made"}), "FLUX", 1)


def test_notes_of_the_records_are_in_the_solution(flux, flux_graph, flux_records) -> None:
    records = replace(flux_records, notes={"fisher": "not made"})
    assert solved(flux, flux_graph, records).notes == {"fisher": "not made"}


def test_without_fisher_weights_rows_count_relative_to_themselves(flux, flux_graph, flux_records, monkeypatch) -> None:
    """They are asked for, but a model was too large."""
    bare = {name: replace(record, fisher=None) for name, record in flux_records.linears.items()}
    asked: list[int] = []
    original = linears.relative_weights
    monkeypatch.setattr(linears, "relative_weights", lambda *given: asked.append(1) or original(*given))
    solved(flux, flux_graph, replace(flux_records, linears=bare))
    assert len(asked) == len(bare)
    solved(flux, flux_graph, replace(flux_records, linears=bare), hessian="none")
    assert len(asked) == len(bare)
