"""Collect the statistics that methods use: ranges, channel maxima and rows of operands over calibration states."""

from dataclasses import dataclass, field

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.architectures.attention import Computed
from tqdit.architectures.interface import Attention, Linear
from tqdit.calibration.states import CalibrationSet
from tqdit.calibration.taps import Taps
from tqdit.sampling.guidance import arguments, predict


@dataclass
class Range:
    """The smallest and largest value of a tensor over all states."""

    low: torch.Tensor
    high: torch.Tensor

    def include(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Widen the range."""
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)


@dataclass
class Input:
    """The input of a linear layer with C channels, over all states.

    `lows` and `highs` (groups, C): the smallest and largest value of each channel in each time group. `pieces`: rows at
    random tokens of every sample, each (n, C).
    """

    lows: torch.Tensor
    highs: torch.Tensor
    pieces: list[torch.Tensor] = field(default_factory=list)

    @property
    def rows(self) -> torch.Tensor:
        """All rows, (R, C)."""
        if len(self.pieces) > 1:
            self.pieces = [torch.cat(self.pieces)]
        return self.pieces[0]

    @property
    def peaks(self) -> torch.Tensor:
        """The largest absolute value of each channel in each time group, (groups, C)."""
        return torch.maximum(self.highs, -self.lows)

    @property
    def peak(self) -> torch.Tensor:
        """The largest absolute value of each channel, (C,)."""
        return self.peaks.amax(0)

    def range(self, factor: torch.Tensor | float = 1.0) -> Range:
        """Return the range of the whole tensor after a division of each channel by its positive factor (C,)."""
        return Range((self.lows / factor).amin(), (self.highs / factor).amax())


class Observed:
    """The statistics of all operands, by their sites' names; a sink of `Taps`."""

    def __init__(self, groups: int, rows: int, seed: int = 0) -> None:
        """`rows`: how many tokens of each sample are kept of each input."""
        self.inputs: dict[str, Input] = {}
        self.operands: dict[str, Range] = {}
        self.groups, self.rows = groups, rows
        self.group = torch.zeros(0, dtype=torch.long)  # of the samples that the model computes now
        self._generator = torch.Generator().manual_seed(seed)

    def linear_input(self, linear: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Include the input of a linear layer, (B, N, C)."""
        name, shape = linear.source.name, (self.groups, x.shape[-1])
        if name not in self.inputs:
            infinite = torch.full(shape, float("inf"), device=x.device)
            self.inputs[name] = Input(infinite, -infinite)
        entry = self.inputs[name]
        index = self.group[:, None].expand(-1, x.shape[-1])
        entry.lows = entry.lows.scatter_reduce(0, index, x.amin(1), "amin")
        entry.highs = entry.highs.scatter_reduce(0, index, x.amax(1), "amax")
        tokens = torch.randperm(x.shape[1], generator=self._generator)[: self.rows].to(x.device)
        entry.pieces.append(x[:, tokens].flatten(0, 1))

    def linear_output(self, linear: Linear, module: str, z: torch.Tensor) -> None:
        """Ignore an output."""

    def attention(self, attention: Attention, computed: Computed) -> None:
        """Include query, key, value and probabilities."""
        for operand, x in zip(attention.operands, computed.operands, strict=True):
            low, high = x.amin(), x.amax()
            self.operands.setdefault(operand.name, Range(low, high)).include(low, high)


@torch.no_grad()
def observe(model: nn.Module, states: CalibrationSet, guidance: float, rows: int = 16, batch: int = 16) -> Observed:
    """Run a float model with guidance over calibration states. The model is left as it was."""
    config = registry.config_of(model)
    conditions = states.conditions or registry.conditions(config)
    device = next(model.parameters()).device
    halves = 1 if guidance == 1.0 else 2
    observed, taps = Observed(states.time_groups.num_groups, rows), Taps()
    with taps.attached(model, registry.graph(config).blocks), taps.sending_to(observed):
        for start in range(0, len(states), batch):
            part = slice(start, start + batch)
            observed.group = states.group[part].repeat(halves).to(device)
            inputs = arguments(conditions, states.labels[part].to(device), guidance)
            predict(model, states.x[part].to(device), states.t[part].to(device), *inputs, guidance)
    return observed
