"""Quantize a tensor without a LayerNorm before, such as the inputs of a context."""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.rounding import (
    GELU_MERGED,
    INVERSE,
    UNIFORM,
    ZERO,
    divide,
    gelu_codes,
    row_magnitudes,
    row_step,
    uniform_codes,
)


@triton.jit
def quantize_kernel(
    x, target, group, out, M, C, TOKENS, out_stride,
    GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr,
    NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write a (BM, BN) tile of the codes of x (M, C); M = samples * TOKENS. Uniform codes are the reference's."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    columns = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    inside = (rows < M) & (columns < C)
    values = tl.load(x + rows.to(tl.int64) * C + columns, inside, 0.0).to(tl.float32)
    sample = tl.minimum(rows, M - 1) // TOKENS
    operand = target + tl.load(group + sample * GROUP_STRIDE).to(tl.int32) * TARGET_STRIDE
    if MODE == UNIFORM:
        steps = divide(values, tl.load(operand), tl.load(operand + INVERSE), NATIVE)
        codes = uniform_codes(steps, tl.load(operand + ZERO), BITS)
    else:
        codes = gelu_codes(values, operand, MODE == GELU_MERGED, BITS)
    tl.store(out + rows.to(tl.int64) * out_stride + columns, codes, inside)


@triton.jit
def quantize_rows_kernel(
    x, target, group, out, steps, M, C, TOKENS, out_stride,
    GROUP_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the codes of BM rows of x (M, C) on the grid of rows, and their steps, fp32 (M,): both the reference's.

    A row is read twice, BN columns at a time: for its largest magnitude, and for its codes.
    """
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    columns = tl.arange(0, BN)[None, :]
    read = x + rows.to(tl.int64) * C
    magnitude = tl.zeros((BM,), tl.float32)
    for first in range(0, C, BN):
        inside = (rows < M) & (first + columns < C)
        values = tl.load(read + first + columns, inside, 0.0).to(tl.float32)
        magnitude = tl.maximum(magnitude, row_magnitudes(values, NATIVE), propagate_nan=tl.PropagateNan.ALL)
    sample = tl.minimum(rows, M - 1) // TOKENS
    operand = target + tl.load(group + sample * GROUP_STRIDE).to(tl.int32) * TARGET_STRIDE
    step = row_step(magnitude[:, None], operand)
    inverse, zero = tl.div_rn(tl.full((BM, 1), 1.0, tl.float32), step), tl.zeros((BM, 1), tl.float32)
    tl.store(steps + rows, step, rows < M)
    write = out + rows.to(tl.int64) * out_stride
    for first in range(0, C, BN):
        inside = (rows < M) & (first + columns < C)
        values = tl.load(read + first + columns, inside, 0.0).to(tl.float32)
        tl.store(write + first + columns, uniform_codes(divide(values, step, inverse, NATIVE), zero, BITS), inside)
