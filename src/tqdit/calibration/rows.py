"""Keep what calibration picks of one site of a traced model, call by call."""

import random
from collections.abc import Callable

import torch

from tqdit.calibration.statistics import RangeStats
from tqdit.graph import Graph, Linear


class Site:
    """One input of linear layers: its ranges on the model's device, and its picked rows on the CPU.

    `rows`, `groups` and `fisher` have a part for each time that a call reached the layers: x (k, in), the time group of
    each row, and the mean squared gradients of the outputs (k, out). `tokens`: rows that passed in all calls. `finite`:
    whether each input of the call at hand had only finite values.
    """

    def __init__(self, linear: Linear, graph: Graph, groups: int) -> None:
        self.name, self.modules = linear.source.name, linear.modules
        self.outs = [graph.shapes[name][0] for name in linear.weights]
        self.count = groups if linear.source.timed else 1
        self.rows: list[torch.Tensor] = []
        self.groups: list[torch.Tensor] = []
        self.fisher: list[torch.Tensor] = []
        self.finite: list[torch.Tensor] = []
        self.tokens = 0
        self._channels: RangeStats | None = None
        self._index: torch.Tensor | None = None  # the picked rows of the input at hand

    def begin(self, call: int, group: int, rows: int, seed: int) -> None:
        """Start a call of a time group, of which `rows` rows are to be kept."""
        self.finite, self._wanted = [], rows
        self._group = group if self.count > 1 else 0
        self._random = random.Random(f"rows {seed} {call} {self.name}")

    def take(self, x: torch.Tensor) -> None:
        """Include an input x (..., in) in the ranges, and pick rows of it."""
        if not x.numel():
            self._index = None
            return
        flat = x.reshape(-1, x.shape[-1])
        low, high = (end.float()[None] for end in flat.aminmax(dim=0))
        self.finite.append((low.isfinite() & high.isfinite()).all())
        if self._channels is None:
            self._channels = RangeStats.empty(self.count, x.shape[-1], x.device)
        self._channels = self._channels.include(low, high, torch.tensor([self._group], device=x.device))
        self.tokens += len(flat)
        index = _drawn(self._random, len(flat), self._wanted)
        self._index = index.to(x.device)
        self.rows.append(flat[self._index].cpu())
        self.groups.append(torch.full_like(index, self._group))

    def squares(self, place: int, probes: int) -> Callable[[torch.Tensor], None]:
        """Return a hook that adds the squared gradients of the outputs of layer `place` at the picked rows."""
        self._pad()
        index, kept = self._index, self.fisher[-1]
        first = sum(self.outs[:place])

        def hook(gradient: torch.Tensor) -> None:
            if index is not None:
                picked = gradient.reshape(-1, gradient.shape[-1])[index].float().square_().div_(probes)
                kept[:, first : first + self.outs[place]] += picked.to(kept)

        return hook

    def ranges(self) -> tuple[RangeStats, RangeStats]:
        """Return the range of all values, (groups, 1), and that of every channel, (groups, in), on the CPU.

        A time group whose calls do not reach the layers gets the range of all groups.
        """
        assert self._channels is not None
        low, high = self._channels.low.cpu(), self._channels.high.cpu()
        reached = low <= high
        low, high = torch.where(reached, low, low.amin(0)), torch.where(reached, high, high.amax(0))
        channels = RangeStats(low, high)
        return channels.over_units(), channels

    def chosen(self, most: int, seed: int) -> torch.Tensor:
        """Return indices of at most `most` of all rows, in order."""
        return _drawn(random.Random(f"all rows {seed} {self.name}"), sum(map(len, self.rows)), most)

    def weights(self) -> torch.Tensor | None:
        """Return the mean squared gradients at all rows, or None if no output had a gradient."""
        if not self.fisher:
            return None
        self._pad()
        return torch.cat(self.fisher)

    def _pad(self) -> None:
        """Let every part of the rows have a part of squares; zeros where the model's output did not depend on them."""
        for rows in self.rows[len(self.fisher) :]:
            dtype = torch.bfloat16 if rows.dtype is torch.bfloat16 else torch.float32  # fp16 would lose small squares
            self.fisher.append(torch.zeros(len(rows), sum(self.outs), dtype=dtype))


def _drawn(source: random.Random, among: int, count: int) -> torch.Tensor:
    """Return at most `count` different indices of `among`, in order."""
    return torch.tensor(sorted(source.sample(range(among), min(among, count))))
