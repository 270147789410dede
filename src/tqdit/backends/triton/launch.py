"""Launch the kernels that make codes or compute with them: grids of programs, descriptors."""

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tqdit.backends.triton import flash, float_attention, hopper
from tqdit.backends.triton.kernels.attention import attention_kernel
from tqdit.backends.triton.kernels.linear import ACTIVATION, HEADS, PLAIN, RESIDUAL, linear_kernel
from tqdit.backends.triton.kernels.norm import norm_quantize_kernel
from tqdit.backends.triton.kernels.quantize import quantize_kernel, quantize_rows_kernel
from tqdit.backends.triton.layouts import (
    ATTENTION_OPERANDS,
    BF16,
    FLASH,
    FLOATS,
    NATIVE,
    Config,
    Projected,
    Weight,
    attended,
    groups_of,
    mode,
    part_sizes,
    permutes,
    pitch,
    powers_of_two,
    row_stride,
    with_steps,
)
from tqdit.backends.triton.relaunch import PLANS, Plan, aligned, check_device, launch_options, starts_early
from tqdit.errors import InputError
from tqdit.ops.schema import Codes, Norm, OperandParams, Residual, RowCodes
from tqdit.spec import Grid

ROW_REGISTERS = 168  # of a thread of the norm kernel that holds whole rows: twelve warps fit a multiprocessor


def norm_quantize(x: torch.Tensor, norm: Norm, target: OperandParams, config: Config) -> Codes:
    """Return codes (B, N, pitch(C)) of the modulated LayerNorm of x, with steps (B, N) on the grid of rows."""
    batch, tokens, width = x.shape
    rows, device = batch * tokens, x.get_device()
    out = torch.empty(batch, tokens, pitch(width), dtype=torch.int8, device=x.device)
    steps = _steps(x) if target.grid is Grid.ROW else None
    groups = groups_of(target)
    first, rest = powers_of_two(width, 16)
    of_program = config.block_m * config.blocks
    norm_quantize_kernel[(triton.cdiv(rows, of_program),)](
        x, norm.shift, norm.scale, norm.shift.stride(0), norm.eps, target.table, groups.tensor, out, steps, rows,
        tokens, out.stride(1), width, groups.stride, row_stride(target), target.bits, tokens % of_program == 0, NATIVE,
        config.block_m, config.blocks, config.stages, first, rest, starts_early(device, rows), num_warps=config.warps,
        maxnreg=None if steps is None else ROW_REGISTERS, **launch_options(device, rows),
    )  # fmt: skip
    return out if steps is None else RowCodes(out, steps)


def _steps(x: torch.Tensor) -> torch.Tensor:
    """Return memory for the steps of the rows of x."""
    return torch.empty(*x.shape[:2], dtype=torch.float32, device=x.device)


def quantize(x: torch.Tensor, target: OperandParams, config: Config) -> Codes:
    """Return codes (B, N, pitch(C)) of x itself, with steps (B, N) on the grid of rows.

    Rows of x may be apart, as parts of a wider tensor are; their channels are neighbours.
    """
    batch, tokens, width = x.shape
    x, x_stride = rows_apart(x)
    factors, groups, by_row = target.channels, groups_of(target), target.grid is Grid.ROW
    plan = _quantize_plan(
        x.get_device(), x.dtype, batch * tokens, width, tokens, x_stride, pitch(width), groups.stride,
        row_stride(target), target.bits, factors is None, None if by_row else mode(target), config,
    )  # fmt: skip
    out = torch.empty((batch, tokens, pitch(width)), dtype=torch.int8, device=x.device)
    steps = torch.empty((batch, tokens), dtype=torch.float32, device=x.device) if by_row else None
    others = tuple(tensor for tensor in (steps, factors) if tensor is not None)
    tensors = x, target.table, groups.tensor, out, *others
    check_device(*tensors)
    launch = plan.launch if aligned(x, *tensors[3:]) else plan.launch_any
    launch(tensors)
    return out if steps is None else RowCodes(out, steps)


