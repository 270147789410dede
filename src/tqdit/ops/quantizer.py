"""Quantization of an activation, shared by all torch backends: codes are defined once."""

import torch

from tqdit.grids import regions, uniform
from tqdit.ops.schema import OperandParams


def quantize(x: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Codes of x, int8, same shape."""
    if params.grid.two_region:
        return regions.quantize(x, params.scale, params.coarse, params.bits, params.grid)
    return uniform.quantize(x, params.scale, params.zero_point, params.bits)


def dequantize(codes: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Values of codes, fp32."""
    if params.grid.two_region:
        return regions.dequantize(codes, params.scale, params.coarse, params.grid)
    return uniform.dequantize(codes, params.scale, params.zero_point)
