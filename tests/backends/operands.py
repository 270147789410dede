"""Random operands for any backend; drawn so that no code saturates and every parameter matters.

`inject` and `decode` turn signed codes into those of a backend, whatever its layout, and back, by verbs alone.
"""

from dataclasses import dataclass

import torch

from tqdit.grids.softmax_row import fixed_scale
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.schema import AttentionParams, Backend, Codes, OperandParams, WeightParams
from tqdit.ops.tables import operand, parameters
from tqdit.spec import Granularity, Grid, GridParams, Role, SiteSpec

HALF = 128


def draw(shape: tuple[int, ...], generator: torch.Generator, low: float = 0.5) -> torch.Tensor:
    """Positive factors around 1."""
    return torch.rand(shape, generator=generator) * (2 - 2 * low) + low


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def as_operand(grid: Grid, bits: int, scale: torch.Tensor, zero: torch.Tensor | None) -> OperandParams:
    """An operand of these parameters, (groups, units) or, of two regions, (groups, units, 2).

    Only a uniform grid has a zero point.
    """
    groups, units = scale.shape[:2]
    granularity = Granularity.PER_TENSOR if units == 1 else Granularity.PER_HEAD
    spec = SiteSpec("site", Role.INPUT, bits, grid, granularity, groups, units)
    return operand(GridParams(spec, scale, zero))


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
        channels: int = 0,
    ) -> OperandParams:
        """Return a grid that reaches to about +-`reach`, with `units` entries a row (None: one).

        `lead` > 1: every one of `lead` samples is in a time group of its own; there are more groups than samples. The
        grids of rows have fractions of 1 / qmax and somewhat below or above. `channels`: the number of channel factors.
        """
        made = self._without_factors(grid, lead, units, reach, merged)
        return made._replace(channels=draw((channels,), self.generator)) if channels else made

    def _without_factors(self, grid: Grid, lead: int, units: int | None, reach: float, merged: bool) -> OperandParams:
        rows = lead if lead == 1 else lead + 1
        shape = (rows, units or 1)
        half = 1 << (self.bits - 1)
        scale = draw(shape, self.generator) * reach / half
        zero = integers(-half // 2, half // 2, shape, self.generator)
        group = None if lead == 1 else torch.arange(lead, 0, -1)  # that of a call: the same for all of its operands
        if grid is Grid.UNIFORM:
            return as_operand(grid, self.bits, scale, zero)._replace(group=group)
        if grid is Grid.ROW:
            fraction = draw(shape, self.generator, 0.8) / (half - 1)
            return as_operand(grid, self.bits, fraction, None)._replace(group=group)
        if grid is Grid.SOFTMAX_ROW:
            return as_operand(grid, self.bits, torch.full(shape, fixed_scale(self.bits)), None)._replace(group=group)
        if grid is Grid.MRQ_SOFTMAX:
            coarse = torch.full(shape, 1 / (half - 1))
            scale = coarse * (0.5 if merged else 2.0**-5)
        else:
            coarse = scale
            scale = coarse / 4 if merged else draw(shape, self.generator) * 0.17 / half
        found = as_operand(grid, self.bits, torch.stack([scale, coarse], dim=-1), None)._replace(group=group)
        assert found.merged == merged
        return found

    def weight(self, out: int, inner: int, per_channel: bool = True) -> WeightParams:
        codes = integers(-HALF, HALF, (out, inner), self.generator).to(torch.int8)
        scale = draw((out if per_channel else 1,), self.generator) / (40 * inner**0.5)
        return WeightParams(codes, scale, 8, codes.sum(1, dtype=torch.int32))

    def attention(self, heads: int, grid: Grid, lead: int = 1, merged: bool = False) -> AttentionParams:
        q, k, v = (self.params(lead=lead, units=heads) for _ in range(3))
        softmax = self.params(grid, lead, 1, reach=1.0, merged=merged)
        return AttentionParams(q, k, v, softmax, heads)


def maker(seed: int, bits: int = 8) -> Maker:
    return Maker(torch.Generator().manual_seed(seed), bits)


def meant(codes: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Return values, fp32 (B, N, C), that have signed codes under an operand without channel factors.

    On the grid of rows, where a step follows from the values, the codes are only drawn values; each row has a size of
    its own.
    """
    if params.grid is Grid.ROW:
        return codes.float() * (0.01 + 0.1 * torch.arange(codes.shape[1]))[:, None]
    return dequantize(codes, params)


def signed_codes(codes: torch.Tensor, params: OperandParams) -> Codes:
    """Return the reference's codes of the values that are `meant`: the same, or on the grid of rows `RowCodes`."""
    return quantize(meant(codes, params), params) if params.grid is Grid.ROW else codes


def inject(backend: Backend, codes: torch.Tensor, params: OperandParams) -> Codes:
    """Return signed codes, int8 (B, N, C), as this backend's codes: those of the values that the codes mean."""
    return backend.quantize(meant(codes, params), params)


def decode(backend: Backend, codes: torch.Tensor, params: OperandParams, width: int) -> torch.Tensor:
    """Return a backend's codes (B, N, width) of an operand as signed codes, int32: through a layer that is 1."""
    weight = WeightParams(torch.eye(width, dtype=torch.int8), torch.ones(1), 8)
    value = backend.linear(codes, params, backend.prepare(weight, None), None)
    p = parameters(params, 3)
    if params.grid is Grid.UNIFORM:
        return torch.round(value / p.scale).to(torch.int32) + p.zero_point
    return torch.round(value / torch.where(value < 0, p.scale, p.coarse)).to(torch.int32)


def gathered(params: OperandParams, members: slice) -> OperandParams:
    """The operand of some members of a batch whose samples are in groups of their own."""
    return params if params.group is None else params._replace(group=params.group[members])
