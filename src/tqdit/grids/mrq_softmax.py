"""The two-region grid of probabilities: a fine region below a coarse one that represents 1 exactly."""

import torch

from tqdit.grids import regions
from tqdit.grids.regions import TwoRegions


class MrqSoftmax(TwoRegions):
    """MRQ after softmax. The scale s2 is fixed; a search chooses i of s1 = s2 2^-i."""

    sign = -1

    def initial(
        self, low: torch.Tensor, high: torch.Tensor, bits: int, site: str, merging: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales in the middle of those that a search tries, whatever the range of values, and zeros."""
        coarse = torch.full_like(high, regions.coarse_softmax_scale(bits))
        exponent = min(bits // 2, regions.softmax_exponents(bits, merging).stop - 1)
        return regions.with_fine(coarse, [exponent]), torch.zeros_like(low, dtype=torch.int32)

    def candidates(
        self, base: torch.Tensor, current: torch.Tensor, steps: torch.Tensor, bits: int, merging: bool = False
    ) -> list[torch.Tensor]:
        """Return every legal exponent as one stack."""
        return [regions.with_fine(base[None, ..., 1], regions.softmax_exponents(bits, merging))]
