"""Multi-region quantization: exclusive regions, one int8 code per value."""

import pytest
import torch

from tqdit.grids import regions
from tqdit.spec import Grid, GridParams, Role, SiteSpec

BITS = range(4, 9)


def softmax_rows(rows: int = 512, width: int = 256) -> torch.Tensor:
    """Peaked attention rows, as a DiT's at small timesteps."""
    return (torch.randn(rows, width) * 3).softmax(-1)


def scales(bits: int, exponent: int) -> tuple[torch.Tensor, torch.Tensor]:
    s2 = torch.tensor(regions.coarse_softmax_scale(bits))
    return s2 * 2.0**-exponent, s2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU])
def test_codes_fit_their_bits(bits: int, grid: Grid) -> None:
    x = torch.linspace(0, 1, 5001) if grid is Grid.MRQ_SOFTMAX else torch.linspace(-0.17, 9, 5001)
    s1, s2 = scales(bits, 3) if grid is Grid.MRQ_SOFTMAX else (torch.tensor(1e-3), torch.tensor(1e-2))
    codes = regions.quantize(x, s1, s2, bits, grid)
    assert codes.dtype is torch.int8
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", BITS)
def test_softmax_represents_one_exactly(bits: int) -> None:
    for exponent in regions.softmax_exponents(bits):
        s1, s2 = scales(bits, exponent)
        code = regions.quantize(torch.ones(1), s1, s2, bits, Grid.MRQ_SOFTMAX)
        assert code.item() == 2 ** (bits - 1) - 1
        value = regions.dequantize(code, s1, s2, Grid.MRQ_SOFTMAX).item()
        assert value == pytest.approx(1.0, abs=2**-24)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", [1, 3, 5])
def test_softmax_error_is_half_a_step_of_the_region(bits: int, exponent: int) -> None:
    x = softmax_rows()
    s1, s2 = scales(bits, exponent)
    m = 2 ** (bits - 1) - 1
    codes = regions.quantize(x, s1, s2, bits, Grid.MRQ_SOFTMAX)
    error = (regions.dequantize(codes, s1, s2, Grid.MRQ_SOFTMAX) - x).abs()
    fine = x <= m * s1
    assert fine.any()
    assert (~fine).any()
    assert error[fine].max() <= s1 / 2 * (1 + 1e-5)
    assert error[~fine].max() <= s2 / 2 * (1 + 1e-5)
    assert (codes[fine] <= 0).all()
    assert (codes[~fine] >= 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_gelu_error_is_half_a_step_of_the_region_and_the_sign_is_the_flag(bits: int) -> None:
    x = torch.nn.functional.gelu(torch.randn(8192) * 2, approximate="tanh")
    s1 = torch.tensor(regions.GELU_MINIMUM + 1e-3) / 2 ** (bits - 1)
    s2 = x.max() / (2 ** (bits - 1) - 1)
    codes = regions.quantize(x, s1, s2, bits, Grid.MRQ_GELU)
    error = (regions.dequantize(codes, s1, s2, Grid.MRQ_GELU) - x).abs()
    negative = x < 0
    assert error[negative].max() <= s1 / 2 * (1 + 1e-5)
    assert error[~negative].max() <= s2 / 2 * (1 + 1e-5)
    assert (codes[negative] <= 0).all()
    assert (codes[~negative] >= 0).all()


@pytest.mark.parametrize(("grid", "sign"), [(Grid.MRQ_GELU, 1), (Grid.MRQ_SOFTMAX, -1)])
def test_decoding_is_the_sum_of_two_clipped_codes(grid: Grid, sign: int) -> None:
    codes = torch.arange(-128, 128).to(torch.int8)
    s1, s2 = torch.tensor(0.003), torch.tensor(0.05)
    c = codes.float()
    expected = sign * s1 * c.clamp(max=0) + s2 * c.clamp(min=0)
    assert torch.equal(regions.dequantize(codes, s1, s2, grid), expected)


def test_rounding_is_half_to_even_in_both_regions() -> None:
    one = torch.tensor(1.0)
    gelu = regions.quantize(torch.tensor([-2.5, -1.5, 1.5, 2.5]), one, one, 8, Grid.MRQ_GELU)
    assert gelu.tolist() == [-2, -2, 2, 2]
    softmax = regions.quantize(torch.tensor([0.5, 1.5, 2.5]), one, one, 8, Grid.MRQ_SOFTMAX)
    assert softmax.tolist() == [0, -2, -2]


def test_scales_broadcast_per_time_group() -> None:
    x = softmax_rows(4, 8).reshape(2, 2, 8)
    s1, s2 = torch.tensor([1e-3, 4e-3]).reshape(2, 1, 1), torch.tensor(1 / 127)
    codes = regions.quantize(x, s1, s2, 8, Grid.MRQ_SOFTMAX)
    for i in range(2):
        assert torch.equal(codes[i], regions.quantize(x[i], s1[i], s2, 8, Grid.MRQ_SOFTMAX))


def test_trap_1_adding_both_regions_is_far_worse() -> None:
    x = softmax_rows()
    m = 127
    s1, s2 = scales(8, 5)
    codes = regions.quantize(x, s1, s2, 8, Grid.MRQ_SOFTMAX)
    ours = (regions.dequantize(codes, s1, s2, Grid.MRQ_SOFTMAX) - x).square().mean()
    low = torch.round(x / s1).clamp(max=m) * s1
    high = torch.round(x / s2).clamp(max=m) * s2
    added = (low + high - x).square().mean()
    assert added > 10 * ours


def test_best_exponent_beats_uniform_on_softmax_at_6_bits() -> None:
    x = softmax_rows()
    errors = []
    for exponent in regions.softmax_exponents(6):
        s1, s2 = scales(6, exponent)
        codes = regions.quantize(x, s1, s2, 6, Grid.MRQ_SOFTMAX)
        errors.append((regions.dequantize(codes, s1, s2, Grid.MRQ_SOFTMAX) - x).square().mean())
    step = x.max() / 63
    assert min(errors) < (torch.round(x / step) * step - x).square().mean() / 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU])
