"""LayerNorm, adaLN's modulation and quantization in one pass over the residual stream."""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.ahead import fetch_ahead
from tqdit.backends.triton.kernels.rounding import INVERSE, ZERO, nearest_codes


@triton.jit
def _rows_of(x, rows, M, C, FIRST: tl.constexpr, REST: tl.constexpr):
    """Rows of x, in two parts; 0 beyond them."""
    here = (rows < M)[:, None]
    x += rows.to(tl.int64)[:, None] * C
    columns = tl.arange(0, FIRST)[None, :]
    values = tl.load(x + columns, here & (columns < C), 0.0).to(tl.float32)
    more = values
    if REST:
        columns = FIRST + tl.arange(0, REST)[None, :]
        more = tl.load(x + columns, here & (columns < C), 0.0).to(tl.float32)
    return values, more


@triton.jit
def norm_quantize_kernel(
    x, shift, scale, modulation_stride, eps, target, group, out, M, C, TOKENS, out_stride,
    following, following_lines, after, after_lines,
    GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, BITS: tl.constexpr,
    PER_TILE: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
    REST: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Codes of LayerNorm(x) (1 + scale) + shift for BLOCKS times ROWS rows of x (M, C); shift, scale: a row per sample.

    A row is FIRST columns and REST more, powers of two: the lanes of one for C = 1152 would be idle for nearly half.
    With several blocks the next one's rows are under way while those of one are computed. LINES: of the weights of the
    following two layers, which every program asks for.
    """
    if LINES and NATIVE:
        fetch_ahead(following, following_lines, after, after_lines, LINES)
    first_row = tl.program_id(0) * (ROWS * BLOCKS)
    rows = first_row + tl.arange(0, ROWS)
    values, more = _rows_of(x, rows, M, C, FIRST, REST)
    for block in range(BLOCKS):
        if BLOCKS > 1:
            following = rows + ROWS
            end = tl.where(block + 1 < BLOCKS, M, 0)
            next_values, next_more = _rows_of(x, following, end, C, FIRST, REST)
        if PER_TILE:  # one row of shift and scale serves all: else they are most of what is read
            sample = first_row // TOKENS
        else:
            sample = (tl.minimum(rows, M - 1) // TOKENS)[:, None]
        parameters = target + tl.load(group + sample * GROUP_STRIDE).to(tl.int32) * TARGET_STRIDE
        inverse, zero = tl.load(parameters + INVERSE), tl.load(parameters + ZERO)
        here = (rows < M)[:, None]
        to = out + rows.to(tl.int64)[:, None] * out_stride

        columns = tl.arange(0, FIRST)[None, :]
        total = tl.sum(values, 1)
        if REST:
            total += tl.sum(more, 1)
        mean = (total / C)[:, None]
        values = tl.where(here & (columns < C), values - mean, 0.0)
        squares = tl.sum(values * values, 1)
        if REST:
            columns_more = FIRST + tl.arange(0, REST)[None, :]
            more = tl.where(here & (columns_more < C), more - mean, 0.0)
            squares += tl.sum(more * more, 1)
        deviation = (1.0 / tl.sqrt_rn(squares / C + eps))[:, None]
        y = _modulated(values * deviation, shift, scale, sample * modulation_stride, columns, C)
        tl.store(to + columns, nearest_codes(y, inverse, zero, BITS, NATIVE), here & (columns < C))
        if REST:
            y = _modulated(more * deviation, shift, scale, sample * modulation_stride, columns_more, C)
            tl.store(to + columns_more, nearest_codes(y, inverse, zero, BITS, NATIVE), here & (columns_more < C))
        if BLOCKS > 1:
            rows, values, more = following, next_values, next_more


@triton.jit
def _modulated(normal, shift, scale, offset, columns, C):
    factor = 1.0 + tl.load(scale + offset + columns, columns < C, 0.0)
    return normal * factor + tl.load(shift + offset + columns, columns < C, 0.0)
