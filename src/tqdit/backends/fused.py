"""The compiled operations of a block on plain tensors: shapes checked, results allocated, kernels called.

Codes are uint8, signed code + 128; those of two regions are two planes. Nothing here can be traced by torch: see
`operators`.
"""

import torch
from torch import Tensor

from tqdit.backends import native
from tqdit.backends.onednn import PackedWeight, product, zero_points
from tqdit.backends.panels import PanelWeight
from tqdit.backends.signatures import AttentionCall, LinearCall, address, need, operand, size
from tqdit.ops.schema import AttentionParams, OperandParams

Weight = PanelWeight | PackedWeight


def norm_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float, target: OperandParams) -> Tensor:
    """As `Backend.norm_quantize`."""
    x = x.float().contiguous()
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=torch.uint8)
    shift, scale = (_rows(rows, batch, width) for rows in (shift, scale))
    if shift.stride(0) != scale.stride(0):
        shift, scale = shift.contiguous(), scale.contiguous()
    native.call(
        "norm_quantize", address(x, torch.float32), address(shift, torch.float32, adjacent=False),
        address(scale, torch.float32, adjacent=False), size(shift.stride(0)), float(eps), operand(target, batch),
        batch, tokens, width, address(out, torch.uint8), torch.get_num_threads(),
    )  # fmt: skip
    return out


def qkv(codes: Tensor, source: OperandParams, weight: Weight, params: AttentionParams) -> Tensor:
    """As `Backend.qkv`: (B, N, 3 C)."""
    call = _Linear(codes, source, weight)
    batch, _, columns = call.shape
    need(params.heads > 0 and columns % (3 * params.heads) == 0, f"{columns} columns for {params.heads} heads")
    out = torch.empty(call.shape, dtype=torch.uint8)
    targets = (operand(target, batch, params.heads) for target in params.projections)
    native.call("linear_heads", call.struct, *targets, size(params.heads), address(out, torch.uint8))
    return out


def attention(qkv: Tensor, params: AttentionParams, target: OperandParams, trace: Tensor | None = None) -> Tensor:
    """As `Backend.attention`. `trace`: int8 (B, H, N, N), filled with the codes of the probabilities; for tests."""
    batch, tokens, columns = qkv.shape
    heads = params.heads
    need(heads > 0 and columns % (3 * heads) == 0, f"{columns} columns for {heads} heads")
    out = torch.empty(batch, tokens, columns // 3, dtype=torch.uint8)
    dim = columns // (3 * heads)
    traced = None if trace is None else address(trace, torch.int8, batch * heads * tokens**2)
    call = AttentionCall(
        address(qkv, torch.uint8), address(out, torch.uint8), traced, batch, tokens, size(heads), dim,
        torch.get_num_threads(), *(operand(o, batch, heads) for o in params.projections),
        operand(params.softmax, batch), operand(target, batch), dim**-0.5,
    )  # fmt: skip
    native.call("attention", call)
    return out


def linear_gelu(codes: Tensor, source: OperandParams, weight: Weight, target: OperandParams) -> Tensor:
    """As `Backend.linear_gelu`: (B, N, out), or two planes of that."""
    call = _Linear(codes, source, weight)
    two = target.grid.two_region and target.shift is None
    out = torch.empty(2 if two else 1, *call.shape, dtype=torch.uint8)
    second = address(out[1], torch.uint8) if two else None
    native.call("linear_gelu", call.struct, operand(target, call.shape[0]), address(out[0], torch.uint8), second)
    return out if two else out[0]


def linear_residual(codes: Tensor, source: OperandParams, weight: Weight, gate: Tensor, x: Tensor) -> Tensor:
    """As `Backend.linear_residual`."""
    stream = x.float().contiguous()
    out = torch.empty_like(stream)
    call = _Linear(codes, source, weight)
    need(call.shape == stream.shape, f"an update {call.shape} of hidden states {tuple(stream.shape)}")
    gate = _rows(gate, call.shape[0], call.shape[2])
    native.call(
        "linear_residual", call.struct, address(gate, torch.float32, adjacent=False), size(gate.stride(0)),
        address(stream, torch.float32), address(out, torch.float32),
    )  # fmt: skip
    return out.to(x.dtype)


def float_input_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As `Backend.float_input_linear`, for a weight (out, in) of int8 codes with a scale and a bias per column."""
    rows = x.float().reshape(-1, x.shape[-1]).contiguous()
    columns, depth = codes.shape
    need(rows.shape[1] == depth, f"an input of width {rows.shape[1]} for a layer of width {depth}")
    out = torch.empty(len(rows), columns, dtype=torch.float32)
    native.call(
        "weight_only", address(rows, torch.float32), address(codes, torch.int8), address(scale, torch.float32, columns),
        address(bias, torch.float32, columns), len(rows), columns, depth, address(out, torch.float32),
        torch.get_num_threads(),
    )  # fmt: skip
    return out.view(*x.shape[:-1], columns)


class _Linear:
    """`LinearCall` of linear.h with the tensors it points into. `shape`: of the result, (B, N, out)."""

    def __init__(self, codes: Tensor, source: OperandParams, weight: Weight) -> None:
        planes = list(codes) if codes.ndim == 4 else [codes]
        batch, tokens, depth = planes[0].shape
        columns, expected = weight.shape
        need(depth == expected, f"codes of depth {depth} for a layer of depth {expected}")
        two = source.grid.two_region and source.shift is None
        need(len(planes) == 1 + two, f"{len(planes)} planes of codes for a grid of {source.grid.value}")
        self.shape = batch, tokens, columns
        self.struct = LinearCall(
            weight=address(weight.scale, torch.float32, columns), bias=address(weight.bias, torch.float32, columns),
            batch=batch, tokens=tokens, depth=depth, columns=columns, threads=torch.get_num_threads(),
            source=operand(source, batch),
        )  # fmt: skip
        self.alive = [plane.contiguous() for plane in planes]
        if isinstance(weight, PanelWeight):
            self.struct.packed = address(weight.packed, torch.int8)
            self.struct.column_sums = address(weight.sums, torch.int32, columns)
            found = [address(plane, torch.uint8) for plane in self.alive]
            self.struct.first, self.struct.second = (*found, None)[:2]
        else:
            zeros = zero_points(source)
            self.alive = [product(plane, zeros, weight) for plane in self.alive]
            found = [address(plane, torch.float32, batch * tokens * columns) for plane in self.alive]
            self.struct.first_sums, self.struct.second_sums = (*found, None)[:2]


def _rows(rows: Tensor, batch: int, width: int) -> Tensor:
    """One row per sample, its elements adjacent; the rows need not be."""
    need(rows.shape == (batch, width), f"modulation {tuple(rows.shape)} for {batch} samples of width {width}")
    return rows if rows.stride(-1) == 1 else rows.contiguous()
