"""Streaming, mergeable ranges of every activation site, per time group."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RangeStats:
    """Smallest and largest value of one site, each (groups, units)."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def empty(cls, groups: int, units: int, device: torch.device | None = None) -> "RangeStats":
        inf = torch.full((groups, units), float("inf"), device=device)
        return cls(inf, -inf)

    def update(self, x: torch.Tensor, group: torch.Tensor) -> "RangeStats":
        """Take in x, (B, N, C) with one unit or (B, H, N, C) with H units; `group`: (B,); all on one device."""
        reduced = (1, 2) if x.ndim == 3 else (2, 3)
        low, high = x.amin(reduced).reshape(len(x), -1), x.amax(reduced).reshape(len(x), -1)
        index = group[:, None].expand(-1, low.shape[1])
        return RangeStats(
            self.low.scatter_reduce(0, index, low, "amin"), self.high.scatter_reduce(0, index, high, "amax")
        )

    def merge(self, other: "RangeStats") -> "RangeStats":
        return RangeStats(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def pooled(self, groups: int) -> "RangeStats":
        """All groups as one if the site is not time-grouped."""
        if groups == len(self.low):
            return self
        assert groups == 1
        return RangeStats(self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True))

    def over_units(self) -> "RangeStats":
        """The units as one, for a site whose scale they share."""
        return RangeStats(self.low.amin(1, keepdim=True), self.high.amax(1, keepdim=True))
