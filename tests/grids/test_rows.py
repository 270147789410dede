"""The grids whose step follows from a row's own values: of any activation, and of unnormalized softmax rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqdit.grids import uniform
from tqdit.grids.row import CLIPPING, row_scales
from tqdit.ops import quantizer, tables
from tqdit.ops.schema import RowCodes
from tqdit.spec import Grid, GridParams, Role, SiteSpec

NOTHING = torch.zeros(())
ROUNDING = 1 + 1e-5  # of a step and of a quotient in fp32
SMALLEST = float(np.finfo(np.float32).tiny)


def fraction(bits: int, share: float = 1.0) -> torch.Tensor:
    """The part of a row's largest magnitude that one step is."""
    return torch.tensor(share / (2 ** (bits - 1) - 1))


def row_codes(x: torch.Tensor, bits: int, share: float = 1.0) -> torch.Tensor:
    return Grid.ROW.quantize(x, fraction(bits, share), NOTHING, NOTHING, bits)


def row_values(x: torch.Tensor, bits: int, share: float = 1.0) -> torch.Tensor:
    steps = row_scales(x, fraction(bits, share))
    return Grid.ROW.dequantize(row_codes(x, bits, share), steps, NOTHING, NOTHING)


def softmax_codes(e: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of unnormalized rows, counted from 0."""
    step = torch.tensor(1 / (2**bits - 1))
    return Grid.SOFTMAX_ROW.quantize(e, step, NOTHING, NOTHING, bits).int() + 2 ** (bits - 1)


def softmax_values(e: torch.Tensor, bits: int) -> torch.Tensor:
    step, zero = torch.tensor(1 / (2**bits - 1)), torch.tensor(-(2 ** (bits - 1)))
    codes = Grid.SOFTMAX_ROW.quantize(e, step, NOTHING, zero, bits)
    return Grid.SOFTMAX_ROW.dequantize(codes, step, NOTHING, zero)


# The grid of rows ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=30), st.integers(2, 8))
@settings(max_examples=80, deadline=None)
def test_the_error_is_at_most_half_a_step_of_the_row(values: list[float], bits: int) -> None:
    x = torch.tensor([values])
    largest = max(map(abs, values))
    step = max(largest / (2 ** (bits - 1) - 1), SMALLEST)
    error = (row_values(x, bits).double() - x.double()).abs().max()
    assert error <= step * (0.5 * ROUNDING + 2e-5)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_codes_are_those_of_numpy(values: list[float], bits: int) -> None:
    """Step, quotient and rounding, one fp32 operation at a time."""
    x, top = np.array(values, np.float32), 2 ** (bits - 1) - 1
    step = max(np.float32(np.abs(x).max() * np.float32(1 / top)), np.float32(SMALLEST))
    expected = np.clip(np.round(x / step), -top - 1, top)
    assert row_codes(torch.tensor([values]), bits)[0].tolist() == expected.astype(int).tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_row_of_one_value_has_the_largest_code(bits: int) -> None:
    x = torch.tensor([[0.3], [-7.0], [1e-30], [3e38]])
    top = 2 ** (bits - 1) - 1
    assert row_codes(x, bits)[:, 0].tolist() == [top, -top, top, top]
    assert torch.allclose(row_values(x, bits), x, rtol=1e-6, atol=0)


def test_rows_do_not_depend_on_each_other() -> None:
    x = torch.randn(2, 3, 9) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    codes, steps = row_codes(x, 8), row_scales(x, fraction(8))
    assert steps.shape == (2, 3, 1)
    for i in range(2):
        for j in range(3):
            assert torch.equal(codes[i, j], row_codes(x[i, j], 8))
            assert torch.equal(steps[i, j], row_scales(x[i, j], fraction(8)))
    assert (codes.abs().amax(-1) == 127).all()


def test_a_row_of_zeros_or_of_subnormal_numbers_has_zeros_as_codes() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [0.0, SMALLEST / 4, -SMALLEST / 8]])
    assert not row_codes(x, 8).any()
    assert row_scales(x, fraction(8)).flatten().tolist() == [SMALLEST] * 2
    assert not row_values(x, 8).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_inf_has_such_a_step_and_spoils_no_other_row(value: float) -> None:
    x = torch.randn(3, 8)
    expected = row_codes(x, 8)[[0, 2]]
    x[1, 4] = value
    steps = row_scales(x, fraction(8)).flatten()
    assert torch.isfinite(steps).tolist() == [True, False, True]
    assert torch.equal(row_codes(x, 8)[[0, 2]], expected)
    assert not torch.isfinite(row_values(x, 8)[1]).all()


def test_halves_are_rounded_to_even() -> None:
    """The row's largest value is 127 steps of 1."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    steps = row_scales(x, fraction(8))
    assert steps.item() == 1.0
    assert row_codes(x, 8).tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_coded_as_its_fp32_values(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16).to(dtype)
    assert torch.equal(row_codes(x, 8), row_codes(x.float(), 8))
    assert row_scales(x, fraction(8)).dtype is torch.float32


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("share", CLIPPING)
def test_fake_quantize_of_rows_is_dequantize_of_quantize(bits: int, share: float) -> None:
    x = torch.cat([torch.randn(20, 33) * torch.logspace(-6, 6, 20)[:, None], torch.zeros(1, 33)])
    zero = torch.zeros((), dtype=torch.int32)
    fake = Grid.ROW.fake_quantize(x, fraction(bits, share), NOTHING, zero, bits)
    assert torch.equal(fake, row_values(x, bits, share))


def test_smaller_fractions_clip_the_largest_values() -> None:
    x = torch.tensor([[1.0, 0.71, -0.69, -1.0]])
    values = row_values(x, 8, share=0.7)[0]
    assert values[0] == values[1]
    assert values[0] == pytest.approx(0.7)
    assert (values[2:] - torch.tensor([-0.69, -0.7 * 128 / 127])).abs().max() <= 0.5 * 0.7 / 127 * ROUNDING


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_search_starts_with_all_of_the_row_and_tries_to_clip(bits: int) -> None:
    low, high = torch.tensor([[-3.0]]), torch.tensor([[5.0]])
    base, zero = Grid.ROW.initial(low, high, bits, "s")
    assert base.tolist() == [[pytest.approx(1 / (2 ** (bits - 1) - 1))]]
    assert not zero.any()
    (tried,) = Grid.ROW.candidates(base, base, uniform.factors(0.1, 1.2, 9)[:, None, None], bits)
    assert torch.equal(tried[0], base)
    assert tried.shape == (len(CLIPPING), 1, 1)
    assert (tried <= base).all()
    assert len(tried.unique()) == len(CLIPPING)


# Softmax rows --------------------------------------------------------------------------------------------------------


def unnormalized(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.amax(-1, keepdim=True)).exp()


@given(st.lists(st.floats(-80, 0, width=32), min_size=1, max_size=40), st.integers(2, 8))
@settings(max_examples=80, deadline=None)
def test_codes_of_softmax_rows(scores: list[float], bits: int) -> None:
    """Each within half a step of 1 / (2^k - 1); the largest value of a row is all steps; they sum to 1 as values."""
    e = unnormalized(torch.tensor([scores]))
    levels = 2**bits - 1
    counts = softmax_codes(e, bits)
    assert counts.max() == levels
    assert counts.min() >= 0
    assert (counts.double() / levels - e.double()).abs().max() <= 0.5 / levels * ROUNDING
    values = softmax_values(e, bits)
    total = int(counts.sum())
    assert torch.equal(values, counts.float() / total)
    assert sum(counts[0].tolist()) / total == 1, "exactly 1 before the values are rounded to fp32"
    assert abs(float(values.double().sum()) - 1) <= len(scores) * 2.0**-24


def test_probabilities_are_as_good_as_their_row_allows() -> None:
    """With the sum of counts in place of the sum of exponentials: errors of all terms enter the sum."""
    scores = torch.randn(50, 64) * 3
    e = unnormalized(scores)
    total = e.double().sum(-1, keepdim=True)
    bound = 0.5 / 255 * (1 + 64 / total) / (total - 64 * 0.5 / 255).clamp(min=0.5)
    assert ((softmax_values(e, 8).double() - scores.double().softmax(-1)).abs() <= bound * ROUNDING).all()


def test_halves_of_softmax_rows_are_rounded_to_even() -> None:
    """Of steps of 1 / 4, whose halves fp32 has."""
    step = torch.tensor(0.25)
    codes = Grid.SOFTMAX_ROW.quantize(torch.tensor([0.125, 0.375, 0.625]), step, NOTHING, NOTHING, 2)
    assert (codes.int() + 2).tolist() == [0, 2, 2]


def test_a_row_of_equal_scores_and_a_row_of_one_peak() -> None:
    e = unnormalized(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -200.0, -200.0, -10000.0]]))
    assert softmax_values(e, 8).tolist() == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_fake_quantize_of_softmax_rows_is_dequantize_of_quantize(bits: int) -> None:
    """It takes normalized rows, which the search has. A row times a power of two has the same quotients."""
    e = unnormalized(torch.randn(30, 17) * 4)
    step, zero = torch.tensor(1 / (2**bits - 1)), torch.zeros((), dtype=torch.int32)
    for factor in (1.0, 0.25):
        fake = Grid.SOFTMAX_ROW.fake_quantize(e * factor, step, NOTHING, zero, bits)
        assert torch.equal(fake, softmax_values(e, bits))
    normalized = Grid.SOFTMAX_ROW.fake_quantize(e / e.sum(-1, keepdim=True), step, NOTHING, zero, bits)
    assert ((normalized - softmax_values(e, bits)).abs() > 1e-6).float().mean() < 0.01, "ties aside"


