"""Solve the linear layers that read one activation: its grid, scale and channel factors, and the codes of the weights.

With nearest rounding the scales of both operands are searched in turn (`alternating`). With second-order rounding the
activation's scale is chosen beside weights of 8 bits, then the weights are rounded for the inputs as they will arrive.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tqdit.calibration.records import LinearRecord
from tqdit.calibration.statistics import RangeStats
from tqdit.grids import uniform
from tqdit.plan import SitePlan, second_order_rounding
from tqdit.recipe import Recipe
from tqdit.search import objectives, operands, second_order
from tqdit.search.alternating import alternate, best_first
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand
from tqdit.spec import MAX_BITS, SiteSpec

BALANCING = (0.25, 0.5, 0.75, 1.0)  # powers of the channels' largest magnitudes that are tried as factors
SHARES = torch.linspace(1.0, 0.4, 13)  # of a channel's largest weight that are tried as its largest code


@dataclass(frozen=True)
class LinearProblem:
    """The layers that read one site.

    `weights` (out_i, in) with their sites `specs`, in float. `error_weights` (R, out) weigh squared errors of the
    outputs; None: all alike. `channel_ranges`: of every input channel, if channel factors are to be tried.
    """

    site: SitePlan
    record: LinearRecord
    ranges: RangeStats
    channel_ranges: RangeStats | None
    specs: Sequence[SiteSpec]
    weights: Sequence[torch.Tensor]
    error_weights: torch.Tensor | None
    recipe: Recipe


@dataclass(frozen=True)
class LinearSolution:
    """The activation with its chosen scale; weight scales (out,) or one for each weight, and codes (out, in)."""

    activation: Operand
    channels: torch.Tensor | None
    weight_scale: torch.Tensor
    codes: torch.Tensor


def solve(problem: LinearProblem) -> LinearSolution:
    """Return the best of all grids and channel factors of a problem; the first of equally good ones."""
    tries = [(spec, channels) for channels in _factors(problem) for spec in problem.site.tried]
    # One after the other: an attempt holds the inputs, the weights and the outputs of its layers.
    attempts = (_Attempt(problem, spec, channels) for spec, channels in tries)
    return min(attempts, key=lambda attempt: attempt.loss).solution()


class _Attempt:
    """A problem on one grid, with channel factors or without."""

    def __init__(self, problem: LinearProblem, spec: SiteSpec, channels: torch.Tensor | None) -> None:
        self.problem, self.channels, self.recipe = problem, channels, problem.recipe
        record, ranges = problem.record, problem.ranges
        x, weights = record.x, list(problem.weights)
        if channels is not None:
            assert problem.channel_ranges is not None
            ranges = problem.channel_ranges.scaled(channels).over_units()
            x, weights = x * channels, [weight / channels for weight in weights]
        self.x = operands.activation(spec, x, record.group, ranges, problem.site.merging)
        self.w = operands.weight(list(problem.specs), weights)
        self.objective = MatmulObjective.weighted(objectives.linear, x, self.w.values, problem.error_weights)
        if second_order_rounding(self.recipe):
            # The scale is chosen beside weights of 8 bits; the loss is that with weights of their own bits.
            fine = operands.weight([replace(spec, bits=MAX_BITS) for spec in problem.specs], weights)
            self.x = best_first(self.objective, self.x, fine, self.recipe)
            self.loss = float(self.objective.loss(self.x.fake(), self.w.fake()).sum())
        else:
            self.x, self.w, self.loss = alternate(self.objective, self.x, self.w, self.recipe)

    @property
    def hessian(self) -> torch.Tensor:
        """Return the mixed Hessian of the inputs as the layers read them, fp64 (in, in)."""
        weights = self.problem.error_weights
        rows = None if weights is None else weights.mean(1)
        return second_order.hessian(self.x.fake(), rows, self.recipe.mix, site=self.x.spec.name)

    def solution(self) -> LinearSolution:
        """Return the chosen parameters, and the codes of the weights."""
        bits, values = self.w.spec.bits, self.w.values
        scale, site = self.w.scale[0], self.problem.specs[0].name
        if not second_order_rounding(self.recipe):
            codes = uniform.quantize(values, scale[self.w.unit][:, None], 0, bits)
        elif len(scale) == len(values):
            shares = SHARES if self.recipe.rounds else SHARES[:1]
            scale, codes = second_order.scaled_codes(values, self.hessian, bits, shares, site=site)
        else:
            codes = second_order.round_weights(values, scale[self.w.unit], self.hessian, bits, site=site)
        return LinearSolution(self.x, self.channels, scale, codes)


def _factors(problem: LinearProblem) -> list[torch.Tensor | None]:
    """Return the channel factors to try, none first: powers of the largest magnitudes, of which the largest is 1."""
    ranges = problem.channel_ranges
    if ranges is None:
        return [None]
    magnitude = torch.maximum(ranges.low.abs(), ranges.high.abs()).amax(0)
    middle = magnitude.median().clamp(min=uniform.SMALLEST)
    relative = (magnitude / middle).clamp(2.0**-4, 2.0**8)
    tried: list[torch.Tensor | None] = [None]
    for power in BALANCING:
        factors = relative**-power
        tried.append(factors / factors.amax())
    return tried
