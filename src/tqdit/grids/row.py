"""The grid of rows: a uniform, symmetric grid whose scale follows from the largest magnitude of each row.

The scale is computed where the row is at hand, so no calibration can be wrong about it: x = s q with
s = max(fraction max|x|, the smallest normal number). The site's only parameter is the fraction, 1 / qmax by default.
"""

import torch

from tqdit.grids import uniform
from tqdit.grids.formats import IntFormat
from tqdit.grids.kind import Grid

CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of the largest magnitude that a search tries to reach


def row_scales(x: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Return the scale of each row of x (..., C), fp32 (..., 1); `fraction` broadcasts to the result.

    A row of zeros gets the smallest normal number, so its codes are 0. A row with NaN or Inf gets NaN or Inf: its codes
    mean nothing, and every product with them is NaN or Inf, as in a float model.
    """
    magnitude = x.float().abs().amax(-1, keepdim=True)
    return (magnitude * fraction).clamp(min=uniform.SMALLEST)


class Row(Grid):
    """The grid of rows. `scale` is a fraction: the scale of a row is its largest magnitude times that."""

    label = "row"
    per_row = True
    zero_points = False

    def initial(
        self, low: torch.Tensor, high: torch.Tensor, bits: int, site: str, merging: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the fraction with which the largest magnitude has the largest code, and zeros."""
        return torch.full_like(high, 1 / IntFormat(bits).qmax), torch.zeros_like(high, dtype=torch.int32)

    def candidates(
        self, base: torch.Tensor, current: torch.Tensor, steps: torch.Tensor, bits: int, merging: bool = False
    ) -> list[torch.Tensor]:
        """Return fractions that clip the largest magnitudes."""
        return [torch.stack([base * share for share in CLIPPING])]

    def quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        return uniform.quantize(x, row_scales(x, scale), 0, bits)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor
    ) -> torch.Tensor:
        """Return the values of codes; `scale` are those of their rows, not the fraction."""
        return uniform.dequantize(codes, scale, 0)

    def fake_quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        return uniform.fake_quantize(x, row_scales(x, scale), torch.zeros_like(zero_point), bits)
