"""Calling the kernels: grids of programs, descriptors."""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tqdit.backends.triton import hopper
from tqdit.backends.triton.kernels.attention import attention_kernel
from tqdit.backends.triton.kernels.float_input import few_rows_kernel, float_input_kernel
from tqdit.backends.triton.kernels.linear import ACTIVATION, HEADS, PLAIN, RESIDUAL, linear_kernel
from tqdit.backends.triton.kernels.norm import norm_quantize_kernel
from tqdit.backends.triton.layouts import (
    NATIVE,
    Config,
    Operand,
    Weight,
    groups_of,
    permutes,
    pitch,
    powers_of_two,
    takes_two_products,
)
from tqdit.errors import InputError

FEW_ROWS = 2  # of a float input: no more than these are worth multiplying without tensor cores


def norm_quantize(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, target: Operand, config: Config
) -> torch.Tensor:
    batch, tokens, width = x.shape
    rows = batch * tokens
    out = torch.empty(batch, tokens, pitch(width), dtype=torch.int8, device=x.device)
    groups = groups_of(target)
    first, rest = powers_of_two(width, 16)
    of_program = config.block_m * config.blocks
    norm_quantize_kernel[(triton.cdiv(rows, of_program),)](
        x, shift, scale, shift.stride(0), eps, target.table, groups.tensor, out, rows, tokens, out.stride(1),
        width, groups.stride, target.stride, target.bits, tokens % of_program == 0, NATIVE, config.block_m,
        config.blocks, config.stages, first, rest, num_warps=config.warps,
    )  # fmt: skip
    return out


