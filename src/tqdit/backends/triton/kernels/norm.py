"""LayerNorm, adaLN's modulation and quantization in one pass over the residual stream."""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.rounding import INVERSE, ZERO, nearest_codes


@triton.jit
def norm_quantize_kernel(
    x, shift, scale, modulation_stride, eps, target, group, out, M, C, TOKENS, out_stride,
    GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, BITS: tl.constexpr,
    PER_TILE: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Codes of LayerNorm(x) (1 + scale) + shift for ROWS rows of x (M, C); shift and scale have a row per sample.

    A row is FIRST columns and REST more, powers of two: the lanes of one for C = 1152 would be idle for nearly half.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if PER_TILE:  # one row of shift and scale serves all: else they are most of what is read
        sample = tl.program_id(0) * ROWS // TOKENS
    else:
        sample = (tl.minimum(rows, M - 1) // TOKENS)[:, None]
    target += tl.load(group + sample * GROUP_STRIDE).to(tl.int32) * TARGET_STRIDE
    x += rows.to(tl.int64)[:, None] * C
    out += rows.to(tl.int64)[:, None] * out_stride
    shift += sample * modulation_stride
    scale += sample * modulation_stride
    here = (rows < M)[:, None]

    first = tl.arange(0, FIRST)[None, :]
    inside = here & (first < C)
    values = tl.load(x + first, inside, 0.0)
    total = tl.sum(values, 1)
    if REST:
        more = FIRST + tl.arange(0, REST)[None, :]
        inside_more = here & (more < C)
        values_more = tl.load(x + more, inside_more, 0.0)
        total += tl.sum(values_more, 1)
    mean = (total / C)[:, None]
    values = tl.where(inside, values - mean, 0.0)
    squares = tl.sum(values * values, 1)
    if REST:
        values_more = tl.where(inside_more, values_more - mean, 0.0)
        squares += tl.sum(values_more * values_more, 1)
    deviation = 1.0 / tl.sqrt_rn(squares / C + eps)
    _store(out, shift, scale, target, first, C, inside, values, deviation, BITS, NATIVE)
    if REST:
        _store(out, shift, scale, target, more, C, inside_more, values_more, deviation, BITS, NATIVE)


@triton.jit
def _store(out, shift, scale, target, columns, C, inside, values, deviation, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Modulate and quantize some columns."""
    factor = 1.0 + tl.load(scale + columns, columns < C, 0.0)
    y = values * deviation[:, None] * factor + tl.load(shift + columns, columns < C, 0.0)
    codes = nearest_codes(y, tl.load(target + INVERSE), tl.load(target + ZERO), BITS, NATIVE)
    tl.store(out + columns, codes, inside)
