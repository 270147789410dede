"""Histograms of a site's values with the regions of its grid, in the units in which the grid is one for all values."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import parameters
from tqdit.quality.run import Histogram, Region
from tqdit.spec import Grid, GridParams, Role

BINS = 80
KEPT = 20_000  # values of one tensor that are put into a histogram; shares are of all values
FLOOR = 1e-8  # the smallest probability of a logarithmic axis
VALUE = "value"
CODE = "code before rounding"
OF_ROW = "share of the largest magnitude of its row"
OF_CHANNEL = "share of the largest code of its channel"


@dataclass
class Values:
    """The values of one site that were seen so far, in units of `unit`."""

    params: GridParams
    shown: list[torch.Tensor] = field(default_factory=list)
    clipped: int = 0
    zeroed: int = 0
    total: int = 0

    @property
    def unit(self) -> str:
        """Return what the axis is, in words."""
        spec = self.params.spec
        if spec.is_weight:
            return VALUE if spec.units == 1 else OF_CHANNEL
        if spec.grid.per_row:
            return OF_ROW
        return CODE if spec.grid is Grid.UNIFORM and spec.units > 1 else VALUE

    def add(self, x: torch.Tensor, at: OperandParams) -> None:
        """Take in an activation in its coded form, (B, N, C) or (B, H, N, d), under the parameters of its call."""
        p, fmt, x = parameters(at, x.ndim), self.params.spec.format, x.float()
        largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        grid, zero = self.params.spec.grid, p.zero_point
        low, high = -math.inf * torch.ones_like(p.scale), math.inf * torch.ones_like(p.scale)
        if grid is Grid.UNIFORM:
            low, high = (fmt.qmin - zero - 0.5) * p.scale, (fmt.qmax - zero + 0.5) * p.scale
        elif grid is Grid.ROW:
            low, high = (fmt.qmin - 0.5) * p.scale * largest, (fmt.qmax + 0.5) * p.scale * largest
        elif grid.two_region:
            high = (fmt.qmax + 0.5) * p.coarse
            low = (fmt.qmin - 0.5) * p.scale if grid is Grid.MRQ_GELU else low
        rounded = grid.fake_quantize(x, p.scale, p.coarse, zero, at.bits)
        shown = x / largest if self.unit == OF_ROW else x / p.scale + zero if self.unit == CODE else x
        self._count(x, shown, low, high, rounded)

    def add_weight(self, weight: torch.Tensor) -> None:
        """Take in a weight (out, ...) in its coded form."""
        fmt, scale = self.params.spec.format, self.params.scale[0].reshape(-1, *[1] * (weight.ndim - 1))
        rounded = torch.round(weight / scale).clamp(fmt.qmin, fmt.qmax)
        shown = weight / (scale * fmt.qmax) if self.unit == OF_CHANNEL else weight
        self._count(weight, shown, (fmt.qmin - 0.5) * scale, (fmt.qmax + 0.5) * scale, rounded)

    def _count(
        self, x: torch.Tensor, shown: torch.Tensor, low: torch.Tensor, high: torch.Tensor, rounded: torch.Tensor
    ) -> None:
        self.total += x.numel()
        self.clipped += int(((x < low) | (x > high)).sum())
        self.zeroed += int(((rounded == 0) & (x != 0)).sum())
        flat = shown.flatten()
        self.shown.append(flat[:: max(1, len(flat) // KEPT)].cpu())

    def histogram(self) -> Histogram | None:
        """Return the histogram, or None where nothing finite was seen."""
        values = torch.cat(self.shown).double() if self.shown else torch.zeros(0)
        values = values[values.isfinite()]
        if not len(values):
            return None
        found, log = regions(self.params, self.unit), self.params.spec.role is Role.SOFTMAX
        edges = _log_edges(values, found) if log else _edges(values, found)
        counts, _ = torch.histogram(values.clamp(edges[0], edges[-1]), edges)
        total = max(self.total, 1)
        return Histogram(
            unit=self.unit, log=log, edges=edges.tolist(), counts=[int(count) for count in counts], regions=found,
            clipped=self.clipped / total, zeroed=self.zeroed / total, values=self.total,
        )  # fmt: skip


def regions(params: GridParams, unit: str) -> list[Region]:
    """Return the ranges of values that a grid codes, for every time group (and head), in the unit of a histogram.

    A grid that was registered from outside of this package says nothing of its regions.
    """
    spec, fmt = params.spec, params.spec.format
    s1, s2 = (scale.flatten().double() for scale in spec.grid.by_region(params.scale))
    one = torch.ones(1, dtype=torch.float64)
    if spec.is_weight:
        per_channel = (one * fmt.qmin / fmt.qmax, one)
        found = {"codes": per_channel if unit == OF_CHANNEL else (s1 * fmt.qmin, s1 * fmt.qmax)}
    elif spec.grid is Grid.UNIFORM:
        found = _uniform(params, s1, unit)
    elif spec.grid is Grid.ROW:
        found = {"codes": (s1 * fmt.qmin, s1 * fmt.qmax)}
    elif spec.grid is Grid.SOFTMAX_ROW:
        found = {"coded as 0": (0 * s1, s1 / 2), "codes": (s1 / 2, torch.ones_like(s1))}
    elif spec.grid is Grid.MRQ_SOFTMAX:
        fine = s1 * fmt.qmax
        found = {"coded as 0": (0 * s1, s1 / 2), "fine region": (s1 / 2, fine)}
        found["coarse region"] = (fine, torch.maximum(s2 * fmt.qmax, fine))
    elif spec.grid is Grid.MRQ_GELU:
        found = {"negative region": (s1 * fmt.qmin, 0 * s1), "positive region": (0 * s2, s2 * fmt.qmax)}
    else:
        found = {}
    return [Region(label=label, low=low.tolist(), high=high.tolist()) for label, (low, high) in found.items()]


def _uniform(params: GridParams, scale: torch.Tensor, unit: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    fmt = params.spec.format
    if unit == CODE:
        one = torch.ones(1, dtype=torch.float64)
        return {"codes": (one * fmt.qmin, one * fmt.qmax)}
    zero = torch.zeros_like(scale) if params.zero_point is None else params.zero_point.flatten().double()
    low, high = scale * (fmt.qmin - zero), scale * (fmt.qmax - zero)
    if params.spec.role is Role.SOFTMAX:
        return {"coded as 0": (0 * scale, scale / 2), "codes": (scale / 2, high)}
    return {"codes": (low, high)}


def _edges(values: torch.Tensor, found: Iterable[Region]) -> torch.Tensor:
    """Return edges over all values, and over the ends of regions that are not far away from them."""
    low, high = float(values.min()), float(values.max())
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    ends = [end for region in found for end in (*region.low, *region.high) if low - span <= end <= high + span]
    low, high = min([low, *ends]), max([high, *ends])
    return torch.linspace(low, max(high, low + span), BINS + 1, dtype=torch.float64)


def _log_edges(values: torch.Tensor, found: Iterable[Region]) -> torch.Tensor:
    ends = [end for region in found for end in (*region.low, *region.high) if end > 0]
    positive = values[values > 0]
    low = min([float(positive.quantile(0.001)) if len(positive) else FLOOR, *ends])
    high = max([1.0, float(values.max())])
    return torch.logspace(math.log10(max(low, FLOOR)), math.log10(high), BINS + 1, dtype=torch.float64)