def test_fake_quantization_is_the_round_trip_bit_for_bit(bits: int, grid: Grid) -> None:
    x = softmax_rows(16) if grid is Grid.MRQ_SOFTMAX else torch.randn(16, 256) * 3
    s1, s2 = scales(bits, 3)
    codes = regions.quantize(x, s1, s2, bits, grid)
    assert torch.equal(regions.fake_quantize(x, s1, s2, bits, grid), regions.dequantize(codes, s1, s2, grid))


@pytest.mark.parametrize("grid", [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU])
def test_fake_quantization_at_the_border_of_the_regions(grid: Grid) -> None:
    s1, s2 = torch.tensor(0.001), torch.tensor(1 / 7)
    border = 7 * s1 if grid is Grid.MRQ_SOFTMAX else torch.tensor(0.0)
    x = torch.stack([border.nextafter(torch.tensor(-1.0)), border, border.nextafter(torch.tensor(2.0)), -border])
    x = x.clamp(min=0) if grid is Grid.MRQ_SOFTMAX else x
    codes = regions.quantize(x, s1, s2, 4, grid)
    assert torch.equal(regions.fake_quantize(x, s1, s2, 4, grid), regions.dequantize(codes, s1, s2, grid))


@pytest.mark.parametrize("bits", BITS)
def test_softmax_candidates_end_at_steps_of_about_2_to_the_minus_17(bits: int) -> None:
    exponents = regions.softmax_exponents(bits)
    assert exponents[0] == 1
    assert 2**-17 <= regions.coarse_softmax_scale(bits) * 2.0 ** -exponents[-1] < 2**-16


def merged_levels(bits: int, exponent: int, grid: Grid) -> torch.Tensor:
    """The values of all codes in units of s1, where s2 = s1 2^exponent."""
    low = -(2 ** (bits - 1)) if grid is Grid.MRQ_GELU else 1 - 2 ** (bits - 1)
    codes = torch.arange(low, 2 ** (bits - 1))
    return regions.dequantize(codes, torch.tensor(1.0), torch.tensor(2.0**exponent), grid)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU])
def test_merging_exponents_are_those_whose_levels_fit_a_byte(bits: int, grid: Grid) -> None:
    legal = regions.merging_exponents(bits, grid)
    s2 = torch.tensor([0.37, 1 / 31])
    for exponent in range(12):
        levels = merged_levels(bits, exponent, grid)
        fits = (levels.max() - levels.min()).item() <= 255
        assert (exponent in legal) == fits
        shift = regions.merge_shift(s2 * 2.0**-exponent, s2, bits, grid)
        assert shift.tolist() == [exponent] * 2 if fits else shift is None
    assert regions.merge_shift(s2 * 2.0 ** -legal[-1], s2 * (1 + 2**-20), bits, grid) is None
    assert regions.merge_shift(s2 * 2, s2, bits, grid) is None


