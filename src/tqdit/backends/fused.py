"""The compiled verbs of the CPU backend on plain tensors: shapes are checked, results allocated, kernels called.

Codes are uint8, signed code + 128; those of two regions are two planes, unless the regions merge; those of rows come
with their steps, as `RowCodes`. torch cannot trace anything here: see `operators`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tqdit.backends import native
from tqdit.backends.onednn import PackedWeight, product, zero_points
from tqdit.backends.panels import FOUR, PanelWeight
from tqdit.backends.signatures import (
    FLOATS,
    AttentionCall,
    LinearCall,
    ManyRowsCall,
    Operand,
    QuantizeCall,
    address,
    need,
    operand,
    refusal,
    size,
)
from tqdit.ops.schema import AttentionParams, Codes, Norm, OperandParams, Residual, RowCodes
from tqdit.spec import Grid

Weight = PanelWeight | PackedWeight
MANY_ROWS = 12  # float rows from which turning a weight into floats once for all of them is faster, also on AVX2
NARROW = 64  # the depth up to which a product runs along the columns, however many rows there are
PARTS = (1, 2, 3)  # the numbers of parts that a projection may have
PROBABILITIES = (
    Grid.UNIFORM,
    Grid.MRQ_SOFTMAX,
    Grid.SOFTMAX_ROW,
)  # grids of probabilities; the last two are of no else


def quantize(x: Tensor, target: OperandParams, norm: Norm | None = None, gelu: bool = False) -> Codes:
    """Return codes as `Backend.quantize` does: (B, N, C), or two planes of that shape, or `RowCodes`.

    `gelu`: quantize tanh-GELU of x. So a row of a linear layer's outputs is at hand as a whole.
    """
    need(norm is None or not gelu, "GELU of a norm")
    if x.ndim != 3:
        raise refusal(f"hidden states {tuple(x.shape)}")
    x = _items(x, plain=norm is None and not gelu)
    batch, tokens, width = x.shape
    out, first, second = _planes(tuple(x.shape), target)
    to = operand(target, batch, channels=width)
    call = QuantizeCall(
        x=address(x, x.dtype, adjacent=False), first=first, second=second, sample_stride=size(x.stride(0)),
        token_stride=size(x.stride(1)), batch=batch, tokens=tokens, width=width, type=FLOATS[x.dtype], gelu=int(gelu),
        threads=torch.get_num_threads(), target=to,
    )  # fmt: skip
    steps, call.steps = _steps(batch, tokens, target)
    if norm is not None:
        shift, scale = (_rows(rows, batch, width, "modulation") for rows in (norm.shift, norm.scale))
        if shift.stride(0) != scale.stride(0):
            shift, scale = shift.contiguous(), scale.contiguous()
        call.shift, call.scale = (address(rows, torch.float32, adjacent=False) for rows in (shift, scale))
        call.stride, call.eps = size(shift.stride(0)), float(norm.eps)
    native.call("quantize", call)
    return out if steps is None else RowCodes(out, steps)


def project(
    codes: Codes, source: OperandParams, weight: Weight, targets: Sequence[OperandParams], heads: int
) -> Tensor:
    """Return codes as `Backend.project` does: (B, N, parts C)."""
    call = _Linear(codes, source, weight)
    batch, _, columns = call.shape
    parts = len(targets)
    if parts not in PARTS:
        raise refusal(f"{parts} parts of a projection")
    _check_heads(columns, parts, heads)
    _check_uniform(targets, "heads")
    out = torch.empty(call.shape, dtype=torch.uint8)
    operands = [operand(target, batch, heads) for target in targets]
    array = (Operand * parts)(*operands)
    native.call("project", call.struct, array, parts, heads, address(out, torch.uint8))
    return out


def attend(
    projected: Tensor,
    attention: AttentionParams,
    target: OperandParams | None,
    context: Tensor | None = None,
    bias: Tensor | None = None,
    trace: Tensor | None = None,
) -> Codes:
    """Return codes as `Backend.attend` does, or without a target the attended values, fp32 (B, N, C).

    Channel factors are for a target on the grid of rows only.

    `trace`: int8 (B, H, N, M), filled with the codes of the probabilities; for tests.
    """
    heads, call = attention.heads, AttentionCall()
    batch, tokens, width = _attention_buffers(call, projected, context, heads)
    operands = [operand(params, batch, heads) for params in (*attention.projections, attention.softmax)]
    call.queries, call.keys, call.values, call.probability = operands
    _check_uniform(attention.projections, "query, key or value")
    if attention.softmax.grid not in PROBABILITIES:
        raise refusal(f"probabilities on the grid '{attention.softmax.grid}'")
    if bias is not None:
        bias = _rows(bias, batch, call.context, "a bias")
        call.bias, call.bias_stride = address(bias, torch.float32, adjacent=False), size(bias.stride(0))
    if trace is not None:
        call.trace = address(trace, torch.int8, batch * heads * tokens * call.context)
    out = torch.empty(batch, tokens, width, dtype=torch.float32 if target is None else torch.uint8)
    if target is None:
        call.attended = address(out, torch.float32)
    else:
        if target.grid is not Grid.ROW:
            _check_uniform([target], "a result of attention")
        operands.append(operand(target, batch, channels=width))
        call.target, call.out = operands[-1], address(out, torch.uint8)
    steps, call.steps = _steps(batch, tokens, target)
    call.factor, call.threads = call.dim**-0.5, torch.get_num_threads()
    native.call("attention", call)
    return out if steps is None else RowCodes(out, steps)


def linear_gelu(codes: Codes, source: OperandParams, weight: Weight, target: OperandParams) -> Codes:
    """Return codes as `Backend.linear` does with `Activation(target)`: as `quantize` those of (B, N, out)."""
    call = _Linear(codes, source, weight)
    out, first, second = _planes(call.shape, target)
    steps, steps_address = _steps(*call.shape[:2], target)
    to = operand(target, call.shape[0], channels=call.shape[2])
    native.call("linear_gelu", call.struct, to, first, second, steps_address)
    return out if steps is None else RowCodes(out, steps)


def linear(codes: Codes, source: OperandParams, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x W^T + bias as `Backend.linear` does: computed in fp32 and rounded once to fp32, bf16 or fp16."""
    if dtype not in FLOATS:
        raise refusal(f"results of {dtype}")
    call = _Linear(codes, source, weight)
    out = torch.empty(call.shape, dtype=dtype)
    native.call("linear", call.struct, FLOATS[dtype], address(out, dtype))
    return out


