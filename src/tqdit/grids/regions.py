"""Multi-region quantization (MRQ): two exclusive regions with a scale each, in one int8 tensor.

The sign of a code is the region flag. x = sign * s1 * min(c, 0) + s2 * max(c, 0), with sign = +1 after GELU (negative
codes are negative values) and sign = -1 after softmax (all values are positive; negative codes are the fine region).
A value belongs to exactly one region, so the two products of a matmul have disjoint supports.
"""

from collections.abc import Iterable

import torch

from tqdit.grids import uniform
from tqdit.grids.formats import IntFormat
from tqdit.grids.kind import Grid

GELU_MINIMUM = 0.17  # max |gelu(x)| for x < 0, TQ-DiT's fixed extent of the negative region


def coarse_softmax_scale(bits: int) -> float:
    """Return s2 = 1 / m with m = 2^(k-1) - 1, which represents the probability 1 exactly."""
    return 1.0 / IntFormat(bits).qmax


def quantize(x: torch.Tensor, s1: torch.Tensor, s2: torch.Tensor, bits: int, grid: Grid) -> torch.Tensor:
    """Return the codes of x, int8 in the shape of x; the scales broadcast to x.

    Softmax: x <= m s1 -> -round(x / s1), else round(x / s2), m = 2^(k-1) - 1.
    GELU: x < 0 -> clip(round(x / s1), -2^(k-1), 0), else clip(round(x / s2), 0, 2^(k-1) - 1).
    """
    fmt = IntFormat(bits)
    x = x.float()
    if grid is Grid.MRQ_SOFTMAX:
        fine = x <= fmt.qmax * s1
        codes = torch.round(x / torch.where(fine, s1, s2)).clamp_(max=fmt.qmax).to(torch.int8)
        return torch.where(fine, -codes, codes)
    codes = torch.round(x / torch.where(x < 0, s1, s2))
    return codes.clamp_(fmt.qmin, fmt.qmax).to(torch.int8)


def dequantize(codes: torch.Tensor, s1: torch.Tensor, s2: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the values of codes, fp32."""
    value = codes.float()
    return value * torch.where(value < 0, grid.sign * s1, s2)


def fake_quantize(x: torch.Tensor, s1: torch.Tensor, s2: torch.Tensor, bits: int, grid: Grid) -> torch.Tensor:
    """Return dequantize(quantize(x)), bit for bit, without making codes.

    It takes half the memory traffic; the search uses it.
    """
    rounded, first = steps(x, s1, s2, bits, grid)
    return rounded.mul_(torch.where(first, s1, s2))


def steps(
    x: torch.Tensor, s1: torch.Tensor, s2: torch.Tensor, bits: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each value as a multiple of its own scale, and which values belong to region 1.

    The multiples are fp32 and have the values' signs.
    """
    fmt = IntFormat(bits)
    x = x.float()
    first = x <= fmt.qmax * s1 if grid is Grid.MRQ_SOFTMAX else x < 0
    return torch.round(x / torch.where(first, s1, s2)).clamp_(fmt.qmin, fmt.qmax), first


def merge_shift(s1: torch.Tensor, s2: torch.Tensor, bits: int, grid: Grid) -> torch.Tensor | None:
    """Return i of s2 = s1 2^i, int32 in the shape of s1, or None if the regions do not merge.

    They merge if the equation holds exactly everywhere and c1 and c2 2^i share one byte. A matmul then needs one
    integer product instead of one per region (TQ-DiT codes of k bits; 256 levels in a byte).
    """
    mantissa, exponent = torch.frexp(s2 / s1)
    shift = (exponent - 1).to(torch.int32)
    largest = merging_exponents(bits, grid).stop - 1
    if bool(((mantissa == 0.5) & (s1 * 2.0**shift == s2) & (shift >= 0) & (shift <= largest)).all()):
        return shift
    return None


def merging_exponents(bits: int, grid: Grid) -> range:
    """Return every i >= 0 of s2 = s1 2^i whose merged codes c1 and c2 2^i fit one byte: their span is at most 255.

    At 8 bits (GELU 0; softmax 0, 1) such a grid has no level that one uniform grid of 8 bits lacks.
    """
    fmt = IntFormat(bits)
    lowest = fmt.qmin if grid is Grid.MRQ_GELU else 0
    return range(((255 + lowest) // fmt.qmax).bit_length())


def softmax_exponents(bits: int, merging: bool = False) -> range:
    """Return the candidates i of s1 = s2 2^-i.

    The last one has steps s1 of about 2^-17, finer than any probability needs. `merging`: only those whose regions
    merge.
    """
    return range(1, merging_exponents(bits, Grid.MRQ_SOFTMAX).stop if merging else 19 - bits)


def with_fine(coarse: torch.Tensor, exponents: Iterable[int]) -> torch.Tensor:
    """Return (s1, s2) for every s2 in `coarse` (n, ...) and every s1 = s2 2^-i: (exponents x n, ..., 2).

    The products are exact, since the powers are Python numbers. An s2 so small that some s1 would be subnormal is
    raised until none is.
    """
    powers = [2.0**-exponent for exponent in exponents]
    coarse = coarse.clamp(min=uniform.SMALLEST / min(powers))
    return torch.cat([torch.stack([coarse * power, coarse], -1) for power in powers])


class TwoRegions(Grid):
    """The base of the grids with two regions."""

    label = "MRQ"
    two_region = True
    zero_points = False

    def quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        return quantize(x, scale, coarse, bits, self)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor
    ) -> torch.Tensor:
        return dequantize(codes, scale, coarse, self)

    def fake_quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        return fake_quantize(x, scale, coarse, bits, self)

    def merge_shift(self, scale: torch.Tensor, bits: int) -> torch.Tensor | None:
        return merge_shift(*self.by_region(scale), bits, self)
