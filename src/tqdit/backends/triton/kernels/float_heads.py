"""Dequantize projected codes to bf16, for an attention in floats."""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.rounding import ROW, ZERO, stored_as


@triton.jit(do_not_specialize_on_alignment=("group", "operand"))
def dequantize_heads_kernel(
    codes, operand, group, out, N, HEADS: tl.constexpr, D: tl.constexpr, GROUP_STRIDE: tl.constexpr,
    OPERAND_STRIDE: tl.constexpr, PITCH: tl.constexpr, BY_CHANNEL: tl.constexpr, PERMUTED: tl.constexpr,
    NATIVE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write BN tokens of a head, (code - zero point) scale, to out (B, N, HEADS, D), bf16.

    codes: (B, HEADS, N, PITCH), or if BY_CHANNEL (B, HEADS, D, PITCH), whose tokens are in the order of
    `attention._permuted` if PERMUTED.
    """
    sequence, head = tl.program_id(1), tl.program_id(1) % HEADS
    sample = sequence // HEADS
    time_group = tl.load(group + sample * GROUP_STRIDE).to(tl.int32)
    scale = tl.load(operand + time_group * OPERAND_STRIDE + head * ROW)
    zero = tl.load(operand + time_group * OPERAND_STRIDE + head * ROW + ZERO)
    places = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    channels = tl.arange(0, BD)[None, :]
    inside = (places < N) & (channels < D)
    if BY_CHANNEL:
        read = (sequence.to(tl.int64) * D + channels) * PITCH + places
    else:
        read = (sequence.to(tl.int64) * N + places) * PITCH + channels
    values = (tl.load(codes + read, inside, 0).to(tl.float32) - zero) * scale
    tokens = places
    if PERMUTED:  # bits 3, 2, 1 of a place are bits 2, 1, 3 of its token
        tokens = (places & -15) | ((places & 12) >> 1) | ((places & 2) << 2)
    write = ((sample.to(tl.int64) * N + tokens) * HEADS + head) * D + channels
    tl.store(out + write, stored_as(values, tl.bfloat16, NATIVE), inside)
