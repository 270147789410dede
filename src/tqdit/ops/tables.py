"""The parameters of an operand as one table, for kernels that look a sample's time group up themselves."""

import torch

from tqdit.ops.schema import OperandParams
from tqdit.spec import Grid

COLUMNS = 8  # scale (s1), coarse (s2), zero point, 2^shift, 1 / scale, 1 / coarse, 0, 0
OFFSET = 128  # what is taken from the unsigned integer of merged regions to make it int8


def parameter_table(params: OperandParams) -> torch.Tensor:
    """fp32 (rows, units, COLUMNS); rows are time groups, or samples if selected.

    Merged GELU regions are one integer c1 or c2 2^shift from -2^(k-1); its lowest value is stored as the code -128, so
    their zero point is 2^(k-1) - 128.
    """
    units = params.scale.shape[1] if params.scale.ndim == 4 else 1
    shape = (params.scale.shape[0], units)
    zero = params.zero_point.expand(params.scale.shape).reshape(shape).float()
    factor = torch.zeros_like(zero)
    if params.shift is not None:
        factor = (1 << params.shift).expand(params.scale.shape).reshape(shape).float()
        if params.grid is Grid.MRQ_GELU:
            zero = torch.full_like(zero, (1 << (params.bits - 1)) - OFFSET)
    scale, coarse = params.scale.reshape(shape), params.coarse.expand(params.scale.shape).reshape(shape)
    nothing = torch.zeros_like(scale)
    columns = [scale, coarse, zero, factor, 1 / scale, 1 / coarse, nothing, nothing]
    return torch.stack(columns, dim=-1).contiguous()
