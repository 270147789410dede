"""Quantize and dequantize in float: the grids that the methods share.

Activations have asymmetric grids whose range contains 0, so that a zero stays a zero. Weights have symmetric grids of
2^b - 1 levels, except where a method says asymmetric. Rounding is half to even. A range of 0 has the step 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

Quantizer = Callable[[torch.Tensor], torch.Tensor]  # values to the values that their codes stand for
SMALLEST = torch.finfo(torch.float32).tiny
SHRINKS = torch.linspace(1.0, 0.5, 26).tolist()  # of a weight's range, tried by least squared error


@dataclass(frozen=True)
class Grid:
    """Steps and the codes of both ends of a uniform grid with 0 at code 0; all broadcast to the values."""

    step: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest values of the grid."""
        return torch.round(x / self.step).clamp(self.lowest, self.highest).mul(self.step)

    def expanded(self, shape: torch.Size) -> "Grid":
        """Return the same grid with every tensor of the shape of the values."""
        return Grid(*(part.expand(shape) for part in (self.step, self.lowest, self.highest)))


def asymmetric(low: torch.Tensor, high: torch.Tensor, bits: int) -> Grid:
    """Return the grid of 2^bits levels over the range from low to high, widened to contain 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step < SMALLEST, 1.0, step)
    lowest = torch.round(low / step)
    return Grid(step, lowest, lowest + (2**bits - 1))


def symmetric(magnitude: torch.Tensor, bits: int) -> Grid:
    """Return the grid of 2^bits - 1 levels over the range from -magnitude to magnitude."""
    most = 2 ** (bits - 1) - 1
    step = magnitude / most
    step = torch.where(step < SMALLEST, 1.0, step)
    return Grid(step, torch.full_like(step, -most), torch.full_like(step, most))


def static(low: torch.Tensor, high: torch.Tensor, bits: int) -> Quantizer:
    """Return a quantizer with one fixed asymmetric range for the whole tensor."""
    return asymmetric(low, high, bits)


def rows(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize each row, the last dimension, with an asymmetric grid over the row's own values."""
    return asymmetric(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)(x)


def by_rows(bits: int) -> Quantizer:
    """Return the quantizer `rows` at a bit-width."""
    return partial(rows, bits=bits)


def grouped(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Quantize each group of `group` channels of each row with an asymmetric grid over the group's own values."""
    return rows(x.unflatten(-1, (-1, group)), bits).flatten(-2)


def per_tensor(weight: torch.Tensor, bits: int) -> Grid:
    """Return the symmetric min-max grid of a whole weight."""
    return symmetric(weight.abs().amax().reshape(1, 1), bits)


def per_channel(weight: torch.Tensor, bits: int) -> Grid:
    """Return the symmetric min-max grid of each output channel of a weight (out, in)."""
    return symmetric(weight.abs().amax(1, keepdim=True), bits)


def per_channel_clipped(weight: torch.Tensor, bits: int, rows: torch.Tensor) -> Grid:
    """Return the symmetric grid of each output channel whose range, a part of the min-max range, has the least error.

    The error is the sum of squared differences of the weights, each times the mean square of its input over `rows`
    (R, in): the error of the output if inputs were independent. Ranges from the whole one to half of it are tried.
    """
    importance = rows.square().mean(0)
    whole = weight.abs().amax(1, keepdim=True)
    best, least = whole, torch.full_like(whole, float("inf"))
    for shrink in SHRINKS:
        error = (symmetric(whole * shrink, bits)(weight) - weight).square() @ importance[:, None]
        best, least = torch.where(error < least, whole * shrink, best), torch.minimum(error, least)
    return symmetric(best, bits)


def per_group(weight: torch.Tensor, bits: int, group: int) -> Grid:
    """Return the asymmetric min-max grid of each group of `group` input channels of each output channel.

    The parts of the grid have the shape of the weight.
    """
    parts = weight.unflatten(1, (-1, group))
    grid = asymmetric(parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True), bits).expanded(parts.shape)
    return Grid(*(part.flatten(1) for part in (grid.step, grid.lowest, grid.highest)))
