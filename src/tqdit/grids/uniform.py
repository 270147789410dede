"""The uniform quantizer (METHOD eqs. for Q_k^u), and the rounding rule and zero-scale guard of the project.

Codes are signed (see `spec.IntFormat`); one rounding rule everywhere: half to even, as torch.
"""

import torch

from tqdit.errors import InputError
from tqdit.spec import IntFormat


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int, bits: int) -> torch.Tensor:
    """clip(round(x / s) + z) as int8; `scale` and `zero_point` broadcast to x. NaN is not checked for: calibration and
    loading do, and this runs at every denoiser call."""
    fmt = IntFormat(bits)
    return (torch.round(x.float() / scale) + zero_point).clamp_(fmt.qmin, fmt.qmax).to(torch.int8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int) -> torch.Tensor:
    """s (q - z), fp32."""
    return (codes.to(torch.int32) - zero_point).float() * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """dequantize(quantize(x)) without the codes, bit for bit the same and half the memory traffic; for the search."""
    return steps(x, scale, zero_point, bits).mul_(scale)


def steps(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes less their zero point, as fp32: integers of at most bits + 1 bits."""
    fmt = IntFormat(bits)
    return torch.round(x.float() / scale).clamp_(fmt.qmin - zero_point, fmt.qmax - zero_point)


def minmax_asymmetric(low: torch.Tensor, high: torch.Tensor, bits: int, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """s = (max - min) / (2^k - 1), z = qmin - round(min / s); the range is widened to contain 0.

    Containing 0 keeps z in the code range, so a zero stays exactly zero. Raises `InputError` naming `site` for a
    zero range, NaN or Inf.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    fmt = IntFormat(bits)
    scale = checked_scale((high - low) / (fmt.qmax - fmt.qmin), site)
    return scale, (fmt.qmin - torch.round(low / scale)).to(torch.int32)


def minmax_symmetric(magnitude: torch.Tensor, bits: int, site: str) -> torch.Tensor:
    """s = max|x| / (2^(k-1) - 1), zero point 0."""
    return checked_scale(magnitude / IntFormat(bits).qmax, site)


def checked_scale(scale: torch.Tensor, site: str) -> torch.Tensor:
    """The scale as fp32, or an `InputError` naming the site if one of its entries is zero, NaN, Inf or subnormal."""
    scale = scale.float()
    if not torch.isfinite(scale).all():
        raise InputError(f"site '{site}': values are not finite, no scale can represent them")
    if (scale < torch.finfo(torch.float32).tiny).any():
        raise InputError(f"site '{site}': all values are zero, the range has no scale")
    return scale


def factors(low: float, high: float, count: int) -> torch.Tensor:
    """`count` multiples of the min-max scale from `low` to `high`, the last step containing exactly `high`."""
    return torch.linspace(low, high, count)
