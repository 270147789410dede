"""The uniform quantizer against a plain-Python one written from the equations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqdit.errors import InputError
from tqdit.grids import uniform

F32 = np.float32


def naive(values: list[float], bits: int) -> tuple[list[int], list[float]]:
    """Unsigned codes and reconstructions: s = (max-min)/(2^k-1), z = -round(min/s), one fp32 step at a time."""
    top = 2**bits - 1
    low, high = min(F32(0), *map(F32, values)), max(F32(0), *map(F32, values))
    s = F32(F32(high - low) / F32(top))
    z = -round(float(F32(low / s)))  # Python's round is half to even
    codes = [min(max(round(float(F32(F32(x) / s))) + z, 0), top) for x in values]
    return codes, [float(F32(s * F32(q - z))) for q in codes]


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_signed_codes_are_the_equations_shifted(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    if x.abs().max() < 1e-20:
        return  # zero range, tested below
    codes, reconstructed = naive(values, bits)
    scale, zero_point = uniform.minmax_asymmetric(x.min(), x.max(), bits, "s")
    ours = uniform.quantize(x, scale, zero_point, bits)
    assert (ours.int() + 2 ** (bits - 1)).tolist() == codes
    assert uniform.dequantize(ours, scale, zero_point).tolist() == reconstructed


@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step_inside_the_range(bits: int) -> None:
    x = torch.randn(4096) * 3 + 1
    scale, zero_point = uniform.minmax_asymmetric(x.min(), x.max(), bits, "s")
    error = uniform.dequantize(uniform.quantize(x, scale, zero_point, bits), scale, zero_point) - x
    # Rounding the zero point moves an end of the range by up to half a step.
    assert error.abs().max() <= scale * (1 + 1e-5)
    inner = (x - x.min() > scale) & (x.max() - x > scale)
    assert error[inner].abs().max() <= scale / 2 * (1 + 1e-4)


def test_rounding_is_half_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert uniform.quantize(x, torch.tensor(1.0), 0, 8).tolist() == [-2, -2, 0, 0, 2, 2]


def test_out_of_range_values_are_clipped() -> None:
    x = torch.tensor([-1e9, 1e9])
    assert uniform.quantize(x, torch.tensor(1.0), 0, 6).tolist() == [-32, 31]


@given(st.floats(-30, 30, width=32), st.floats(-30, 30, width=32), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_zero_is_exact_and_the_zero_point_a_code(a: float, b: float, bits: int) -> None:
    if max(abs(a), abs(b)) < 1e-20:
        return
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = uniform.minmax_asymmetric(low, high, bits, "s")
    assert -(2 ** (bits - 1)) <= int(zero_point) < 2 ** (bits - 1)
    code = uniform.quantize(torch.zeros(1), scale, zero_point, bits)
    assert uniform.dequantize(code, scale, zero_point).item() == 0.0


def test_symmetric_scale_reaches_the_magnitude() -> None:
    scale = uniform.minmax_symmetric(torch.tensor([6.35]), 8, "s")
    assert uniform.quantize(torch.tensor([6.35, -6.35]), scale, 0, 8).tolist() == [127, -127]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (float("nan"), 1.0, "not finite"),
        (-1.0, float("nan"), "not finite"),
        (-1.0, float("inf"), "not finite"),
        (float("-inf"), 1.0, "not finite"),
    ],
)
def test_range_without_a_scale_is_an_error_that_names_the_site(low: float, high: float, message: str) -> None:
    with pytest.raises(InputError, match=f"'blocks.7.q'.*{message}"):
        uniform.minmax_asymmetric(torch.tensor([-1.0, low]), torch.tensor([1.0, high]), 8, "blocks.7.q")


@pytest.mark.parametrize("high", [0.0, 1e-42, uniform.SMALLEST, 254 * uniform.SMALLEST])
def test_a_range_whose_step_is_no_normal_number_gets_a_scale_of_1(high: float) -> None:
    low, high = torch.tensor([-1.0, 0.0, -high, -high / 2]), torch.tensor([1.0, high, 0.0, high / 2])
    scale, zero_point = uniform.minmax_asymmetric(low, high, 8, "s")
    assert scale[1:].tolist() == [1.0] * 3
    assert zero_point.tolist() == [-1, 0, 0, 0]
    assert zero_point.dtype is torch.int32
    assert scale[0] < 1
    for value in (low, high):
        assert not uniform.fake_quantize(value, scale, zero_point, 8)[1:].any()
    assert uniform.minmax_symmetric(high / 3, 8, "w")[1:].tolist() == [1.0] * 3


def test_the_smallest_range_with_a_scale() -> None:
    low, high = torch.zeros(1), torch.full((1,), 255 * uniform.SMALLEST)
    scale, zero_point = uniform.minmax_asymmetric(low, high, 8, "s")
    assert scale.item() == uniform.SMALLEST
    assert torch.isfinite(1 / scale).all()
    assert uniform.quantize(high, scale, zero_point, 8).item() == 127


def test_multiples_of_a_scale_are_scales() -> None:
    factors = uniform.factors(1e-44, 1e300, 4)[:, None]
    assert torch.isfinite(factors).all()
    found = uniform.multiples(torch.tensor([uniform.SMALLEST, 1.0, 1e38]), factors)
    assert (found >= uniform.SMALLEST).all()
    assert torch.isfinite(found).all()
    assert (
        uniform.multiples(torch.tensor([0.5]), torch.tensor([[0.3]])).tolist() == (torch.tensor([[0.3]]) * 0.5).tolist()
    )


def test_rounding_comes_before_the_zero_point() -> None:
    """Half to even: with an odd zero point inside the rounding a tie would go to the other side."""
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert uniform.quantize(x, torch.tensor(1.0), 1, 8).tolist() == [-1, 1, 1, 3, 3]
    assert uniform.quantize(x, torch.tensor(1.0), torch.tensor(-3), 8).tolist() == [-5, -3, -3, -1, -1]


@pytest.mark.parametrize("magnitude", [float("nan"), float("inf")])
def test_symmetric_range_without_a_scale_is_an_error(magnitude: float) -> None:
    with pytest.raises(InputError, match=r"'w\.3'"):
        uniform.minmax_symmetric(torch.tensor([1.0, magnitude]), 8, "w.3")


def test_factors_contain_both_ends() -> None:
    factors = uniform.factors(0.01, 1.2, 100)
    assert len(factors) == 100
    assert factors[[0, -1]].tolist() == torch.tensor([0.01, 1.2]).tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantization_is_the_round_trip_bit_for_bit(bits: int) -> None:
    x = torch.randn(3, 500) * 4
    scale = torch.tensor([0.3, 0.01, 2.0])[:, None]
    for offset in (0, 9):
        zero_point = torch.tensor([-1, 0, 1], dtype=torch.int32)[:, None] * offset
        expected = uniform.dequantize(uniform.quantize(x, scale, zero_point, bits), scale, zero_point)
        assert torch.equal(uniform.fake_quantize(x, scale, zero_point, bits), expected)


def test_the_zero_point_is_added_after_rounding() -> None:
    """Half to even: round(0.5) + 1 = 1 and round(1.5) + 1 = 3, but round(0.5 + 1) = round(1.5 + 1) = 2."""
    x, one = torch.tensor([0.5, 1.5, -0.5, -1.5]), torch.tensor(1.0)
    assert uniform.quantize(x, one, torch.tensor(1, dtype=torch.int32), 8).tolist() == [1, 3, 1, -1]
    assert uniform.fake_quantize(x, one, torch.tensor(1, dtype=torch.int32), 8).tolist() == [0, 2, 0, -2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_divided_in_fp32(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 999).to(dtype)
    scale, zero_point = torch.tensor(2 / 255), torch.tensor(3, dtype=torch.int32)
    codes = uniform.quantize(x, scale, zero_point, 8)
    assert torch.equal(codes, uniform.quantize(x.float(), scale, zero_point, 8))
    fake = uniform.fake_quantize(x, scale, zero_point, 8)
    assert fake.dtype is torch.float32
    assert torch.equal(fake, uniform.dequantize(codes, scale, zero_point))


def test_scales_are_fp32() -> None:
    scale = uniform.scale_of(torch.tensor([0.1, 3.0], dtype=torch.float64), "s")
    assert scale.dtype is torch.float32
    assert scale.tolist() == torch.tensor([0.1, 3.0]).tolist()
