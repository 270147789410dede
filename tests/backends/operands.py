"""Random operands of the block operations; drawn so that no code saturates and every parameter matters."""

from dataclasses import dataclass

import torch

from tqdit.grids.regions import merge_shift
from tqdit.ops.schema import AttentionParams, OperandParams, WeightParams
from tqdit.spec import Grid

HALF = 128


def draw(shape: tuple[int, ...], generator: torch.Generator, low: float = 0.5) -> torch.Tensor:
    """Positive factors around 1."""
    return torch.rand(shape, generator=generator) * (2 - 2 * low) + low


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


@dataclass
class Maker:
    """Draws from one seed."""

    generator: torch.Generator
    bits: int = 8

    def codes(self, *shape: int) -> torch.Tensor:
        half = 1 << (self.bits - 1)
        return integers(-half, half, shape, self.generator).to(torch.int8)

    def values(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def params(
        self,
        grid: Grid = Grid.UNIFORM,
        lead: int = 1,
        units: int | None = None,
        reach: float = 4.0,
        merged: bool = False,
    ) -> OperandParams:
        """A grid that reaches to about +-`reach`; (lead, 1, 1), or (lead, units, 1, 1) per head."""
        shape = (lead, 1, 1) if units is None else (lead, units, 1, 1)
        half = 1 << (self.bits - 1)
        scale = draw(shape, self.generator) * reach / half
        zero = integers(-half // 2, half // 2, shape, self.generator)
        coarse = torch.ones(shape)
        if grid is Grid.MRQ_SOFTMAX:
            coarse, zero = torch.full(shape, 1 / (half - 1)), torch.zeros_like(zero)
            scale = coarse * (0.5 if merged else 2.0**-5)
        elif grid is Grid.MRQ_GELU:
            coarse, zero = scale, torch.zeros_like(zero)
            scale = coarse / 4 if merged else draw(shape, self.generator) * 0.17 / half
        shift = merge_shift(scale, coarse, self.bits, grid) if grid.two_region else None
        assert (shift is not None) == merged
        return OperandParams(grid, self.bits, scale, zero, coarse, shift)

    def weight(self, out: int, inner: int, per_channel: bool = True) -> WeightParams:
        codes = integers(-HALF, HALF, (out, inner), self.generator).to(torch.int8)
        scale = draw((out if per_channel else 1,), self.generator) / (40 * inner**0.5)
        return WeightParams(codes, scale, codes.sum(1, dtype=torch.int32))

    def attention(self, heads: int, grid: Grid, lead: int = 1, merged: bool = False) -> AttentionParams:
        q, k, v = (self.params(lead=lead, units=heads) for _ in range(3))
        softmax = self.params(grid, lead, 1, reach=1.0, merged=merged)
        return AttentionParams(q, k, v, softmax, heads)


def maker(seed: int, bits: int = 8) -> Maker:
    return Maker(torch.Generator().manual_seed(seed), bits)
