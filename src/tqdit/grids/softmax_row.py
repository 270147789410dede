"""The grid of unnormalized softmax rows: exp(s - max s) has the maximum 1, so one region and one scale serve it.

A code counts multiples of 1 / (2^k - 1) from 0; it is stored less 2^(k-1), so that it is a signed code of k bits. The
sum of a row's codes takes the place of the sum of its exponentials: O = sum(c v) / sum(c). The quantized probabilities
of a row sum to exactly 1, and one integer product is enough.
"""

import torch

from tqdit.grids import uniform
from tqdit.grids.formats import IntFormat
from tqdit.grids.kind import Columns, Grid


class SoftmaxRow(Grid):
    """The grid of softmax rows. `scale` is 1 / (2^k - 1), and nothing is to be chosen."""

    label = "softmax row"
    per_row = True
    zero_points = False

    def initial(
        self, low: torch.Tensor, high: torch.Tensor, bits: int, site: str, merging: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale of unnormalized probabilities, and zeros."""
        return torch.full_like(high, fixed_scale(bits)), torch.zeros_like(high, dtype=torch.int32)

    def candidates(
        self, base: torch.Tensor, current: torch.Tensor, steps: torch.Tensor, bits: int, merging: bool = False
    ) -> list[torch.Tensor]:
        """Return the one scale that there is."""
        return [base[None]]

    def quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        """Return the codes of unnormalized probabilities, from 0 to 1."""
        return uniform.quantize(x, scale, IntFormat(bits).qmin, bits)

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor
    ) -> torch.Tensor:
        """Return the normalized probabilities of codes, by the sums of their rows."""
        counts = codes.to(torch.int32) - zero_point
        return counts.float() / counts.sum(-1, keepdim=True).float()

    def fake_quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        """Return the values of the codes of normalized probabilities x."""
        relative = x.float() / x.float().amax(-1, keepdim=True)
        counts = torch.round(relative / scale)
        return counts / counts.sum(-1, keepdim=True)

    def columns(self, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int) -> Columns:
        """Return the parameters as `Grid.columns` does; the zero point is the code of 0."""
        made = super().columns(scale, zero_point, bits)
        return made._replace(zero_point=torch.full_like(made.zero_point, IntFormat(bits).qmin))


def fixed_scale(bits: int) -> float:
    """Return the scale of codes of `bits` bits: 2^bits - 1 levels from 0 to 1."""
    return 1 / (2**bits - 1)
