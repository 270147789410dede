"""Keep the parameters of an operand as one table, which kernels look up and the reference indexes."""

from typing import NamedTuple

import torch

from tqdit.ops.schema import OperandParams
from tqdit.spec import GridParams

COLUMNS = 8
SCALE, COARSE, ZERO, FACTOR, INVERSE, INVERSE_COARSE = range(6)  # the columns' order; the other two columns are zero


class Parameters(NamedTuple):
    """Parameters that broadcast to a tensor: fp32 `scale` (s1) and `coarse` (s2), int32 `zero_point` and `factor`.

    `factor`: s2 / s1 where regions merge, else 0.
    """

    scale: torch.Tensor
    coarse: torch.Tensor
    zero_point: torch.Tensor
    factor: torch.Tensor


def operand(params: GridParams) -> OperandParams:
    """Return a solved site as an operand of kernels, without the time groups of a call.

    Its table is fp32 (groups, units, COLUMNS): scale (s1), coarse scale (s2), zero point, 2^shift of merged regions or
    0, 1 / s1, 1 / s2, 0, 0. Merged GELU regions are one integer c1 or c2 2^shift from -2^(k-1); the lowest one is
    stored as the code -128, so their zero point is 2^(k-1) - 128.
    """
    spec = params.spec
    scale, coarse, zero, ratio = spec.grid.columns(params.scale, params.zero_point, spec.bits)
    nothing = torch.zeros_like(scale)
    factor = nothing if ratio is None else ratio.to(scale.dtype)
    columns = [scale, coarse, zero, factor, 1 / scale, 1 / coarse, nothing, nothing]
    table = torch.stack(columns, dim=-1).contiguous()
    return OperandParams(spec.grid, spec.bits, table, ratio is not None, channels=params.channels)


def parameters(params: OperandParams, ndim: int) -> Parameters:
    """Return an operand's parameters for a batch.

    They broadcast to a tensor (B, N, C), or (B, H, N, d) where the tensor has 4 axes.
    """
    rows = params.selected()
    shaped = rows[:, :, None, None] if ndim == 4 else rows[:, :1, None]
    scale, coarse, zero, factor = shaped.unbind(-1)[:4]
    if params.grid.two_region:
        zero = torch.zeros_like(zero)
    return Parameters(scale, coarse, zero.to(torch.int32), factor.to(torch.int32))
