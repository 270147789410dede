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
from tqdit.ops.rotation import rotate
from tqdit.plan import SitePlan, second_order_rounding
from tqdit.recipe import Recipe
from tqdit.search import objectives, operands, second_order
from tqdit.search.alternating import alternate, best_first
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand
from tqdit.spec import MAX_BITS, SiteSpec

BALANCING = (0.25, 0.5, 0.75, 1.0)  # powers of the channels' largest magnitudes that are tried as factors
# Factors reach channels this many times as large as the median: after GELU, and where inputs are quantized apart, whose
# largest channels may be 10,000 times as large as the others. A channel is enlarged 16 times at most: values that
# calibration did not see may be larger.
LARGEST, LARGEST_APART, SMALLEST = 2.0**8, 2.0**16, 2.0**-4
SHARES = torch.linspace(1.0, 0.4, 13)  # of a channel's largest weight that are tried as its largest code


@dataclass(frozen=True)
class LinearProblem:
    """The layers that read one site.

    `weights` (out_i, in) with their sites `specs`, in the model's dtype. `error_weights` (R, out) weigh squared errors
    of the outputs; None: all alike. `channel_ranges`: of every input channel, if channel factors are to be tried.
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
    """The activation with its chosen scale; weight scales (out,) or one for each weight, and codes (out, in).

    `sqnr`: of the outputs in dB, if the site asks for it: with the inputs as coded, beside weights of 8 bits that are
    rounded to nearest. So it says what the inputs cost, however many bits the weights have.
    """

    activation: Operand
    channels: torch.Tensor | None
    weight_scale: torch.Tensor
    codes: torch.Tensor
    sqnr: float | None = None


def solve(problem: LinearProblem) -> LinearSolution:
    """Return the best of all grids and channel factors of a problem; the first of equally good ones."""
    tries = [(spec, channels) for channels in _factors(problem) for spec in problem.site.tried]
    # One after the other: an attempt holds the inputs, the weights and the outputs of its layers.
    attempts = (_Attempt(problem, spec, channels) for spec, channels in tries)
    return min(attempts, key=lambda attempt: attempt.loss).solution()


class _Attempt:
    """A problem on one grid, with channel factors or without. It keeps what was chosen, and no operand."""

    def __init__(self, problem: LinearProblem, spec: SiteSpec, channels: torch.Tensor | None) -> None:
        self.problem, self.spec, self.channels, self.recipe = problem, spec, channels, problem.recipe
        x, w = self._operands()
        objective = MatmulObjective.weighted(objectives.linear, x.values, w.values, problem.error_weights)
        if second_order_rounding(self.recipe):
            # The scale is chosen beside weights of 8 bits; the loss is that with weights of their own bits.
            x = best_first(objective, x, self._of_most_bits(w), self.recipe)
            self.loss = float(objective.loss(x.fake(), w.fake()).sum())
        else:
            x, w, self.loss = alternate(objective, x, w, self.recipe)
        self.x_scale, self.w_scale = x.scale, w.scale

    def solution(self) -> LinearSolution:
        """Return the chosen parameters, and the codes of the weights."""
        x, w = self._operands()
        x, w = x.with_scale(self.x_scale), w.with_scale(self.w_scale)
        sqnr = None if self.problem.site.fallback is None else self._sqnr(x, self._of_most_bits(w))
        bits, scale, site = w.spec.bits, w.scale[0], self.problem.specs[0].name
        if not second_order_rounding(self.recipe):
            codes = uniform.quantize(w.values, scale[w.unit][:, None], 0, bits)
        elif len(scale) == len(w.values):
            shares = SHARES if self.recipe.rounds else SHARES[:1]
            scale, codes = second_order.scaled_codes(w.values, self._hessian(x), bits, shares, site=site)
        else:
            codes = second_order.round_weights(w.values, scale[w.unit], self._hessian(x), bits, site=site)
        return LinearSolution(x, self.channels, scale, codes, sqnr)

    def _operands(self) -> tuple[Operand, Operand]:
        """Return inputs and weights at their min-max scales, with channel factors and rotation."""
        problem, channels = self.problem, self.channels
        x, weights = problem.record.x.float(), [weight.float() for weight in problem.weights]
        ranges, rotation = problem.ranges, problem.site.rotation
        if channels is not None:
            assert problem.channel_ranges is not None
            ranges = problem.channel_ranges.scaled(channels).over_units()
            x, weights = x * channels, [weight / channels for weight in weights]
        if rotation:
            x, weights = rotate(x, rotation), [rotate(weight, rotation) for weight in weights]
        activation = operands.activation(self.spec, x, problem.record.group, ranges, problem.site.merging)
        return activation, operands.weight(list(problem.specs), weights)

    def _of_most_bits(self, w: Operand) -> Operand:
        """Return the weights with 8 bits, at their min-max scales."""
        return operands.weight(
            [replace(spec, bits=MAX_BITS) for spec in self.problem.specs],
            list(w.values.split([len(weight) for weight in self.problem.weights])),
        )

    def _hessian(self, x: Operand) -> torch.Tensor:
        """Return the mixed Hessian of the inputs as the layers read them, fp64 (in, in)."""
        weights = self.problem.error_weights
        rows = None if weights is None else weights.mean(1)
        return second_order.hessian(x.fake(), rows, self.recipe.mix, site=x.spec.name)

    @staticmethod
    def _sqnr(x: Operand, w: Operand) -> float:
        target = objectives.linear(x.values, w.values)
        return objectives.sqnr_db(target, objectives.linear(x.fake(), w.fake()))


def float_input(problem: LinearProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales (out,) and codes (out, in) of the weights of a problem whose layers take float inputs.

    The sites `specs` have a scale for each output channel. The codes are rounded by second order.
    """
    weight = torch.cat([weight.float() for weight in problem.weights])
    error_weights = problem.error_weights
    rows = None if error_weights is None else error_weights.mean(1)
    site, bits = problem.specs[0].name, problem.specs[0].bits
    hessian = second_order.hessian(problem.record.x.float(), rows, problem.recipe.mix, site=problem.site.spec.name)
    return second_order.scaled_codes(weight, hessian, bits, SHARES, site=site)


def relative_weights(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return error weights (R, out) of layers without Fisher weights: each row counts relative to its own outputs."""
    outputs = torch.cat([objectives.linear(x.float(), weight.float()) for weight in weights], 1)
    return objectives.row_weights(outputs)[:, None].expand(outputs.shape)


def _factors(problem: LinearProblem) -> list[torch.Tensor | None]:
    """Return the channel factors to try, none first: powers of the largest magnitudes, of which the largest is 1."""
    ranges = problem.channel_ranges
    if ranges is None:
        return [None]
    magnitude = torch.maximum(ranges.low.abs(), ranges.high.abs()).amax(0)
    middle = magnitude.median().clamp(min=uniform.SMALLEST)
    relative = (magnitude / middle).clamp(SMALLEST, LARGEST_APART if problem.site.apart else LARGEST)
    tried: list[torch.Tensor | None] = [None]
    for power in BALANCING:
        factors = relative**-power
        tried.append(factors / factors.amax())
    return tried
