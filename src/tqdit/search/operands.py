"""One operand of a matmul under search: its float values, its current parameters, and the candidates to try."""

from dataclasses import dataclass, replace

import torch

from tqdit.calibration.statistics import RangeStats
from tqdit.grids import uniform
from tqdit.recipe import Recipe
from tqdit.spec import Role, SiteSpec


@dataclass(frozen=True)
class Operand:
    """Values with parameters of shape (groups, units); `lead` and `unit` say which entry each value uses.

    Rows of a linear input (R, in): lead = group of the row. Attention (S, H, ., .): lead = group of the sample,
    units = heads or 1. Weights (out, in): one group, `unit` = which scale each output channel uses.
    """

    spec: SiteSpec
    values: torch.Tensor
    lead: torch.Tensor  # (values.shape[0],) group indices; zeros where the site has one group
    unit: torch.Tensor  # (values.shape[0],) for weights, (H,) for attention, (1,) for rows
    scale: torch.Tensor  # (groups, units), or (groups, units, 2) for two regions
    zero_point: torch.Tensor  # (groups, units) int32
    merging: bool = False  # True: two regions have only scales that merge, so that one product is enough

    @property
    def is_weight(self) -> bool:
        """Say whether the operand is a weight."""
        return self.spec.is_weight

    @property
    def independent_regions(self) -> bool:
        """Say whether two regions have scales without a common step; each region is then searched by itself."""
        return self.spec.grid.independent_regions and not self.merging

    def _broadcast(self, table: torch.Tensor) -> torch.Tensor:
        """Return (groups, units) in a shape that broadcasts to `values`."""
        if self.is_weight:
            return table[0, self.unit][:, None]
        if self.values.ndim == 2:
            return table[self.lead]
        return table[self.lead][:, self.unit][..., None, None]

    def fake(self, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Return the values of the codes of `values`, under `scale` or the current one."""
        scale = self.scale if scale is None else scale
        grid = self.spec.grid
        s1, s2 = map(self._broadcast, grid.by_region(scale))
        return grid.fake_quantize(self.values, s1, s2, self._broadcast(self.zero_point), self.spec.bits)

    def by_row(self, tables: torch.Tensor) -> torch.Tensor:
        """Return tables (K, groups, units) by row of `values`, or by matrix of attention: (K, n), contiguous."""
        if self.is_weight:
            return tables[:, 0, self.unit].contiguous()
        if self.values.ndim == 2:
            return tables[:, self.lead, 0].contiguous()
        of_heads = tables[:, self.lead][..., self.unit]
        return of_heads.expand(-1, *self.values.shape[:2]).reshape(len(tables), -1)

    def reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum an elementwise loss of the matmul's output into (groups, units): the error that judges each parameter."""
        return self.totals(loss.sum(0 if self.is_weight else -1).flatten())

    def totals(self, sums: torch.Tensor) -> torch.Tensor:
        """Return what `reduce` does for a loss that is summed already.

        A weight's loss is summed over the output's rows, an activation's over the output's columns. `sums`: (n, ...),
        the trailing dimensions of which stay: (groups, units, ...).
        """
        groups, units = self.scale.shape[:2]
        if self.is_weight:  # (out, ...)
            return _summed(sums, self.unit, units)[None]
        rows = self.values.ndim == 2
        per_lead = sums[:, None] if rows else sums.unflatten(0, (*self.values.shape[:2], -1)).sum(2)
        by_group = _summed(per_lead, self.lead, groups)  # of (R, 1, ...) or (S, H, ...)
        return by_group if units == by_group.shape[1] else by_group.sum(1, keepdim=True)

    def candidate_scales(self, base: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
        """Return stacks (K, groups, units[, 2]) of tables to try, one per searched region.

        `base` is the min-max scale.

        Uniform and GELU: `candidates` multiples of the min-max scale from `low` to `high` (TQ-DiT's setting).
        Softmax: s1 = s2 2^-i. The tables of region 2 keep the current region 1, so ask again after each choice.
        Merging: fewer i after softmax; after GELU every multiple of s2 with every i, as one stack.
        """
        steps = uniform.factors(recipe.low, recipe.high, recipe.candidates).to(base.device)[:, None, None]
        return self.spec.grid.candidates(base, self.scale, steps, self.spec.bits, self.merging)

    def with_scale(self, scale: torch.Tensor) -> "Operand":
        """Return the operand with another current scale."""
        return replace(self, scale=scale)


def _summed(values: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """Return sums of values (n, ...) over equal `index` (n,): (count, ...), the same bits every time.

    On a GPU `index_add_` adds in any order, so a product in fp64 takes its place unless nothing shares an index.
    """
    if values.is_cuda and count < len(index):
        members = torch.arange(count, device=index.device)[:, None] == index
        found = members.double() @ values.reshape(len(index), -1).double()
        return found.float().reshape(count, *values.shape[1:])
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, index, values)


def activation(
    spec: SiteSpec, values: torch.Tensor, group: torch.Tensor, ranges: RangeStats, merging: bool = False
) -> Operand:
    """Return an operand at its min-max parameters.

    `group`: (values.shape[0],) time groups; `ranges` are per group. Raises `InputError` naming the site and the time
    group of a range that is not finite.
    """
    pooled = ranges.pooled(spec.groups)
    ranges.check_finite(spec.name)
    lead = group if spec.groups > 1 else torch.zeros_like(group)
    # Probabilities are in [0, 1] whatever range was recorded.
    low = torch.zeros_like(pooled.low) if spec.role is Role.SOFTMAX else pooled.low
    scale, zero_point = spec.grid.initial(low, pooled.high, spec.bits, spec.name, merging)
    unit = torch.arange(spec.units) if spec.units > 1 else torch.zeros(1, dtype=torch.int64)
    unit = unit.to(values.device)
    return Operand(spec, values, lead, unit, scale, zero_point, merging)


def weight(specs: list[SiteSpec], weights: list[torch.Tensor]) -> Operand:
    """Return weights (out_i, in) that share an input as one operand.

    They are stacked along out, each with its own scale or scales.
    """
    values = weights[0] if len(weights) == 1 else torch.cat(weights)  # large weights are not copied
    unit, magnitudes, first = [], [], 0
    for spec, w in zip(specs, weights, strict=True):
        units = torch.arange(len(w)) if spec.units > 1 else torch.zeros(len(w), dtype=torch.int64)
        unit.append(units + first)
        per_row = w.abs().amax(1)
        magnitude = per_row if spec.units > 1 else per_row.amax(0, keepdim=True)
        magnitudes.append(uniform.minmax_symmetric(magnitude, spec.bits, spec.name))
        first += spec.units
    scale = torch.cat(magnitudes)[None]
    # Weights have no zero point: it would need a run-time sum over every activation row.
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    lead = torch.zeros(1, dtype=torch.int64, device=values.device)
    return Operand(specs[0], values, lead, torch.cat(unit).to(values.device), scale, zeros)
