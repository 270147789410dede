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
