"""Random operands, and their values in float64 computed without the code under test."""

from collections.abc import Callable

import pytest
import torch

from tqdit.ops.schema import OperandParams, WeightParams
from tqdit.spec import Grid

SIGN = {Grid.MRQ_GELU: 1.0, Grid.MRQ_SOFTMAX: -1.0}
SCALE, COARSE, ZERO, FACTOR = range(4)  # columns of a table


def positive(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape) * 0.1 + 0.01


@pytest.fixture
def operand() -> Callable[..., tuple[torch.Tensor, OperandParams]]:
    """Codes of a shape and parameters of `lead` samples (1 or B) and `units` heads; zero points are never all 0.

    Samples have other rows of a larger table, not in its order; one row is a table of its own. `size` multiplies all
    scales. `zeros`: how far zero points are from 0 at most. `shift`: of merged regions, s2 = s1 2^shift.
    """

    def make(
        shape: tuple[int, ...],
        grid: Grid = Grid.UNIFORM,
        lead: int = 1,
        units: int = 1,
        bits: int = 8,
        size: float = 1.0,
        zeros: int | None = None,
        shift: int | None = None,
    ) -> tuple[torch.Tensor, OperandParams]:
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, shape, dtype=torch.int8)
        rows = 1 if lead == 1 else lead + 2
        table = torch.zeros(rows, units, 8)
        table[..., SCALE], table[..., COARSE] = positive((rows, units)) * size, positive((rows, units)) * size * 4
        table[..., ZERO] = torch.randint(-(zeros or half), zeros or half, (rows, units)) | 1
        if shift is not None:
            table[..., COARSE], table[..., FACTOR] = table[..., SCALE] * 2.0**shift, 2.0**shift
        table[..., 4], table[..., 5] = 1 / table[..., SCALE], 1 / table[..., COARSE]
        group = None if lead == 1 else torch.randperm(rows)[:lead]
        return codes, OperandParams(grid, bits, table, shift is not None, group)

    return make


@pytest.fixture
def column() -> Callable[[OperandParams, int, int], torch.Tensor]:
    """A column of the table for the samples of a call, to broadcast to 3 or 4 axes."""

    def pick(params: OperandParams, index: int, ndim: int) -> torch.Tensor:
        rows = params.table if params.group is None else torch.stack([params.table[int(g)] for g in params.group])
        return rows[:, :, index].reshape(len(rows), -1, *[1] * (ndim - 2))

    return pick


@pytest.fixture
def weight() -> Callable[..., WeightParams]:
    def make(out: int, inner: int, per_channel: bool = True, bits: int = 8) -> WeightParams:
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (out, inner), dtype=torch.int8)
        return WeightParams(codes, positive((out if per_channel else 1,)), bits, codes.sum(1, dtype=torch.int32))

    return make


@pytest.fixture
def exact(column) -> Callable[[torch.Tensor, OperandParams], torch.Tensor]:
    """Dequantized values in float64."""

    def value(codes: torch.Tensor, params: OperandParams) -> torch.Tensor:
        c = codes.double()
        scale, coarse, zero = (column(params, index, c.ndim).double() for index in (SCALE, COARSE, ZERO))
        if params.grid is Grid.UNIFORM:
            return (c - zero) * scale
        return torch.where(c < 0, c * SIGN[params.grid] * scale, c * coarse)

    return value
