"""The two-region grid of values after GELU: negative ones, which are small, and positive ones."""

import torch

from tqdit.grids import regions, uniform
from tqdit.grids.kind import Columns, Grid
from tqdit.grids.regions import TwoRegions

OFFSET = 128  # subtracted from the unsigned integer of merged regions to make it int8


class MrqGelu(TwoRegions):
    """MRQ after GELU. A search chooses s1 and s2 one by one.

    Of merging regions it chooses s2 and i of s1 = s2 2^-i.
    """

    independent_regions = True

    def initial(
        self, low: torch.Tensor, high: torch.Tensor, bits: int, site: str, merging: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return min-max scales and zeros; the negative region has GELU's fixed extent."""
        top = 1 << (bits - 1)
        fine = torch.full_like(high, regions.GELU_MINIMUM / top)
        # Where calibration saw no positive value, a later positive value is as near 0 as the negative ones.
        coarse = uniform.scale_of(high.clamp(min=0) / (top - 1), site, otherwise=fine)
        scale = finest_merged(fine, coarse, bits) if merging else torch.stack([fine, coarse], -1)
        return scale, torch.zeros_like(low, dtype=torch.int32)

    def candidates(
        self, base: torch.Tensor, current: torch.Tensor, steps: torch.Tensor, bits: int, merging: bool = False
    ) -> list[torch.Tensor]:
        """Return multiples of s1 beside the current s2, and of s2 beside the current s1.

        Merging: every multiple of s2 with every exponent, as one stack.
        """
        fine, coarse = (uniform.multiples(base[..., region], steps) for region in (0, 1))
        if merging:
            return [regions.with_fine(coarse, regions.merging_exponents(bits, self))]
        current = current.expand(len(steps), *current.shape)
        return [torch.stack([fine, current[..., 1]], -1), torch.stack([current[..., 0], coarse], -1)]

    def columns(self, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int) -> Columns:
        """Return the parameters as `Grid.columns` does.

        Merged regions are one integer c1 or c2 2^shift, counted from -2^(k-1). The lowest integer is stored as the code
        -128, so the zero point of merged regions is 2^(k-1) - 128.
        """
        made = super().columns(scale, zero_point, bits)
        if made.factor is None:
            return made
        return made._replace(zero_point=torch.full_like(made.zero_point, (1 << (bits - 1)) - OFFSET))


def finest_merged(fine: torch.Tensor, coarse: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the finest merging regions that reach as far as s1 = `fine` and s2 = `coarse` do: (groups, units, 2)."""
    coarse = torch.maximum(fine, coarse)
    finest = coarse
    for exponent in regions.merging_exponents(bits, Grid.MRQ_GELU):
        smaller = coarse * 2.0**-exponent
        finest = torch.where(smaller >= fine, smaller, finest)
    return torch.stack([finest, coarse], -1)
