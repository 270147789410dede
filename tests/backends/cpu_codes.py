"""Codes in the layouts of the CPU backend, and back."""

from typing import Any

import torch

from tqdit.backends.cpu import NativeCpu
from tqdit.backends.onednn import SIGN
from tqdit.ops.schema import Codes, OperandParams, RowCodes
from tqdit.ops.tables import parameters
from tqdit.spec import Grid


def given_codes(run: Any, codes: Codes, params: OperandParams) -> Any:
    """Signed codes in the layout of a backend."""
    if not isinstance(run, NativeCpu):
        return codes
    if isinstance(codes, RowCodes):
        return codes._replace(codes=codes.codes.view(torch.uint8) ^ SIGN)
    if params.grid is Grid.UNIFORM:
        return codes.view(torch.uint8) ^ SIGN
    if params.merged:
        shifted = torch.where(codes < 0, codes.int(), codes.int() * parameters(params, codes.ndim).factor)
        return (shifted + (1 << (params.bits - 1))).to(torch.uint8)
    return torch.stack([(-codes.int().clamp(max=0)).to(torch.uint8), codes.clamp(min=0).to(torch.uint8)])


def found_codes(run: Any, codes: Codes, params: OperandParams | None = None) -> torch.Tensor:
    """The inverse; of codes of rows, without their steps."""
    if isinstance(codes, RowCodes):
        return found_codes(run, codes.codes)
    if not isinstance(run, NativeCpu):
        return codes.int()
    if params is None or params.grid is Grid.UNIFORM:
        return codes.int() - SIGN
    if params.merged:
        shifted = codes.int() - (1 << (params.bits - 1))
        return torch.where(shifted < 0, shifted, shifted // parameters(params, codes.ndim).factor)
    return codes[1].int() - codes[0].int()


def traced(trace: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Codes as the reference has them, from the trace of a merged grid, where a fine code is the value itself."""
    if not params.merged:
        return trace
    value = trace.int() + SIGN
    top = (1 << (params.bits - 1)) - 1
    return torch.where(value <= top, -value, value // parameters(params, 4).factor).to(torch.int8)
