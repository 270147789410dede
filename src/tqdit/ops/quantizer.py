"""Quantize an activation. All torch backends share this one definition of codes."""

import torch

from tqdit.grids.row import row_scales
from tqdit.grids.uniform import quantize as uniform_codes
from tqdit.ops.schema import Codes, OperandParams, RowCodes
from tqdit.ops.tables import parameters
from tqdit.spec import Grid


def quantize(x: torch.Tensor, params: OperandParams) -> Codes:
    """Return the codes of x, int8, in its shape: (B, N, C) or (B, H, N, d).

    On the grid of rows they are `RowCodes`. Channel factors belong to an x of three axes.
    """
    if params.channels is not None:
        x = x.float() * params.channels
    if params.grid is not Grid.ROW:
        return plain_codes(x, params)
    scale = row_scales(x, parameters(params, x.ndim).scale)
    return RowCodes(uniform_codes(x, scale, 0, params.bits), scale.squeeze(-1))


def plain_codes(x: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Return the codes of x, int8, on any grid but that of rows; channel factors are in x already."""
    p = parameters(params, x.ndim)
    return params.grid.quantize(x, p.scale, p.coarse, p.zero_point, params.bits)


def dequantize(codes: Codes, params: OperandParams) -> torch.Tensor:
    """Return the values of codes as the layer's weight reads them, fp32: channel factors stay multiplied in."""
    if isinstance(codes, RowCodes):
        return codes.codes.float() * codes.scale[..., None]
    p = parameters(params, codes.ndim)
    return params.grid.dequantize(codes, p.scale, p.coarse, p.zero_point)
