"""Quantize a tensor without a LayerNorm before: the input of any linear layer in float."""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.dependent import follow
from tqdit.backends.triton.kernels.rounding import (
    GELU_MERGED,
    INVERSE,
    MAGIC_BITS,
    UNIFORM,
    ZERO,
    divide,
    gelu_codes,
    packed_codes,
    row_magnitudes,
    row_step,
    uniform_codes,
)

PACKED = tl.constexpr(1024)  # columns whose codes are packed, four of a thread at a time
SMALL_INTEGERS = ("M", "TOKENS")  # a kernel compiled for one of these serves all others
SCALARS = ("target", "group")  # read by number: any alignment


@triton.jit(do_not_specialize=SMALL_INTEGERS, do_not_specialize_on_alignment=SCALARS)
def quantize_kernel(
    x, target, group, out, channels, M, C, TOKENS, x_stride, out_stride,
    GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr,
    NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write a (BM, BN) tile of the codes of x (M, C); M = samples * TOKENS. Uniform codes are the reference's.

    `channels`: fp32 (C,), which the columns are multiplied by before, or None. EARLY: the kernel may be launched before
    its predecessor has ended.
    """
    follow(EARLY)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    columns = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    inside = (rows < M) & (columns < C)
    values = tl.load(x + rows.to(tl.int64) * x_stride + columns, inside, 0.0).to(tl.float32)
    if channels is not None:
        values *= tl.load(channels + columns, columns < C, 1.0)
    sample = tl.minimum(rows, M - 1) // TOKENS
    operand = target + tl.load(group + sample * GROUP_STRIDE).to(tl.int32) * TARGET_STRIDE
    if MODE == UNIFORM:
        steps = divide(values, tl.load(operand), tl.load(operand + INVERSE), NATIVE)
        codes = uniform_codes(steps, tl.load(operand + ZERO), BITS)
    else:
        codes = gelu_codes(values, operand, MODE == GELU_MERGED, BITS)
    tl.store(out + rows.to(tl.int64) * out_stride + columns, codes, inside)


@triton.jit(do_not_specialize=SMALL_INTEGERS, do_not_specialize_on_alignment=SCALARS)
def quantize_rows_kernel(
    x, target, group, out, steps, channels, M, TOKENS, x_stride, out_stride,
    C: tl.constexpr, GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, BITS: tl.constexpr,
    NATIVE: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write the codes of ROWS rows of x (M, C) on the grid of rows, and their steps, fp32 (M,): both the reference's.

    A program has its rows in registers, so x is read once. A row is FIRST columns and REST more, powers of two.
    `channels` and EARLY as in `quantize_kernel`.
    """
    follow(EARLY)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    read = x + rows.to(tl.int64) * x_stride
    columns = tl.arange(0, FIRST)[None, :]
    values = _values(read, channels, columns, rows, M, C)
    magnitude = row_magnitudes(values, NATIVE)
    if REST:
        columns_more = FIRST + tl.arange(0, REST)[None, :]
        more = _values(read, channels, columns_more, rows, M, C)
        magnitude = tl.maximum(magnitude, row_magnitudes(more, NATIVE), propagate_nan=tl.PropagateNan.ALL)
    sample = tl.minimum(rows, M - 1) // TOKENS
    operand = target + tl.load(group + sample * GROUP_STRIDE).to(tl.int32) * TARGET_STRIDE
    step = row_step(magnitude[:, None], operand)
    tl.store(steps + rows, step, rows < M)
    inverse = tl.div_rn(tl.full((ROWS, 1), 1.0, tl.float32), step)
    write = out + rows.to(tl.int64) * out_stride
    tl.store(write + columns, _row_codes(values, step, inverse, BITS, NATIVE, FIRST), (rows < M) & (columns < C))
    if REST:
        here = (rows < M) & (columns_more < C)
        tl.store(write + columns_more, _row_codes(more, step, inverse, BITS, NATIVE, REST), here)


@triton.jit
def _values(read, channels, columns, rows, M, C: tl.constexpr):
    """Return numbers of rows as fp32, times the factors of their channels; 0 beyond the matrix."""
    values = tl.load(read + columns, (rows < M) & (columns < C), 0.0).to(tl.float32)
    if channels is not None:
        values *= tl.load(channels + columns, columns < C, 1.0)
    return values


@triton.jit
def _row_codes(values, step, inverse, BITS: tl.constexpr, NATIVE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return round(values / step), clipped, as int8; a thread of eight warps has four of PACKED columns or more."""
    quotient = divide(values, step, inverse, NATIVE)
    if NATIVE and BITS == 8 and COLUMNS >= PACKED:
        codes = packed_codes(quotient, -MAGIC_BITS)
    else:
        codes = uniform_codes(quotient, tl.zeros_like(step), BITS)
    return codes