@pytest.mark.parametrize("bits", range(2, 9))
def test_nothing_is_to_be_chosen_for_softmax_rows(bits: int) -> None:
    """Whatever the range of values was."""
    nothing = torch.zeros(1, 1)
    base, zero = Grid.SOFTMAX_ROW.initial(nothing, nothing + 0.3, bits, "s")
    assert base.tolist() == [[pytest.approx(1 / (2**bits - 1))]]
    assert not zero.any()
    (tried,) = Grid.SOFTMAX_ROW.candidates(base, base, uniform.factors(0.1, 1.2, 9)[:, None, None], bits)
    assert torch.equal(tried, base[None])


# As sites ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid.ROW, Grid.SOFTMAX_ROW])
def test_sites_have_one_scale_and_no_zero_point(grid: Grid) -> None:
    spec = SiteSpec("s", Role.INPUT, 8, grid)
    assert spec.scale_shape == (1, 1)
    assert not spec.has_zero_point
    assert grid.per_row
    assert not grid.two_region


def test_the_quantizer_returns_the_steps_of_rows() -> None:
    x = torch.randn(2, 5, 12)
    operand = tables.operand(GridParams(SiteSpec("s", Role.INPUT, 8, Grid.ROW), fraction(8, 0.9).reshape(1, 1)))
    codes = quantizer.quantize(x, operand)
    assert isinstance(codes, RowCodes)
    assert codes.scale.shape == (2, 5)
    assert torch.equal(codes.codes, row_codes(x, 8, 0.9))
    assert torch.equal(quantizer.dequantize(codes, operand), row_values(x, 8, 0.9))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_table_of_softmax_rows_has_the_code_of_zero(bits: int) -> None:
    step = torch.tensor([[1 / (2**bits - 1)]])
    operand = tables.operand(GridParams(SiteSpec("s", Role.SOFTMAX, bits, Grid.SOFTMAX_ROW), step))
    assert operand.table[0, 0, tables.ZERO] == -(2 ** (bits - 1))
    assert operand.table[0, 0, tables.SCALE] == step
    e = unnormalized(torch.randn(1, 2, 3, 7))
    codes = quantizer.quantize(e, operand)
    assert torch.equal(codes.int() + 2 ** (bits - 1), softmax_codes(e, bits))
    assert torch.equal(quantizer.dequantize(codes, operand), softmax_values(e, bits))
