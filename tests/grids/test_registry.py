"""Grids as objects: one for each name, and another one that is made known and used end to end."""

import copy
import json
import pickle

import pytest
import torch

from tqdit.errors import InputError
from tqdit.grids import kind, uniform
from tqdit.grids.kind import Grid, known, register
from tqdit.ops import quantizer, reference, tables
from tqdit.ops.schema import Activation, OperandParams, WeightParams
from tqdit.spec import GridParams, Role, SiteSpec

NAMES = ["uniform", "row", "softmax_row", "mrq_softmax", "mrq_gelu"]


def test_there_is_one_object_for_each_name() -> None:
    assert [str(grid) for grid in known()] == NAMES
    assert list(known()) == [Grid.UNIFORM, Grid.ROW, Grid.SOFTMAX_ROW, Grid.MRQ_SOFTMAX, Grid.MRQ_GELU]
    for grid in known():
        assert Grid(str(grid)) is grid
        assert Grid(grid) is grid


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_the_same_object(name: str) -> None:
    grid = Grid(name)
    spec = SiteSpec("s", Role.GELU, 8, grid)
    assert copy.deepcopy(spec).grid is grid
    assert copy.copy(grid) is grid
    assert pickle.loads(pickle.dumps(spec)).grid is grid


def test_a_grid_is_written_as_its_name() -> None:
    assert json.dumps({"grid": Grid.MRQ_GELU}) == '{"grid": "mrq_gelu"}'
    assert f"{Grid.UNIFORM}" == str(Grid.UNIFORM) == "uniform"


@pytest.mark.parametrize("name", ["", "Uniform", "log2", "mrq"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown grid '{name}'; known: {', '.join(NAMES)}"):
        Grid(name)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(InputError, match="there is a grid 'uniform' already"):
        register(uniform.Uniform("uniform"))
    assert Grid("uniform") is Grid.UNIFORM


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_of_scales(name: str) -> None:
    spec = SiteSpec("s", Role.GELU, 8, Grid(name), groups=3, units=2)
    assert spec.scale_shape == ((3, 2, 2) if name.startswith("mrq") else (3, 2))
    assert spec.has_zero_point is (name == "uniform")
    assert not SiteSpec("w", Role.WEIGHT, 8).has_zero_point


# A grid of one's own -------------------------------------------------------------------------------------------------


class PowerOfTwo(uniform.Uniform):
    """A uniform grid whose steps are powers of two, and whose codes are rounded down."""

    label = "powers of two"

    def initial(self, low, high, bits, site, merging=False):
        magnitude = torch.maximum(high, -low) / (2 ** (bits - 1) - 1)
        return 2.0 ** magnitude.log2().ceil(), torch.zeros_like(low, dtype=torch.int32)

    def candidates(self, base, current, steps, bits, merging=False):
        return [torch.stack([base / 2, base, base * 2])]

    def quantize(self, x, scale, coarse, zero_point, bits):
        half = 2 ** (bits - 1)
        return (torch.floor(x.float() / scale) + zero_point).clamp(-half, half - 1).to(torch.int8)

    fake_quantize = Grid.fake_quantize


class Mirrored(PowerOfTwo):
    """Two regions by sign; negative values have steps four times as large."""

    label = "mirrored"
    two_region = True

    def initial(self, low, high, bits, site, merging=False):
        step, zero = super().initial(low, high, bits, site)
        return torch.stack([step * 4, step], -1), zero

    def quantize(self, x, scale, coarse, zero_point, bits):
        half = 2 ** (bits - 1)
        return torch.round(x.float() / torch.where(x < 0, scale, coarse)).clamp(-half, half - 1).to(torch.int8)

    def dequantize(self, codes, scale, coarse, zero_point):
        return codes.float() * torch.where(codes < 0, scale, coarse)


@pytest.fixture(params=[PowerOfTwo, Mirrored])
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Grid:
    monkeypatch.setattr(kind, "_KINDS", dict(kind._KINDS))
    return register(request.param("own"))


def solved(grid: Grid, x: torch.Tensor, bits: int) -> tuple[GridParams, OperandParams]:
    """Parameters of x (B, N, C) from its range, one for all samples."""
    spec = SiteSpec("s", Role.INPUT, bits, Grid("own"))
    assert spec.grid is grid
    scale, zero_point = grid.initial(x.amin().reshape(1, 1), x.amax().reshape(1, 1), bits, "s")
    assert scale.shape == spec.scale_shape
    params = GridParams(spec, scale, zero_point if spec.has_zero_point else None)
    assert not params.merged
    return params, tables.operand(params)


@pytest.mark.parametrize("bits", [6, 8])
def test_an_own_grid_runs_on_the_reference(own: Grid, bits: int) -> None:
    """From values to codes, to values, and through products whose accumulators are integers."""
    backend, x = reference.Reference(), torch.randn(2, 5, 16)
    params, operand = solved(own, x, bits)
    codes = backend.quantize(x, operand)
    assert codes.dtype is torch.int8
    assert codes.unique().numel() > 2 ** (bits - 3)
    values = quantizer.dequantize(codes, operand)
    assert (values - x).abs().max() <= params.scale.max()
    weight = WeightParams(torch.randint(-128, 128, (12, 16), dtype=torch.int8), torch.rand(12) + 0.1, 8)
    y = backend.linear(codes, operand, backend.prepare(weight, None))
    expected = values.double() @ (weight.codes.double() * weight.scale[:, None].double()).t()
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    _, target = solved(own, torch.nn.functional.gelu(y, approximate="tanh"), bits)
    coded = backend.linear(codes, operand, backend.prepare(weight, None), Activation(target))
    assert torch.equal(coded, quantizer.quantize(torch.nn.functional.gelu(y, approximate="tanh"), target))


def test_an_own_grid_is_stored_by_its_name(own: Grid) -> None:
    spec = SiteSpec("s", Role.INPUT, 8, own)
    assert pickle.loads(pickle.dumps(spec)).grid is own
    assert json.dumps(own) == '"own"'


@pytest.mark.parametrize("name", NAMES)
def test_objects_compile_in_one_graph(name: str) -> None:
    """As they are used in a block: taken from an operand, which a module has."""
    grid, x = Grid(name), torch.rand(2, 3, 8)
    scale = torch.tensor([[[0.004, 0.05]]]) if grid.two_region else torch.tensor([[0.01]])
    operand = tables.operand(GridParams(SiteSpec("s", Role.GELU, 8, grid), scale))

    def round_trip(x: torch.Tensor) -> torch.Tensor:
        y = quantizer.dequantize(quantizer.quantize(x, operand), operand)
        return y * 2 if operand.two_products else y

    compiled = torch.compile(round_trip, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), round_trip(x))
