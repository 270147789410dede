"""Streaming, mergeable ranges of every activation site, per time group."""

from dataclasses import dataclass

import torch

from tqdit.errors import InputError

MASKED = -1000.0  # a key with a lower bias has probability 0 in fp32, whatever its score


def extremes(x: torch.Tensor, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest value of each sample, (B, units).

    x is (B, N, C) with one unit, or (B, H, N, C) with H units. `kept` (B, N): the tokens that count; by default all.
    """
    reduced = (1, 2) if x.ndim == 3 else (2, 3)
    low = high = x
    if kept is not None:
        out = ~(kept[..., None] if x.ndim == 3 else kept[:, None, :, None])
        low, high = x.masked_fill(out, float("inf")), x.masked_fill(out, -float("inf"))
    return low.amin(reduced).reshape(len(x), -1), high.amax(reduced).reshape(len(x), -1)


def kept_keys(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return which keys (B, M) keep some probability under a bias, or None where all keys do.

    Where a sample's keys are all masked alike, the softmax cancels the bias: all of them count.
    """
    if bias is None:
        return None
    kept = bias > MASKED
    return kept | ~kept.any(1, keepdim=True)


@dataclass(frozen=True)
class RangeStats:
    """The smallest and largest value of one site, each (groups, units)."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def empty(cls, groups: int, units: int, device: torch.device | None = None) -> "RangeStats":
        """Return a range that contains no value yet."""
        inf = torch.full((groups, units), float("inf"), device=device)
        return cls(inf, -inf)

    def update(self, x: torch.Tensor, group: torch.Tensor) -> "RangeStats":
        """Include the values of x, (B, N, C) with one unit or (B, H, N, C) with H units.

        `group`: (B,). All tensors are on one device.
        """
        return self.include(*extremes(x), group)

    def include(self, low: torch.Tensor, high: torch.Tensor, group: torch.Tensor) -> "RangeStats":
        """Include the `extremes` of samples."""
        index = group[:, None].expand(-1, low.shape[1])
        return RangeStats(
            self.low.scatter_reduce(0, index, low, "amin"), self.high.scatter_reduce(0, index, high, "amax")
        )

    def merge(self, other: "RangeStats") -> "RangeStats":
        """Return the range that contains the values of both."""
        return RangeStats(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def pooled(self, groups: int) -> "RangeStats":
        """Return the range with all groups as one if the site is not time-grouped."""
        if groups == len(self.low):
            return self
        assert groups == 1
        return RangeStats(self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True))

    def check_finite(self, site: str) -> None:
        """Raise `InputError` naming `site` and the first time group with a range that is NaN, Inf or of no value."""
        bad = ~(torch.isfinite(self.low) & torch.isfinite(self.high)).all(1)
        if bad.any():
            raise InputError(
                f"site '{site}': values are not finite in time group {int(bad.int().argmax())} of {len(bad)}, no scale "
                "can represent them"
            )

    def scaled(self, factors: torch.Tensor) -> "RangeStats":
        """Return the range of values times positive factors, one for each unit."""
        return RangeStats(self.low * factors, self.high * factors)

    def over_units(self) -> "RangeStats":
        """Return the range with the units as one, for a site whose scale they share."""
        return RangeStats(self.low.amin(1, keepdim=True), self.high.amax(1, keepdim=True))
