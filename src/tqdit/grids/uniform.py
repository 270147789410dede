"""The paper's uniform quantizer Q_k^u, the project's rounding rule, and the scale of a unit without a range.

Codes are signed (see `formats.IntFormat`); one rounding rule everywhere: half to even, as torch.
"""

import torch

from tqdit.errors import InputError
from tqdit.grids.formats import IntFormat
from tqdit.grids.kind import Grid

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # the limits of a scale


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int, bits: int) -> torch.Tensor:
    """Return clip(round(x / s) + z) as int8; `scale` and `zero_point` broadcast to x.

    NaN is not checked for: calibration and loading do, and this runs at every denoiser call.
    """
    fmt = IntFormat(bits)
    return (torch.round(x.float() / scale) + zero_point).clamp_(fmt.qmin, fmt.qmax).to(torch.int8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int) -> torch.Tensor:
    """Return s (q - z), fp32."""
    return (codes.to(torch.int32) - zero_point).float() * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Return dequantize(quantize(x)), bit for bit, without making codes.

    It takes half the memory traffic; the search uses it.
    """
    return steps(x, scale, zero_point, bits).mul_(scale)


def steps(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes less their zero point as fp32: integers of at most bits + 1 bits."""
    fmt = IntFormat(bits)
    return torch.round(x.float() / scale).clamp_(fmt.qmin - zero_point, fmt.qmax - zero_point)


def minmax_asymmetric(low: torch.Tensor, high: torch.Tensor, bits: int, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s = (max - min) / (2^k - 1) and z = qmin - round(min / s); the range is widened to contain 0.

    Containing 0 keeps z in the code range, so that a zero stays exactly zero. A range of 0 gets s = 1 and z = 0. Raises
    `InputError` naming `site` for NaN or Inf.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    fmt = IntFormat(bits)
    width = (high - low) / (fmt.qmax - fmt.qmin)
    scale = scale_of(width, site)
    zero_point = fmt.qmin - torch.round(low / scale)
    return scale, torch.where(is_dead(width), 0, zero_point).to(torch.int32)


def minmax_symmetric(magnitude: torch.Tensor, bits: int, site: str) -> torch.Tensor:
    """Return s = max|x| / (2^(k-1) - 1) and the zero point 0. A magnitude of 0 gets s = 1."""
    return scale_of(magnitude / IntFormat(bits).qmax, site)


def is_dead(width: torch.Tensor) -> torch.Tensor:
    """Say where a step of this width is no scale.

    There the range is 0, or so near 0 that the step is subnormal. A division by a subnormal number is not reliable, and
    the reciprocal of one may be Inf.
    """
    return width < SMALLEST


def scale_of(width: torch.Tensor, site: str, otherwise: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Return steps of min-max ranges as fp32 scales, and `otherwise` for every unit whose range is 0.

    Such a unit is a pruned, padded or untrained row, head or channel. All its values have the code of 0 under a scale
    of 1, which is exact for zeros. Raises `InputError` naming `site` for NaN or Inf.
    """
    width = width.float()
    if not torch.isfinite(width).all():
        raise InputError(f"site '{site}': the range of values is not finite, no scale can represent them")
    return torch.where(is_dead(width), otherwise, width)


def multiples(scale: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return the candidates `scale` times every factor (K, 1, ...).

    Each is a positive, finite and normal number.
    """
    return (scale * factors).clamp_(SMALLEST, LARGEST)


def factors(low: float, high: float, count: int) -> torch.Tensor:
    """Return `count` multiples of the min-max scale from `low` to `high`; the last step contains exactly `high`."""
    return torch.linspace(low, min(high, LARGEST), count)


class Uniform(Grid):
    """The uniform grid: x = scale (q - zero_point)."""

    label = "uniform"

    def initial(
        self, low: torch.Tensor, high: torch.Tensor, bits: int, site: str, merging: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return min-max scale and zero point."""
        return minmax_asymmetric(low, high, bits, site)

    def candidates(
        self, base: torch.Tensor, current: torch.Tensor, steps: torch.Tensor, bits: int, merging: bool = False
    ) -> list[torch.Tensor]:
        """Return multiples of the min-max scale."""
        return [multiples(base, steps)]

    def quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        return quantize(x, scale, zero_point, bits)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor
    ) -> torch.Tensor:
        return dequantize(codes, scale, zero_point)

    def fake_quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        return fake_quantize(x, scale, zero_point, bits)
