"""Define the time groups of TGQ. No other module maps a timestep to a group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from tqdit.errors import InputError

MAX_EDGES = 10**4
MAX_TIMESTEPS = 10**6  # bounded, since a model may have a table of all whole timesteps


@dataclass(frozen=True)
class TimeGroups:
    """Groups of timesteps between edges: the group of t is the number of edges <= t, so groups are numbered from 0.

    Timesteps are in the units of the model's own `timestep` argument. They lie in [low, high), or in [low, high] if
    `closed`. The mapping depends on neither sampler nor step count, and samples of a batch may be in different groups.
    No group is empty.

    Raises `InputError` for edges that are not finite, do not increase, or lie outside the range.
    """

    edges: tuple[float, ...]
    low: float
    high: float
    closed: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = _number(name, getattr(self, name))
            if not abs(value) <= MAX_TIMESTEPS:
                raise InputError(f"{name} must be between -{MAX_TIMESTEPS} and {MAX_TIMESTEPS}, got {value}")
            object.__setattr__(self, name, value)
        if type(self.closed) is not bool:
            raise InputError(f"closed must be true or false, got {self.closed!r}")
        if not self.low < self.high:
            raise InputError(f"low must be less than high, got {self.interval}")
        if len(self.edges) > MAX_EDGES:
            raise InputError(f"there may be {MAX_EDGES} edges of time groups at most, got {len(self.edges)}")
        object.__setattr__(self, "edges", tuple(_number("an edge", edge) for edge in self.edges))
        before = self.low
        for edge in self.edges:
            if not (before < edge < self.high or (self.closed and before < edge == self.high)):
                raise InputError(f"edges must increase strictly inside {self.interval}, got {edge} after {before}")
            before = edge

    @classmethod
    def uniform(cls, low: float, high: float, groups: int, closed: bool = False) -> Self:
        """Make groups of equal length, the paper's: G_i = {t : (i-1)T/G <= t < iT/G}.

        If `low` and `high` are of type int and the range is not closed, it is a range of whole timesteps. Its edges are
        whole, too, so a fraction is in the group of its floor.
        """
        whole = type(low) is int and type(high) is int and not closed
        most = min(high - low, MAX_EDGES + 1) if whole else MAX_EDGES + 1
        if type(groups) is not int or not 1 <= groups <= max(most, 1):
            of = f", the number of timesteps in [{low}, {high})" if whole and most == high - low else ""
            raise InputError(f"groups must be between 1 and {most}{of}, got {groups!r}")
        if whole:
            return cls(tuple(low - (-i * (high - low) // groups) for i in range(1, groups)), low, high)
        return cls(tuple(low + i * (high - low) / groups for i in range(1, groups)), low, high, closed)

    @classmethod
    def visited(
        cls, timesteps: Sequence[float] | torch.Tensor, groups: int, low: float, high: float, closed: bool = False
    ) -> Self:
        """Make groups of about equally many of the distinct `timesteps` that a pipeline visits, cut at midpoints.

        Every group has at least one of the timesteps: there are as many groups as distinct timesteps if that is fewer.
        Raises `InputError` for a timestep outside the range, and if there is none.
        """
        t = torch.as_tensor(timesteps, dtype=torch.float64).flatten()
        cls((), low, high, closed).index(t)
        passed = t.unique().tolist()
        if type(groups) is not int or groups < 1:
            raise InputError(f"groups must be at least 1, got {groups!r}")
        if not passed:
            raise InputError("time groups of visited timesteps need at least one timestep")
        count = min(groups, len(passed))
        cuts = [i * len(passed) // count for i in range(1, count)]
        return cls(tuple(_between(passed[i - 1], passed[i]) for i in cuts), low, high, closed)

    @property
    def num_groups(self) -> int:
        """Return the number of groups."""
        return len(self.edges) + 1

    @property
    def num_timesteps(self) -> int | None:
        """Return T for a discrete process, whose timesteps are 0 to T - 1; None for any other range."""
        return int(self.high) if self.low == 0 and self.high.is_integer() and not self.closed else None

    @property
    def interval(self) -> str:
        """Return the range as text, such as "[0, 1000)"."""
        return f"[{_text(self.low)}, {_text(self.high)}{']' if self.closed else ')'}"

    @property
    def summary(self) -> str:
        """Return text for people, such as "10 of 1000 training timesteps"."""
        total = self.num_timesteps
        return f"{self.num_groups} " + (f"of {total} training timesteps" if total else f"in {self.interval}")

    def index(self, t: torch.Tensor) -> torch.Tensor:
        """Return the group of each timestep as int64, in the shape and on the device of t.

        `t`: timesteps of any shape and any real type. This function reads values, so it is for host code; modules use
        `edges_tensor`, which waits for no device. Raises `InputError` for a timestep outside the range and for NaN.
        """
        exact = t.double()
        inside = (exact >= self.low) & ((exact <= self.high) if self.closed else (exact < self.high))
        if not inside.all():
            raise InputError(f"timestep {t[~inside][0].item()} is outside {self.interval}")
        return torch.bucketize(exact, self.edges_tensor(t.device), right=True)

    def edges_tensor(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """Return the edges, (G - 1,) fp64: `torch.bucketize(t.double(), edges, right=True)` are the groups of t.

        `bucketize` puts timesteps outside the range into the first or the last group.
        """
        return torch.tensor(self.edges, dtype=torch.float64, device=device)

    def bounds(self, group: int) -> tuple[float, float]:
        """Return the first timestep of a group, and the first of the next group, or `high`."""
        ends = (self.low, *self.edges, self.high)
        return ends[group], ends[group + 1]


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _between(first: float, second: float) -> float:
    """Return the midpoint, or the second number where no number is between the two: an edge that separates them."""
    middle = (first + second) / 2
    return middle if middle > first else second


def _text(value: float) -> str:
    return str(int(value)) if value.is_integer() else str(value)
