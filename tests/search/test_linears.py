"""Layers solved together with their input: rounding, channel factors, rows, and the codes that follow from them."""

import weakref
from dataclasses import replace

import pytest
import torch

from tqdit.architectures.registry import config_of, graph
from tqdit.calibration.records import channels_of
from tqdit.calibration.statistics import RangeStats
from tqdit.ops import quantizer, tables
from tqdit.provenance import Provenance
from tqdit.search import linears
from tqdit.search.linears import BALANCING
from tqdit.search.solver import solve
from tqdit.spec import Grid, Role
from tqdit.timegroups import TimeGroups

GROUPS = TimeGroups.uniform(0, 1000, 4)
FC2 = "transformer_blocks.1.ff.fc2_input"
WEIGHT = "transformer_blocks.1.ff.net.2.weight"


def output_error(model, records, solution, source: str, weights: tuple[str, ...]) -> float:
    """The squared error of the outputs of a site's layers on its records, relative to the outputs."""
    record, params = records.linears[source], solution.params[source]
    operand = tables.operand(params)._replace(group=record.group if params.spec.groups > 1 else None)
    x = quantizer.dequantize(quantizer.quantize(record.x[:, None], operand), operand)[:, 0]
    error = total = 0.0
    for name in weights:
        w = model.state_dict()[name]
        coded = solution.codes[name] * solution.params[name].scale[0][:, None]
        error += float((x @ coded.t() - record.x @ w.t()).square().sum())
        total += float((record.x @ w.t()).square().sum())
    return error / total


def each_linear(model):
    return [(linear.source.name, linear.weights) for b in graph(config_of(model)).blocks for linear in b.linears]