def rows_apart(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return x (B, N, C), or a copy, whose rows are evenly apart, and the numbers from one row to the next."""
    batch, tokens, _ = x.shape
    of_batch, of_row, of_channel = x.stride()
    if of_channel != 1 or (batch > 1 and tokens > 1 and of_batch != tokens * of_row):
        x = x.contiguous()
        of_batch, of_row, _ = x.stride()
    return x, of_row if tokens > 1 else of_batch


@functools.lru_cache(PLANS)
def _quantize_plan(
    device: int, dtype: torch.dtype, rows: int, width: int, tokens: int, x_stride: int, out_stride: int,
    group_stride: int, target_stride: int, bits: int, unscaled: bool, mode: int | None, config: Config,
) -> Plan:  # fmt: skip
    """Return the launch that quantizes such rows; a mode of None is the grid of rows."""
    factors = (None,) if unscaled else ()
    if mode is None:
        others = (
            *factors, rows, tokens, x_stride, out_stride, width, group_stride, target_stride, bits, NATIVE,
            config.block_m, *powers_of_two(width, 16), starts_early(device, rows),
        )  # fmt: skip
        grid = triton.cdiv(rows, config.block_m), 1
        return Plan(quantize_rows_kernel, grid, others, num_warps=config.warps, **launch_options(device, rows))
    bm, bn = config[:2]
    others = (
        *factors, rows, width, tokens, x_stride, out_stride, group_stride, target_stride, mode, bits, NATIVE, bm, bn,
        starts_early(device, rows),
    )  # fmt: skip
    grid = triton.cdiv(rows, bm), triton.cdiv(width, bn)
    return Plan(quantize_kernel, grid, others, num_warps=config.warps, **launch_options(device, rows))


def linear(
    given: Codes, source: OperandParams, weight: Weight, config: Config, epilogue: int, out: torch.Tensor,
    out_stride: int, x: torch.Tensor | None = None, gate: torch.Tensor | None = None,
    targets: tuple[OperandParams, ...] = (), layout: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:  # fmt: skip
    """Launch a linear kernel. `layout`: head_dim, pitch of a token of q or k, pitch of a row of v."""
    if config.hopper:
        return hopper.linear(given, source, weight, config, epilogue, out, out_stride, x, gate, targets, layout)
    codes, steps = with_steps(given)
    batch, tokens = codes.shape[:2]
    rows, columns, depth = batch * tokens, len(weight.codes), weight.depth
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    pieces = {8: 1, 6: 4, 4: 2}[weight.bits]
    assert weight.bits == 8 or bk == 128
    packed_depth = {8: depth, 6: weight.codes.shape[1], 4: weight.codes.shape[1]}[weight.bits]
    packed_block = {8: bk, 6: bk // 4, 4: bk // 2}[weight.bits]
    a = TensorDescriptor(codes, [rows, depth], [codes.stride(1), 1], [bm, bk // pieces])
    b = TensorDescriptor(weight.codes, [columns, packed_depth], [weight.codes.stride(0), 1], [bn, packed_block])
    high = None
    if weight.high is not None:
        high = TensorDescriptor(weight.high, list(weight.high.shape), [weight.high.stride(0), 1], [bn, bk // 4])
    groups = groups_of(source, *targets)
    first, second, third = (targets * 3)[:3] if targets else (source,) * 3
    channels = first.channels if epilogue == ACTIVATION.value else None
    parts = len(targets) if epilogue == HEADS.value else 1
    programs = triton.cdiv(rows, bm) * parts * triton.cdiv(columns // parts, bn)
    head_dim, head_pitch, token_pitch = layout
    one_group = epilogue == PLAIN.value and groups.stride == 0  # so it does not matter which sample a row is of
    linear_kernel[(programs,)](
        a, b, high, weight.scale, weight.sums, weight.bias, out, out if x is None else x,
        weight.scale if gate is None else gate, 0 if gate is None else gate.stride(0), groups.tensor,
        source.table, steps, channels, first.table, second.table, third.table, rows, columns // parts, depth, tokens,
        out_stride,
        groups.stride, *map(row_stride, (source, first, second, third)), head_dim, head_pitch, token_pitch,
        weight.bits, source.two_products, epilogue, parts, gate is not None, mode(first), first.bits,
        tokens % bm == 0 or one_group, permutes(tokens), head_dim % 8 == 0, NATIVE, bm, bn, bk, config.band,
        config.piece or bn, starts_early(codes.get_device(), rows), num_warps=config.warps, num_stages=config.stages,
        maxnreg=config.registers, enable_fp_fusion=epilogue == ACTIVATION.value,
        **launch_options(codes.get_device(), rows),
    )  # fmt: skip
    return out


def plain(
    codes: Codes, source: OperandParams, weight: Weight, config: Config, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the product itself, (B, N, out), computed in fp32 and rounded once to `dtype`."""
    if config.hopper == FLOATS:
        return hopper.float_linear(codes, source, weight, config, dtype)
    form = with_steps(codes)[0]
    out = torch.empty(*form.shape[:2], len(weight.codes), dtype=dtype, device=form.device)
    return linear(codes, source, weight, config, PLAIN.value, out, out.stride(1))


def residual(codes: Codes, source: OperandParams, weight: Weight, config: Config, then: Residual) -> torch.Tensor:
    """Return x + gate y, or x + y, (B, N, out) in the dtype of x."""
    out = torch.empty_like(then.x)
    return linear(codes, source, weight, config, RESIDUAL.value, out, out.stride(1), then.x, then.gate)


def activation(
    codes: Codes, source: OperandParams, weight: Weight, config: Config, target: OperandParams
) -> torch.Tensor:
    """Return codes (B, N, pitch(out)) of GELU(y), its channels times the target's factors where there are any."""
    form = with_steps(codes)[0]
    out = torch.empty(*form.shape[:2], pitch(len(weight.codes)), dtype=torch.int8, device=form.device)
    return linear(codes, source, weight, config, ACTIVATION.value, out, out.stride(1), targets=(target,))


def project(
    codes: Codes, source: OperandParams, weight: Weight, config: Config, targets: tuple[OperandParams, ...],
    heads: int,
) -> Projected:  # fmt: skip
    """Return codes of y as heads.

    The layer has a part for each of the targets: query, key and value; or key and value; or query.
    """
    form = with_steps(codes)[0]
    batch, tokens = form.shape[:2]
    head_dim = len(weight.codes) // len(targets) // heads
    size = sum(part_sizes(len(targets), batch, tokens, heads, head_dim))
    if size >= 2**31:
        raise InputError(
            f"a batch of {batch} samples of {tokens} tokens is too large: q, k and v exceed 2 GiB of codes"
        )
    out = torch.empty(size, dtype=torch.int8, device=form.device)
    layout = head_dim, pitch(head_dim), pitch(tokens)
    linear(codes, source, weight, config, HEADS.value, out, 0, targets=targets, layout=layout)
    return Projected(out, batch, tokens, head_dim)


def attend(
    projected: Projected, context: Projected | None, bias: torch.Tensor | None, heads: int,
    operands: tuple[OperandParams, ...], config: Config, trace: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return codes (B, N, pitch(C)) of an attention, or where there is no target its fp32 values (B, N, C).

    `operands`: query, key, value, softmax, and the target or nothing. `context`: k and v, or None where `projected` has
    them. `trace`: (B H, N, M), to get the codes of probabilities.
    """
    if config.hopper == BF16:
        assert bias is None
        assert trace is None
        return _float_attend(projected, context, heads, operands, config)
    if config.hopper == FLASH:
        assert bias is None
        assert trace is None
        return flash.attention(projected, context, heads, operands, config)
    if config.hopper:
        assert context is None
        assert bias is None
        return hopper.attention(projected, heads, operands, config, trace)
    batch, tokens, head_dim = projected.batch, projected.tokens, projected.head_dim
    keys = tokens if context is None else context.tokens
    if context is None:
        q, k, v = projected.split(3, heads)
    else:
        (q,), (k, v) = projected.split(1, heads), context.split(2, heads)
    query, key, value, softmax, *targets = operands
    target = targets[0] if targets else softmax  # a kernel without a target does not read it
    columns, dtype = attended(operands, heads * head_dim)
    out = torch.empty(batch, tokens, columns, dtype=dtype, device=q.device)
    bm, bk = config.block_m, config.block_k
    first, rest = powers_of_two(head_dim, 32)
    d_rest, v_rest = (max(32, rest), max(16, rest)) if rest else (0, 0)
    groups = groups_of(*operands)
    one_pass = keys <= bk
    blocks = min(config.blocks, triton.cdiv(tokens, bm)) if one_pass else 1
    bias_stride = None if bias is None else bias.stride(0) if len(bias) > 1 else 0
    attention_kernel[(triton.cdiv(tokens, bm * blocks) * batch * heads,)](
        _blocks(q, head_dim, bm, first), _blocks(q, head_dim, bm, d_rest), _blocks(k, head_dim, bk, first),
        _blocks(k, head_dim, bk, d_rest), _blocks(v, keys, first, bk), _blocks(v, keys, v_rest, bk), out,
        out if trace is None else trace, groups.tensor,
        query.table, key.table, value.table, softmax.table, target.table, bias, bias_stride, tokens,
        None if context is None else keys, heads, out.stride(1), head_dim**-0.5, blocks,
        groups.stride, *map(row_stride, (query, key, value, softmax, target)),
        head_dim, first, d_rest, v_rest, mode(softmax), softmax.bits, target.bits if targets else 0,
        one_pass, keys % bk != 0, head_dim % 8 == 0, permutes(keys), trace is not None, NATIVE, bm, bk,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    return out


def _float_attend(
    projected: Projected, context: Projected | None, heads: int, operands: tuple[OperandParams, ...], config: Config
) -> torch.Tensor:
    y = float_attention.attention(projected, context, heads, operands)
    if len(operands) < ATTENTION_OPERANDS:
        return y.float()
    return with_steps(quantize(y, operands[-1], config))[0]


def _blocks(part: torch.Tensor, columns: int, block: int, width: int) -> TensorDescriptor | None:
    """Describe blocks of `block` rows and `width` columns of projected codes; None if either is 0."""
    if not (block and width):
        return None
    rows = part.view(-1, pitch(columns))
    return TensorDescriptor(rows, [len(rows), columns], [pitch(columns), 1], [block, width])
