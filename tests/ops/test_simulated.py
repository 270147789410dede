"""The simulated twin: outputs of the same codes within the bound of an fp32 sum."""

import pytest
import torch

from tqdit.grids import regions, uniform
from tqdit.grids.registry import known
from tqdit.ops import quantizer, reference, simulated
from tqdit.spec import Grid


def gamma(k: int) -> float:
    """Relative error of an fp32 sum of k products, the roundings of the operands and the epilogue included."""
    return (k + 4) * 2.0**-24


def assert_twins(a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor, k: int) -> None:
    assert ((a.double() - b.double()).abs() <= gamma(k) * magnitude).all()


def test_quantizer_picks_the_grid_and_the_row_of_the_operand(operand, column) -> None:
    x = torch.randn(2, 3, 8)
    _, params = operand(x.shape, lead=2)
    scale, coarse, zero = (column(params, index, 3) for index in range(3))
    codes = uniform.quantize(x, scale, zero.int(), 8)
    assert torch.equal(quantizer.quantize(x, params), codes)
    assert torch.equal(quantizer.dequantize(codes, params), uniform.dequantize(codes, scale, zero.int()))
    for grid in (Grid.MRQ_GELU, Grid.MRQ_SOFTMAX):
        params = params._replace(grid=grid)
        codes = regions.quantize(x, scale, coarse, 8, grid)
        assert torch.equal(quantizer.quantize(x, params), codes)
        assert torch.equal(quantizer.dequantize(codes, params), regions.dequantize(codes, scale, coarse, grid))


def test_each_head_is_quantized_with_its_own_parameters(operand) -> None:
    x = torch.randn(2, 3, 5, 8)
    _, params = operand(x.shape, lead=2, units=3)
    codes = quantizer.quantize(x, params)
    values = quantizer.dequantize(codes, params)
    for head in range(3):
        alone = params._replace(table=params.table[:, head : head + 1])
        assert torch.equal(codes[:, head], quantizer.quantize(x[:, head], alone))
        assert torch.equal(values[:, head], quantizer.dequantize(codes[:, head], alone))


@pytest.mark.parametrize("grid", [grid for grid in known() if not grid.per_row])
@pytest.mark.parametrize("lead", [1, 3])
def test_linear(operand, weight, exact, grid: Grid, lead: int) -> None:
    codes, params = operand((3, 5, 70), grid, lead)
    w, bias = weight(9, 70), torch.randn(9)
    magnitude = exact(codes, params).abs() @ (w.codes.double() * w.scale.double()[:, None]).abs().t()
    a, b = (run.linear(codes, params, w, bias) for run in (reference, simulated))
    assert_twins(a, b, magnitude + bias.double().abs(), 70)


def test_scores(operand, exact) -> None:
    q, q_params = operand((3, 2, 5, 16), lead=3, units=2)
    k, k_params = operand((3, 2, 7, 16), lead=3, units=2)
    a, b = (run.scores(q, q_params, k, k_params, 0.25) for run in (reference, simulated))
    magnitude = exact(q, q_params).abs() @ exact(k, k_params).abs().transpose(-1, -2) * 0.25
    assert_twins(a, b, magnitude, 16)


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_SOFTMAX])
def test_values(operand, exact, grid: Grid) -> None:
    p, p_params = operand((3, 2, 5, 7), grid, lead=3)
    v, v_params = operand((3, 2, 7, 16), lead=3, units=2)
    a, b = (run.values(p, p_params, v, v_params) for run in (reference, simulated))
    assert_twins(a, b, exact(p, p_params).abs() @ exact(v, v_params).abs(), 7)


def test_weight_only_linear(weight) -> None:
    x, w, bias = torch.randn(2, 6, 50), weight(11, 50), torch.randn(11)
    magnitude = x.double().abs() @ (w.codes.double() * w.scale.double()[:, None]).abs().t()
    a, b = (run.weight_only_linear(x, w, bias) for run in (reference, simulated))
    assert_twins(a, b, magnitude + bias.double().abs(), 50)