@pytest.mark.parametrize("grid", [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU])
def test_merging_regions_are_worth_more_than_a_uniform_grid_below_8_bits_only(grid: Grid) -> None:
    for bits in BITS:
        spans = [levels.max() - levels.min() for i in regions.merging_exponents(bits, grid)
                 for levels in [merged_levels(bits, i, grid)]]  # fmt: skip
        assert (max(spans) > 2**bits - 1) == (bits < 8)


@pytest.mark.parametrize("bits", BITS)
def test_merging_softmax_candidates_are_some_of_all(bits: int) -> None:
    some, every = regions.softmax_exponents(bits, merging=True), regions.softmax_exponents(bits)
    assert len(some) > 0
    assert set(some) == set(every) & set(regions.merging_exponents(bits, Grid.MRQ_SOFTMAX))


def test_extent_of_the_negative_region_is_the_minimum_of_gelu() -> None:
    x = torch.linspace(-3, 0, 30_001, dtype=torch.float64)
    for approximate in ("none", "tanh"):
        lowest = torch.nn.functional.gelu(x, approximate=approximate).min().item()
        assert lowest == pytest.approx(-regions.GELU_MINIMUM, rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_finest_softmax_step_is_about_two_to_the_minus_17(bits: int) -> None:
    """s2 is a little over 2^(1 - k), so the last exponent is the only one with a step in [2^-17, 2^-16)."""
    exponents = regions.softmax_exponents(bits)
    assert exponents[0] == 1  # s1 = s2 would be one region
    assert 2**-17 <= regions.coarse_softmax_scale(bits) * 2.0 ** -exponents[-1] < 2**-16


@pytest.mark.parametrize("grid", [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_compared_and_divided_in_fp32(grid: Grid, dtype: torch.dtype) -> None:
    """The fine region ends at 0.1269, which would be 130 / 1024 in either type; that value is above it."""
    x = (torch.arange(0 if grid is Grid.MRQ_SOFTMAX else -170, 1025) / 1024).to(dtype)
    s1, s2 = torch.tensor(0.1269 / 127), torch.tensor(1 / 127)
    codes = regions.quantize(x, s1, s2, 8, grid)
    assert torch.equal(codes, regions.quantize(x.float(), s1, s2, 8, grid))
    fake = regions.fake_quantize(x, s1, s2, 8, grid)
    assert fake.dtype is torch.float32
    assert torch.equal(fake, regions.dequantize(codes, s1, s2, grid))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU])
def test_a_value_above_the_range_gets_the_largest_code(bits: int, grid: Grid) -> None:
    """At 8 bits the code 152 of 1.2 would be -104 in a byte."""
    largest = 2 ** (bits - 1) - 1
    s1, s2 = scales(bits, 3)
    x = torch.tensor([1.2, 3.0])
    assert regions.quantize(x, s1, s2, bits, grid).tolist() == [largest, largest]
    assert regions.fake_quantize(x, s1, s2, bits, grid).tolist() == pytest.approx([1.0, 1.0])


def test_every_entry_must_merge() -> None:
    """One table goes to one kind of product, so a group whose regions do not merge decides for all."""
    s2 = torch.tensor([[0.4], [0.4]])
    assert regions.merge_shift(s2 / torch.tensor([[2.0], [4.0]]), s2, 4, Grid.MRQ_GELU).tolist() == [[1], [2]]
    assert regions.merge_shift(s2 / torch.tensor([[2.0], [3.0]]), s2, 4, Grid.MRQ_GELU) is None


@pytest.mark.parametrize(("ratio", "merged"), [(2.0, True), (4.0, True), (3.0, False), (0.5, False), (2.0**6, False)])
def test_a_site_is_merged_where_s2_is_a_small_power_of_two_times_s1(ratio: float, merged: bool) -> None:
    """In both groups and both units; at 6 bits a shift of 6 would leave the byte."""
    s1 = torch.tensor([[0.01, 0.02], [0.03, 0.05]])
    s2 = s1 * 2
    s2[1, 0] = s1[1, 0] * ratio
    spec = SiteSpec("x", Role.GELU, 6, Grid.MRQ_GELU, groups=2, units=2)
    assert GridParams(spec, torch.stack([s1, s2], -1)).merged is merged