@pytest.mark.parametrize("hessian", ["none", "published"])
@pytest.mark.parametrize("bits", ["w4a8", "w3a8"])
def test_second_order_rounding_lowers_the_error_of_outputs(model, records, solved, bits: str, hessian: str) -> None:
    """At few bits, where rounding decides, for all layers together."""
    settings = {"hessian": hessian, "gelu_channels": "one", "mix": 0.0}
    nearest, second = (solved("plus", bits, rounding=rounding, **settings) for rounding in ("nearest", "second_order"))
    errors = [
        sum(output_error(model, records, found, *linear) for linear in each_linear(model))
        for found in (nearest, second)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
def test_every_code_and_scale_is_usable(solved, rounding: str) -> None:
    solution = solved("plus", "w4a6", rounding=rounding, gelu_grid="mrq")
    for name, codes in solution.codes.items():
        params = solution.params[name]
        assert codes.dtype is torch.int8
        assert params.spec.format.qmin <= codes.min()
        assert codes.max() <= params.spec.format.qmax
        assert torch.isfinite(params.scale).all()
        assert (params.scale > 0).all()


def test_rows_of_inputs_have_one_fraction_and_no_groups(solved) -> None:
    for params in solved("plus", attended_grid="row", gelu_grid="row").params.values():
        if params.spec.grid is Grid.ROW:
            assert params.scale.shape == (1, 1)
            assert 0.7 / 127 * 0.999 <= params.scale.item() <= 1 / 127 * 1.001
        if params.spec.grid is Grid.SOFTMAX_ROW:
            assert params.scale.item() == pytest.approx(1 / 255)


def test_rows_are_closer_than_a_static_scale_where_rows_differ(model, records, solved, tiny_recipe) -> None:
    """Rows of one group that are a hundred times smaller than others."""
    source, weights = "transformer_blocks.0.ff.fc1_input", ("transformer_blocks.0.ff.net.0.proj.weight",)
    record = records.linears[source]
    x = record.x * torch.where(torch.arange(len(record.x)) % 2 == 0, 1.0, 0.01)[:, None]
    changed = {**records.linears, source: replace(record, x=x)}
    doctored = replace(records, linears=changed)
    small = replace(doctored, linears={source: replace(record, x=x[1::2], group=record.group[1::2])})
    errors = []
    for grid in ("uniform", "row"):
        recipe = tiny_recipe("plus", input_grid=grid, hessian="none")
        solution = solve(model, doctored, recipe, GROUPS, Provenance())
        errors.append(output_error(model, small, solution, source, weights))
    assert errors[1] < errors[0] / 100


def test_without_rounds_weights_keep_their_min_max_scales(model, solved) -> None:
    for rounding in ("nearest", "second_order"):
        solution = solved("plus", "w4a8", rounds=0, rounding=rounding, gelu_channels="one")
        for name, codes in solution.codes.items():
            weight, bits = model.state_dict()[name].flatten(1), solution.params[name].spec.bits
            expected = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
            assert torch.allclose(solution.params[name].scale[0], expected), (rounding, name, codes.shape)


def test_few_attempts_are_in_memory_at_a_time(model, records, tiny_recipe, monkeypatch) -> None:
    """Each holds the inputs, weights and outputs of its layers. A loop has the best, the last and the next one."""
    alive: weakref.WeakSet[linears._Attempt] = weakref.WeakSet()
    most: list[int] = []
    original = linears._Attempt.__init__

    def counted(self, *arguments) -> None:
        alive.add(self)
        most.append(len(alive))
        original(self, *arguments)

    monkeypatch.setattr(linears._Attempt, "__init__", counted)
    doctored = with_large_channels(records, slice(0, 8), 30.0)
    solve(model, doctored, tiny_recipe("plus", hessian="none"), GROUPS, Provenance())
    assert len(most) > 1 + len(BALANCING)
    assert max(most) <= 3


# Channel factors -----------------------------------------------------------------------------------------------------


def with_large_channels(records, which: slice, size: float):
    """Records in which some channels after GELU are larger than the others, in each group alike."""
    record = records.linears[FC2]
    x = torch.rand(record.x.shape, generator=torch.Generator().manual_seed(1))
    x[:, which] *= size
    whole = RangeStats(x.amin().expand(4, 1).clone(), x.amax().expand(4, 1).clone())
    each = RangeStats(x.amin(0).expand(4, -1).clone(), x.amax(0).expand(4, -1).clone())
    return replace(
        records, linears={**records.linears, FC2: replace(record, x=x)},
        ranges={**records.ranges, FC2: whole, channels_of(FC2): each},
    )  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
def test_channels_that_differ_get_factors(model, records, tiny_recipe, rounding: str) -> None:
    """The largest factor is 1, and the large channels have the small ones; the product comes closer."""
    doctored = with_large_channels(records, slice(0, 8), 30.0)
    errors = []
    for choice in ("one", "best"):
        recipe = tiny_recipe("plus", gelu_channels=choice, hessian="none", rounding=rounding)
        solution = solve(model, doctored, recipe, GROUPS, Provenance())
        errors.append(output_error(model, doctored, solution, FC2, (WEIGHT,)))
    channels = solution.params[FC2].channels
    assert channels is not None
    assert channels.shape == (128,)
    assert channels.dtype is torch.float32
    assert channels.amax() == 1
    assert channels[:8].amax() < channels[8:].amin()
    assert errors[1] < errors[0] / 2


def test_channels_that_are_alike_get_none(model, records, tiny_recipe) -> None:
    doctored = with_large_channels(records, slice(0, 128), 1.0)
    x = torch.ones_like(records.linears[FC2].x) * torch.rand(len(records.linears[FC2].x), 1)
    doctored = replace(doctored, linears={**doctored.linears, FC2: replace(doctored.linears[FC2], x=x)})
    ranges = RangeStats(torch.zeros(4, 128), torch.ones(4, 128))
    doctored = replace(doctored, ranges={**doctored.ranges, channels_of(FC2): ranges})
    solution = solve(model, doctored, tiny_recipe("plus", hessian="none"), GROUPS, Provenance())
    assert solution.params[FC2].channels is None


def test_factors_are_only_after_gelu(solved) -> None:
    for bits in ("w8a8", "w4a6"):
        solution = solved("plus", bits)
        assert {p.spec.role for p in solution.params.values() if p.channels is not None} <= {Role.GELU}
        assert not any(p.channels is not None for p in solved("paper", bits).params.values())
    assert min(BALANCING) > 0  # and no factors at all are tried before these
