"""LayerNorm, adaLN's modulation and quantization in one pass over the residual stream."""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.dependent import follow
from tqdit.backends.triton.kernels.rounding import INVERSE, ZERO, nearest_codes, row_magnitudes, row_step

LANE = tl.constexpr(4)  # adjacent columns of a lane


@triton.jit
def norm_quantize_kernel(
    x, shift, scale, modulation_stride, eps, target, group, out, steps, M, TOKENS, out_stride,
    C: tl.constexpr, GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, BITS: tl.constexpr,
    PER_TILE: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write codes of LayerNorm(x) (1 + scale) + shift for BLOCKS times ROWS rows of x (M, C).

    `shift` and `scale` have a row per sample. `steps`: fp32 (M,), for the steps of codes on the grid of rows; None for
    a uniform grid, which costs nothing.

    A row is FIRST columns and REST more, powers of two: the lanes of one for C = 1152 would be idle for nearly half.
    PER_TILE: all rows of a program are of one sample. Then, with more than one of STAGES, its shift and scale stay in
    registers, and the rows of the next blocks are copied to shared memory while those of one are computed.
    EARLY: the kernel may be launched before its predecessor has ended.
    """
    follow(EARLY)
    HOLD: tl.constexpr = PER_TILE and STAGES > 1
    first_row = tl.program_id(0) * (ROWS * BLOCKS)
    columns = _columns(0, FIRST)
    if REST:
        columns_more = _columns(FIRST, REST)
    if PER_TILE:
        sample = first_row // TOKENS
        operand, inverse, zero = _parameters(target, group, sample, GROUP_STRIDE, TARGET_STRIDE)
    if HOLD:
        factor, addend = _modulation(shift, scale, sample * modulation_stride, columns, C)
        if REST:
            factor_more, addend_more = _modulation(shift, scale, sample * modulation_stride, columns_more, C)
    for block in tl.range(0, BLOCKS, num_stages=STAGES if HOLD else 1):
        rows = first_row + block * ROWS + tl.arange(0, ROWS)[:, None]
        read = x + rows.to(tl.int64) * C
        here = _exist(rows, columns, M, C, PER_TILE)
        values = _fp32(tl.load(read + columns, here, 0.0), NATIVE)
        total = tl.sum(values, 1)
        if REST:
            here_more = _exist(rows, columns_more, M, C, PER_TILE)
            more = _fp32(tl.load(read + columns_more, here_more, 0.0), NATIVE)
            total += tl.sum(more, 1)
        mean = (total / C)[:, None]
        values = tl.where(here, values - mean, 0.0)
        squares = tl.sum(values * values, 1)
        if REST:
            more = tl.where(here_more, more - mean, 0.0)
            squares += tl.sum(more * more, 1)
        deviation = (1.0 / tl.sqrt_rn(squares / C + eps))[:, None]

        if not PER_TILE:
            sample = tl.minimum(rows, M - 1) // TOKENS
            operand, inverse, zero = _parameters(target, group, sample, GROUP_STRIDE, TARGET_STRIDE)
        write = out + rows.to(tl.int64) * out_stride
        if not HOLD:
            factor, addend = _modulation(shift, scale, sample * modulation_stride, columns, C)
        y = values * deviation * factor + addend
        if REST:
            if not HOLD:
                factor_more, addend_more = _modulation(shift, scale, sample * modulation_stride, columns_more, C)
            y_more = more * deviation * factor_more + addend_more
        by, offset = inverse, zero
        if steps is not None:  # y is 0 beyond a row's end
            magnitude = row_magnitudes(y, NATIVE)
            if REST:
                magnitude = tl.maximum(magnitude, row_magnitudes(y_more, NATIVE), propagate_nan=tl.PropagateNan.ALL)
            step = row_step(magnitude[:, None], operand)
            tl.store(steps + rows, step, rows < M)
            by, offset = 1.0 / step, 0.0
        tl.store(write + columns, nearest_codes(y, by, offset, BITS, NATIVE), here)
        if REST:
            tl.store(write + columns_more, nearest_codes(y_more, by, offset, BITS, NATIVE), here_more)


@triton.jit
def _columns(START: tl.constexpr, COUNT: tl.constexpr):
    """Return columns that the compiler takes to be adjacent by LANE only.

    Were all said to be adjacent, a lane would have other columns for each dtype, and lanes would exchange them.
    """
    return START + tl.max_contiguous(tl.arange(0, COUNT), LANE)[None, :]


@triton.jit
def _exist(rows, columns, M, C: tl.constexpr, PER_TILE: tl.constexpr):
    """Return a mask; the compiler drops the comparison of columns where it always holds."""
    here = columns < C
    if not PER_TILE:
        here = (rows < M) & here
    return here


@triton.jit
def _parameters(target, group, sample, GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr):
    row = target + tl.load(group + sample * GROUP_STRIDE).to(tl.int32) * TARGET_STRIDE
    return row, tl.load(row + INVERSE), tl.load(row + ZERO)


@triton.jit
def _modulation(shift, scale, offset, columns, C: tl.constexpr):
    here = columns < C
    return 1.0 + tl.load(scale + offset + columns, here, 0.0), tl.load(shift + offset + columns, here, 0.0)


@triton.jit
def _fp32(x, NATIVE: tl.constexpr):
    """Return numbers as fp32: bf16 two at a time, an instruction each, since Triton would take them apart first."""
    if NATIVE and x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        wide = x.to(tl.float32)
    return wide
