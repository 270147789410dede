"""Device functions shared by the kernels: parameters of an operand, quantization, division.

A row of a parameter table (`ops.tables`) is read at fixed offsets: scale or s1, coarse scale s2, zero point, 2^shift,
1 / scale, 1 / coarse. NATIVE: compiled for a GPU; the interpreter has neither its instructions nor its fma.
"""

import triton
import triton.language as tl

# How a kernel writes codes: `grids.uniform`, `grids.regions` as two regions or merged into one integer, `grids.row`,
# and `grids.softmax_row`.
UNIFORM = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_MERGED = tl.constexpr(2)
SOFTMAX = tl.constexpr(3)
SOFTMAX_MERGED = tl.constexpr(4)
BY_ROW = tl.constexpr(5)
SOFTMAX_ROW = tl.constexpr(6)

COARSE = tl.constexpr(1)
ZERO = tl.constexpr(2)
FACTOR = tl.constexpr(3)
INVERSE = tl.constexpr(4)
INVERSE_COARSE = tl.constexpr(5)
ROW = tl.constexpr(8)  # floats of a row

SMALLEST = tl.constexpr(2.0**-126)  # the smallest normal number, and so the smallest step
MAGIC = tl.constexpr(12582912.0)  # 1.5 2^23: a number that is added to it is rounded to an integer, half to even
MAGIC_BITS = tl.constexpr(0x4B400000)  # its bits; their lowest byte is 0, so an integer's low byte is the sum's


@triton.jit
def rounded(x):
    """Return the nearest integer, half to even, in the low bits of an int32 that starts at MAGIC_BITS.

    The absolute value of x is below 2^22. One addition takes the place of a conversion, which has a fraction of its
    rate.
    """
    return (x + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def stored_as(x, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Return fp32 in the dtype of the tensor that stores it, rounded half to even: the interpreter cuts bf16 off."""
    if not NATIVE and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def divide(x, by, inverse, NATIVE: tl.constexpr):
    """Return x / by, rounded as IEEE division.

    `inverse`: 1 / by, rounded; `by` is normal. One Newton step on the product with the inverse gives the rounded
    quotient (Markstein), given a fused multiply-add and a quotient that does not overflow.
    """
    if NATIVE:
        quotient = x * inverse
        return tl.fma(tl.fma(quotient, -by, x), inverse, quotient)  # the minus costs an instruction: not for all of x
    else:
        return tl.div_rn(x, by)


@triton.jit
def power_of_two(x, NATIVE: tl.constexpr):
    """Return 2^x within 2 ulp; results below 2^-126 are 0."""
    if NATIVE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(tl.minimum(x, 127.0))


@triton.jit
def reciprocal(x, NATIVE: tl.constexpr):
    """Return 1 / x within 1 ulp for 1 <= x < 2^126, and 0 beyond."""
    if NATIVE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def saturated(x, factor, addend, NATIVE: tl.constexpr):
    """Return x factor + addend, clipped to 0 and 1 (0 for NaN).

    Clipping costs nothing as part of a multiply-add.
    """
    if NATIVE:
        y = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, factor, addend], tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.minimum(tl.maximum(x * factor + addend, 0.0), 1.0)
    return y


@triton.jit
def negative_part(codes, NATIVE: tl.constexpr):
    """Return min(codes, 0) of int8, four at a time: each sign, repeated, is a mask."""
    if NATIVE:
        part = tl.inline_asm_elementwise(
            "{ .reg .b32 m; prmt.b32 m, $1, $1, 0xba98; and.b32 $0, $1, m; }", "=r,r", [codes], tl.int8, is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        part = codes & (codes >> 7)
    return part


@triton.jit
def positive_part(codes, NATIVE: tl.constexpr):
    """Return max(codes, 0) of int8, four at a time."""
    if NATIVE:
        part = tl.inline_asm_elementwise(
            "{ .reg .b32 m; prmt.b32 m, $1, $1, 0xba98; not.b32 m, m; and.b32 $0, $1, m; }", "=r,r", [codes], tl.int8,
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        part = codes ^ (codes & (codes >> 7))
    return part


@triton.jit
def uniform_codes(steps, zero, BITS: tl.constexpr):
    """Return clip(round(steps) + zero) as int8; `zero` is a whole float.

    Clipping to integers commutes with rounding.
    """
    low, high = -(1 << (BITS - 1)) - zero, (1 << (BITS - 1)) - 1 - zero
    return (rounded(tl.minimum(tl.maximum(steps, low), high)) + zero.to(tl.int32)).to(tl.int8)


@triton.jit
def packed_codes(steps, offset):
    """Return `uniform_codes` of 8 bits, compiled for a GPU.

    `offset`: the zero point less MAGIC_BITS. Packing clips, two codes an instruction. A number far above the range
    stays above it when it is rounded; a number far below would wrap around, so it is raised first.
    """
    integers = rounded(tl.maximum(steps, -4194304.0)) + offset
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; cvt.pack.sat.s8.s32.b32 t, $4, $3, 0; cvt.pack.sat.s8.s32.b32 $0, $2, $1, t; }", "=r,r,r,r,r",
        [integers], tl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def nearest_codes(x, inverse, zero, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return `uniform_codes` of x inverse, within 2^-16 steps before rounding, for an x that is not exact anyway.

    The levels are counted from the lowest as a fraction of all, which clips for nothing.
    """
    levels: tl.constexpr = (1 << BITS) - 1.0
    lowest: tl.constexpr = 1.0 * (1 << (BITS - 1))
    level = saturated(x, inverse * (1.0 / levels), (zero + lowest) * (1.0 / levels), NATIVE)
    return tl.fma(level, levels, MAGIC - lowest).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_magnitudes(x, NATIVE: tl.constexpr):
    """Return the largest magnitude of each row of fp32 x (rows, columns), and NaN for a row with a NaN.

    `tl.max` would pass a NaN over. The interpreter compares bits instead, which is slow on a GPU: those of a NaN are
    the largest of all.
    """
    if NATIVE:
        largest = tl.reduce(tl.abs(x), 1, _larger)
    else:
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    return largest


@triton.jit
def row_step(magnitude, operand):
    """Return the step of rows by their largest magnitudes, as `grids.row.row_scales`; `operand`: a row of its table."""
    return _larger(magnitude * tl.load(operand), SMALLEST)


@triton.jit
def gelu_codes(x, operand, MERGED: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of MRQ after GELU; `operand`: a row of its table.

    Merged: c1, or c2 2^shift, plus the zero point.
    """
    negative = x < 0
    steps = x * tl.where(negative, tl.load(operand + INVERSE), tl.load(operand + INVERSE_COARSE))
    low: tl.constexpr = -(1 << (BITS - 1))
    bits = rounded(tl.minimum(tl.maximum(steps, low * 1.0), -low - 1.0))
    if MERGED:
        code = bits - MAGIC_BITS
        bits = tl.where(negative, code, code * tl.load(operand + FACTOR).to(tl.int32))
        bits += tl.load(operand + ZERO).to(tl.int32)
    return bits.to(tl.int8)


@triton.jit
def gelu(x, NATIVE: tl.constexpr):
    """Return 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), computed as x / (1 + exp(-2 u))."""
    # 2 sqrt(2 / pi) log2(e) = 2.302208198
    u = x * (-2.302208198 - 0.1029432396 * (x * x))
    return x * reciprocal(1.0 + power_of_two(u, NATIVE), NATIVE)