def linear(
    codes: torch.Tensor, source: Operand, weight: Weight, config: Config, epilogue: int, out: torch.Tensor,
    out_stride: int, x: torch.Tensor | None = None, gate: torch.Tensor | None = None,
    targets: tuple[Operand, ...] = (), layout: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:  # fmt: skip
    """`layout`: head_dim, pitch of a token of q or k, pitch of a row of v."""
    if config.hopper:
        return hopper.linear(codes, source, weight, config, epilogue, out, out_stride, x, gate, targets, layout)
    batch, tokens = codes.shape[:2]
    rows, columns, depth = batch * tokens, len(weight.codes), weight.depth
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    parts = {8: 1, 6: 4, 4: 2}[weight.bits]
    assert weight.bits == 8 or bk == 128
    packed_depth = {8: depth, 6: weight.codes.shape[1], 4: weight.codes.shape[1]}[weight.bits]
    packed_block = {8: bk, 6: bk // 4, 4: bk // 2}[weight.bits]
    a = TensorDescriptor(codes, [rows, depth], [codes.stride(1), 1], [bm, bk // parts])
    b = TensorDescriptor(weight.codes, [columns, packed_depth], [weight.codes.stride(0), 1], [bn, packed_block])
    high = None
    if weight.high is not None:
        high = TensorDescriptor(weight.high, list(weight.high.shape), [weight.high.stride(0), 1], [bn, bk // 4])
    groups = groups_of(source, *targets)
    first, second, third = (targets * 3)[:3] if targets else (source,) * 3
    two = takes_two_products(source)
    divided = 3 if epilogue == HEADS.value else 1
    programs = triton.cdiv(rows, bm) * divided * triton.cdiv(columns // divided, bn)
    head_dim, head_pitch, token_pitch = layout
    linear_kernel[(programs,)](
        a, b, high, weight.scale, weight.sums, weight.bias, out, out if x is None else x,
        weight.scale if gate is None else gate, 0 if gate is None else gate.stride(0), groups.tensor,
        source.table, first.table, second.table, third.table, rows, columns // divided, depth, tokens, out_stride,
        groups.stride, source.stride, first.stride, second.stride, third.stride, head_dim, head_pitch, token_pitch,
        weight.bits, two, epilogue, first.mode, first.bits, tokens % bm == 0, permutes(tokens),
        head_dim % 8 == 0, NATIVE, bm, bn, bk, config.band, config.piece or bn,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        enable_fp_fusion=epilogue == ACTIVATION.value,
    )  # fmt: skip
    return out


def plain(codes: torch.Tensor, source: Operand, weight: Weight, config: Config) -> torch.Tensor:
    """fp32 (B, N, out)."""
    out = torch.empty(*codes.shape[:2], len(weight.codes), dtype=torch.float32, device=codes.device)
    return linear(codes, source, weight, config, PLAIN.value, out, out.stride(1))


def residual(
    codes: torch.Tensor, source: Operand, weight: Weight, config: Config, gate: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    out = torch.empty_like(x)
    return linear(codes, source, weight, config, RESIDUAL.value, out, out.stride(1), x, gate)


def activation(codes: torch.Tensor, source: Operand, weight: Weight, config: Config, target: Operand) -> torch.Tensor:
    out = torch.empty(*codes.shape[:2], pitch(len(weight.codes)), dtype=torch.int8, device=codes.device)
    return linear(codes, source, weight, config, ACTIVATION.value, out, out.stride(1), targets=(target,))


def heads(
    codes: torch.Tensor, source: Operand, weight: Weight, config: Config, targets: tuple[Operand, ...], head_dim: int
) -> torch.Tensor:
    """A flat buffer: q and k (B, H, N, head_pitch), then v (B, H, head_dim, token_pitch)."""
    batch, tokens = codes.shape[:2]
    width = len(weight.codes) // 3
    layout = head_dim, pitch(head_dim), pitch(tokens)
    size = heads_size(batch, tokens, width // head_dim, head_dim)
    if size >= 2**31:
        raise InputError(
            f"a batch of {batch} samples of {tokens} tokens is too large: q, k and v exceed 2 GiB of codes"
        )
    out = torch.empty(size, dtype=torch.int8, device=codes.device)
    return linear(codes, source, weight, config, HEADS.value, out, 0, targets=targets, layout=layout)


def heads_size(batch: int, tokens: int, count: int, head_dim: int) -> int:
    return batch * count * (2 * tokens * pitch(head_dim) + head_dim * pitch(tokens))


def attention(
    qkv: torch.Tensor, batch: int, tokens: int, count: int, head_dim: int, operands: tuple[Operand, ...],
    config: Config, trace: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`operands`: query, key, value, softmax, target."""
    if config.hopper:
        return hopper.attention(qkv, batch, tokens, count, head_dim, operands, config, trace)
    query, key, value, softmax, target = operands
    out = torch.empty(batch, tokens, pitch(count * head_dim), dtype=torch.int8, device=qkv.device)
    bm, bk = config.block_m, config.block_k
    first, rest = powers_of_two(head_dim, 32)
    d_rest, v_rest = (max(32, rest), max(16, rest)) if rest else (0, 0)
    rows, head_pitch, token_pitch = batch * count * tokens, pitch(head_dim), pitch(tokens)
    q, k, v = qkv.split([rows * head_pitch, rows * head_pitch, batch * count * head_dim * token_pitch])

    def by_token(part: torch.Tensor, block: int, width: int) -> TensorDescriptor | None:
        return TensorDescriptor(part, [rows, head_dim], [head_pitch, 1], [block, width]) if width else None

    def by_channel(width: int) -> TensorDescriptor | None:
        shape = [batch * count * head_dim, tokens]
        return TensorDescriptor(v, shape, [token_pitch, 1], [width, bk]) if width else None

    groups = groups_of(*operands)
    one_pass = tokens <= bk
    blocks = min(config.blocks, triton.cdiv(tokens, bm)) if one_pass else 1
    attention_kernel[(triton.cdiv(tokens, bm * blocks) * batch * count,)](
        by_token(q, bm, first), by_token(q, bm, d_rest), by_token(k, bk, first), by_token(k, bk, d_rest),
        by_channel(first), by_channel(v_rest), out, out if trace is None else trace, groups.tensor,
        query.table, key.table, value.table, softmax.table, target.table, tokens, count, out.stride(1), head_dim**-0.5,
        blocks,
        groups.stride, query.stride, key.stride, value.stride, softmax.stride, target.stride,
        head_dim, first, d_rest, v_rest, softmax.mode, softmax.bits, target.bits,
        one_pass, tokens % bk != 0, head_dim % 8 == 0, permutes(tokens), trace is not None, NATIVE, bm, bk,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    return out


def float_input(x: torch.Tensor, weight: Weight, config: Config) -> torch.Tensor:
    """x (M, K) fp32 -> (M, N). `block_m` of 0: without tensor cores, for up to FEW_ROWS rows."""
    m, n = len(x), len(weight.codes)
    assert x.stride(1) == 1
    out = torch.empty(m, n, dtype=torch.float32, device=x.device)
    high = weight.codes if weight.high is None else weight.high
    if config.block_m == 0:
        few_rows_kernel[(triton.cdiv(n, config.block_n),)](
            x, weight.codes, high, weight.scale, weight.bias, out, m, n, weight.depth, x.stride(0),
            weight.codes.stride(0), high.stride(0), weight.bits, NATIVE, triton.next_power_of_2(m),
            config.block_n, config.block_k, num_warps=config.warps,
        )  # fmt: skip
        return out
    turned = config.block_m < min(config.block_n, 64)
    float_input_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m))](
        x, weight.codes, high, weight.scale, weight.bias, out, m, n, weight.depth, x.stride(0),
        weight.codes.stride(0), high.stride(0), weight.bits, NATIVE, turned, config.block_m, config.block_n,
        config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
