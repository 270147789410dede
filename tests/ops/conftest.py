"""Random operands, and their values in float64 computed without the code under test."""

from collections.abc import Callable

import pytest
import torch

from tqdit.ops.schema import OperandParams, WeightParams
from tqdit.spec import Grid

SIGN = {Grid.MRQ_GELU: 1.0, Grid.MRQ_SOFTMAX: -1.0}


def positive(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape) * 0.1 + 0.01


@pytest.fixture
def operand() -> Callable[..., tuple[torch.Tensor, OperandParams]]:
    """Codes of a shape and parameters of `lead` samples (1 or B) and `units` heads; zero points are never all 0."""

    def make(
        shape: tuple[int, ...], grid: Grid = Grid.UNIFORM, lead: int = 1, units: int = 1, bits: int = 8
    ) -> tuple[torch.Tensor, OperandParams]:
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, shape, dtype=torch.int8)
        broadcast = (lead, units, 1, 1) if len(shape) == 4 else (lead, 1, 1)
        zero_point = torch.randint(-half, half, broadcast, dtype=torch.int32) | 1
        return codes, OperandParams(grid, bits, positive(broadcast), zero_point, positive(broadcast) * 4)

    return make


@pytest.fixture
def weight() -> Callable[..., WeightParams]:
    def make(out: int, inner: int, per_channel: bool = True, bits: int = 8) -> WeightParams:
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (out, inner), dtype=torch.int8)
        return WeightParams(codes, positive((out if per_channel else 1,)), codes.sum(1, dtype=torch.int32))

    return make


@pytest.fixture
def exact() -> Callable[[torch.Tensor, OperandParams], torch.Tensor]:
    """Dequantized values in float64."""

    def value(codes: torch.Tensor, params: OperandParams) -> torch.Tensor:
        c = codes.double()
        if params.grid is Grid.UNIFORM:
            return (c - params.zero_point.double()) * params.scale.double()
        fine = SIGN[params.grid] * params.scale.double()
        return torch.where(c < 0, c * fine, c * params.coarse.double())

    return value
