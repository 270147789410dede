"""Quantize an activation. All torch backends share this one definition of codes."""

import torch

from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import parameters


def quantize(x: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Return the codes of x, int8, in its shape: (B, N, C) or (B, H, N, d)."""
    p = parameters(params, x.ndim)
    return params.grid.quantize(x, p.scale, p.coarse, p.zero_point, params.bits)


def dequantize(codes: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Return the values of codes, fp32."""
    p = parameters(params, codes.ndim)
    return params.grid.dequantize(codes, p.scale, p.coarse, p.zero_point)