def linear_added(codes: Codes, source: OperandParams, weight: Weight, then: Residual) -> Tensor:
    """Return x W^T + bias, added to a residual, as `Backend.linear` does."""
    call = _Linear(codes, source, weight)
    stream = then.x.float().contiguous()
    if call.shape != stream.shape:
        raise refusal(f"an update {call.shape} of hidden states {tuple(stream.shape)}")
    gate = None if then.gate is None else _rows(then.gate, call.shape[0], call.shape[2], "a gate")
    gates = (None, 0) if gate is None else (address(gate, torch.float32, adjacent=False), size(gate.stride(0)))
    out = torch.empty_like(stream)
    native.call("linear_added", call.struct, *gates, address(stream, torch.float32), address(out, torch.float32))
    return out.to(then.x.dtype)


def float_input_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return x W^T + bias as `Backend.float_input_linear` does, in fp32 or rounded once to `dtype`.

    The weight (out, in) is int8 codes with a scale and a bias per column. Where a `dtype` is asked for, the number of
    rows decides in which order products are added up; without one a row's result does not depend on it.
    """
    depth = codes.shape[1]
    need(x.shape[-1] == depth, f"an input of width {x.shape[-1]} for a layer of width {depth}")
    rows = x.reshape(-1, depth)
    run = _few_rows if dtype is None or len(rows) < MANY_ROWS or depth <= NARROW or depth % FOUR else _many_rows
    return run(rows, codes, scale, bias, dtype or torch.float32).view(*x.shape[:-1], len(codes))


def _few_rows(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    rows, (columns, depth) = x.float().contiguous(), codes.shape
    out = torch.empty(len(rows), columns, dtype=torch.float32)
    native.call(
        "weight_only", address(rows, torch.float32), address(codes, torch.int8), address(scale, torch.float32, columns),
        address(bias, torch.float32, columns), len(rows), columns, depth, address(out, torch.float32),
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)


def _many_rows(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in FLOATS:
        raise refusal(f"results of {dtype}")
    rows, (columns, depth) = (x if x.dtype is torch.bfloat16 and native.has_bfloat16() else x.float()), codes.shape
    rows, out = rows.contiguous(), torch.empty(len(rows), columns, dtype=dtype)
    call = ManyRowsCall(
        x=address(rows, rows.dtype), codes=address(codes, torch.int8), scale=address(scale, torch.float32, columns),
        bias=address(bias, torch.float32, columns), out=address(out, dtype), rows=len(rows), columns=columns,
        depth=depth, type=FLOATS[rows.dtype], out_type=FLOATS[dtype], threads=torch.get_num_threads(),
    )  # fmt: skip
    native.call("many_rows", call)
    return out


class _Linear:
    """The structure `LinearCall` of linear.h with the tensors it points into.

    `shape`: of the result, (B, N, out).
    """

    def __init__(self, codes: Codes, source: OperandParams, weight: Weight) -> None:
        steps = codes.scale if isinstance(codes, RowCodes) else None
        plain = codes.codes if isinstance(codes, RowCodes) else codes
        need((steps is not None) == (source.grid is Grid.ROW), "codes without their rows' steps, or steps without rows")
        planes = list(plain) if plain.ndim == 4 else [plain]
        batch, tokens, depth = planes[0].shape
        columns, expected = weight.shape
        if depth != expected:
            raise refusal(f"codes of depth {depth} for a layer of depth {expected}")
        need(source.grid not in PROBABILITIES[1:], "a linear layer on probabilities")
        if len(planes) != 1 + source.two_products:
            raise refusal(f"{len(planes)} planes of codes for a grid of {source.grid}")
        self.shape = batch, tokens, columns
        self.source = operand(source, batch)
        self.struct = LinearCall(
            weight=address(weight.scale, torch.float32, columns), bias=address(weight.bias, torch.float32, columns),
            batch=batch, tokens=tokens, depth=depth, columns=columns, threads=torch.get_num_threads(),
            source=self.source,
        )  # fmt: skip
        self.steps = None if steps is None else steps.contiguous()
        if self.steps is not None:
            self.struct.steps = address(self.steps, torch.float32, batch * tokens)
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


def _attention_buffers(
    call: AttentionCall, projected: Tensor, context: Tensor | None, heads: int
) -> tuple[int, int, int]:
    """Point a call at its query, key and value; return samples, query tokens, and width of the result."""
    batch, tokens, columns = projected.shape
    parts = 3 if context is None else 1
    _check_heads(columns, parts, heads)
    width = columns // parts
    if context is None:
        call.query = address(projected, torch.uint8)
        call.key, call.value = call.query + width, call.query + 2 * width
        call.context, call.context_stride = tokens, columns
    else:
        if context.ndim != 3 or context.shape[::2] != (batch, 2 * width):
            raise refusal(f"a context {tuple(context.shape)} for {batch} samples of width {width}")
        call.query, call.key = address(projected, torch.uint8), address(context, torch.uint8)
        call.value = call.key + width
        call.context, call.context_stride = context.shape[1], 2 * width
    call.query_stride, call.batch, call.tokens, call.heads, call.dim = columns, batch, tokens, heads, width // heads
    return batch, tokens, width


def _check_heads(columns: int, parts: int, heads: int) -> None:
    if not size(heads) or columns % (parts * heads):
        raise refusal(f"{columns} columns for {parts} x {heads} heads")


def _check_uniform(operands: Iterable[OperandParams], name: str) -> None:
    """Refuse operands whose codes a kernel cannot write: they must be uniform, without channel factors."""
    for params in operands:
        if params.grid is not Grid.UNIFORM or params.channels is not None:
            raise refusal(f"{name} on the grid '{params.grid}', or with channel factors")


def _items(x: Tensor, plain: bool) -> Tensor:
    """Return hidden states with items that the kernel reads: of a float type, those of a row adjacent.

    `plain`: they are coded as they are. LayerNorm and GELU read fp32.
    """
    x = x if plain and x.dtype in FLOATS else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _planes(shape: tuple[int, ...], target: OperandParams) -> tuple[Tensor, int, int | None]:
    """Return new codes of a shape and the addresses of their planes.

    There are two planes of that shape where the target has two products.
    """
    need(target.grid not in PROBABILITIES[1:], "codes of probabilities outside of attention")
    out = torch.empty(*((2,) if target.two_products else ()), *shape, dtype=torch.uint8)
    if not target.two_products:
        return out, address(out, torch.uint8), None
    return out, address(out[0], torch.uint8), address(out[1], torch.uint8)


def _steps(batch: int, tokens: int, target: OperandParams | None) -> tuple[Tensor | None, int | None]:
    """Return new steps of rows and their address, or None twice unless the target is on the grid of rows."""
    if target is None or target.grid is not Grid.ROW:
        return None, None
    steps = torch.empty(batch, tokens, dtype=torch.float32)
    return steps, address(steps, torch.float32)


def _rows(rows: Tensor, batch: int, width: int, name: str) -> Tensor:
    """Return one row per sample with adjacent elements; the rows themselves need not be adjacent."""
    if rows.shape != (batch, width):
        raise refusal(f"{name} {tuple(rows.shape)} for {batch} samples of width {width}")
    return rows if rows.stride(-1) == 1 else rows.contiguous()
