"""Linear layers whose input stays in float: integer weights are exact in bf16, and an fp32 input is three bf16 numbers.

So tensor cores compute the product with the precision of fp32, and the weight is read as integers. An input in fp16 is
two bf16 numbers, one in bf16 is itself: fewer products. Conversions are made of integer operations and additions, which
have several times the rate of the instructions for them (I2F, F2F).
"""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.rounding import stored_as

# Four int8 codes w = 128 s + l, s in (-1, 0), as bf16: (128 + l) - (128 - 128 s), whose bits are 0x4300 | l and
# 0x4300 | (w & 0x80). The subtraction is a multiply-add, which GPUs before Hopper have for pairs of bf16.
TO_BF16 = tl.constexpr("""{
    .reg .b32 pair, value, less, one;
    mov.b32 one, 0x3F803F80;
    prmt.b32 pair, $2, 0, 0x4140;
    lop3.b32 value, pair, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 less, pair, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $0, value, one, less;
    prmt.b32 pair, $2, 0, 0x4342;
    lop3.b32 value, pair, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 less, pair, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $1, value, one, less;
}""")
# The same as fp32: w + 128 are the low bits of 2^23 + w + 128.
TO_FP32 = tl.constexpr("""{
    .reg .b32 bytes, bits;
    xor.b32 bytes, $4, 0x80808080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7440;
    sub.rn.f32 $0, bits, 0f4B000080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7441;
    sub.rn.f32 $1, bits, 0f4B000080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7442;
    sub.rn.f32 $2, bits, 0f4B000080;
    prmt.b32 bits, bytes, 0x4B000000, 0x7443;
    sub.rn.f32 $3, bits, 0f4B000080;
}""")


# Four packed codes to int8 in one register: bytes $1 (and $4) hold more codes each, bytes $2 (and $3) are ones where
# the upper of two is meant. With the sign bit turned codes are w + 8 or w + 32; the highest bit keeps borrows apart.
FROM_4_BITS = tl.constexpr("""{
    .reg .b32 upper, codes;
    shr.u32 upper, $1, 4;
    lop3.b32 codes, $2, upper, $1, 0xCA;
    lop3.b32 codes, codes, 0x0F0F0F0F, 0x88888888, 0x6A;
    sub.u32 codes, codes, 0x08080808;
    xor.b32 $0, codes, 0x80808080;
}""")
FROM_6_BITS = tl.constexpr("""{
    .reg .b32 upper, codes, top;
    shr.u32 upper, $1, 4;
    lop3.b32 codes, $2, upper, $1, 0xCA;
    shr.u32 upper, $4, 4;
    lop3.b32 top, $2, upper, $4, 0xCA;
    shr.u32 upper, top, 2;
    lop3.b32 top, $3, upper, top, 0xCA;
    shl.b32 top, top, 4;
    lop3.b32 codes, 0x0F0F0F0F, codes, top, 0xCA;
    lop3.b32 codes, codes, 0x3F3F3F3F, 0xA0A0A0A0, 0x6A;
    sub.u32 codes, codes, 0x20202020;
    xor.b32 $0, codes, 0x80808080;
}""")


@triton.jit
def _codes(low, high, depth, inside, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return codes at `depth` of rows that start at the pointers `low` and `high`, packed as `TritonLinear` says."""
    block, place = depth // 128, depth % 128
    quarter = place // 32
    if BITS == 8:
        codes = tl.load(low + depth, inside, 0)
    elif BITS == 4:
        packed = tl.load(low + block * 64 + place % 64, inside, 0)
        if NATIVE:
            half = (-(place // 64)).to(tl.int8)
            codes = tl.inline_asm_elementwise(FROM_4_BITS, "=r,r,r", [packed, half], tl.int8, True, 4)
        else:
            codes = (((packed.to(tl.int32) >> (4 * (place // 64))) & 15) ^ 8) - 8
    else:
        nibble = tl.load(low + block * 64 + quarter % 2 * 32 + place % 32, inside, 0)
        top = tl.load(high + block * 32 + place % 32, inside, 0)
        if NATIVE:
            half, odd = (-(quarter // 2)).to(tl.int8), (-(quarter % 2)).to(tl.int8)
            codes = tl.inline_asm_elementwise(FROM_6_BITS, "=r,r,r,r,r", [nibble, half, odd, top], tl.int8, True, 4)
        else:
            shifted = top.to(tl.int32) >> (2 * quarter)
            codes = (((shifted & 3) << 4 | ((nibble.to(tl.int32) >> (4 * (quarter // 2))) & 15)) ^ 32) - 32
    return codes


@triton.jit
def _floats(codes, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """Return codes as bf16 or fp32."""
    if not NATIVE:
        result = codes.to(tl.float32)
    elif BF16:
        result = tl.inline_asm_elementwise(TO_BF16, "=r,=r,r", [codes], tl.bfloat16, True, 4)
    else:
        result = tl.inline_asm_elementwise(TO_FP32, "=f,=f,=f,=f,r", [codes], tl.float32, True, 4)
    return result


@triton.jit
def _upper(value):
    """Return the first 8 of the 24 binary digits of an fp32 number."""
    return (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _bf16(value, NATIVE: tl.constexpr):
    """Return a number of 8 digits as bf16: the upper half of its bits."""
    if NATIVE:
        value = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def _added(sums, value, weight, TURNED: tl.constexpr):
    """Return sums and a product of bf16 numbers with a weight, or the transposed product."""
    return tl.dot(weight, value.trans(), sums) if TURNED else tl.dot(value, weight.trans(), sums)


@triton.jit
def tile_sums(
    read, there, codes, codes_high, columns, N, K, codes_stride, high_stride, BITS: tl.constexpr, NATIVE: tl.constexpr,
    TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return sums (BM, BN) of products of the rows at the pointers `read`, where they are there, with codes."""
    sums = tl.zeros((BN, BM) if TURNED else (BM, BN), tl.float32)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        value = tl.load(read[:, None] + depth[None, :], there[:, None] & (depth < K)[None, :], 0.0)
        here = (columns < N)[:, None] & (depth < K)[None, :]
        row = columns.to(tl.int64)[:, None]
        weight = _codes(codes + row * codes_stride, codes_high + row * high_stride, depth[None, :], here, BITS, NATIVE)
        weight = _floats(weight, True, NATIVE)
        if read.dtype.element_ty == tl.bfloat16:
            sums = _added(sums, value if NATIVE else value.to(tl.float32), weight, TURNED)
        else:  # exact: of 24 digits the first two parts leave 8, and of the 11 of fp16 none
            value = value.to(tl.float32)
            high = _upper(value)
            value -= high
            middle = _upper(value)
            if read.dtype.element_ty == tl.float32:
                sums = _added(sums, _bf16(value - middle, NATIVE), weight, TURNED)
            sums = _added(sums, _bf16(middle, NATIVE), weight, TURNED)
            sums = _added(sums, _bf16(high, NATIVE), weight, TURNED)
    if TURNED:
        sums = sums.trans()
    return sums


@triton.jit(do_not_specialize=["M"])
def float_input_kernel(
    x, codes, codes_high, weight_scale, bias, out, M, N, K, x_stride, codes_stride, high_stride,
    BITS: tl.constexpr, NATIVE: tl.constexpr, TURNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = (x (M, K) codes (N, K)^T) scale + bias; x and out are fp32, fp16 or bf16, in any pair.

    TURNED: the transposed product, for few rows: tensor cores take 64 rows of their first operand, and 8 of the second.
    Not NATIVE: interpreted, so bf16 numbers are fp32.
    """
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tile_sums(
        x + rows.to(tl.int64) * x_stride, rows < M, codes, codes_high, columns, N, K, codes_stride, high_stride, BITS,
        NATIVE, TURNED, BM, BN, BK,
    )  # fmt: skip
    scale = tl.load(weight_scale + columns, columns < N, 0.0)
    added = tl.load(bias + columns, columns < N, 0.0)
    y = stored_as(sums * scale[None, :] + added[None, :], out.dtype.element_ty, NATIVE)
    tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], y, (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def few_sums(
    x, index, index_stride, x_rows, codes, codes_high, columns, M, N, K, x_stride, codes_stride, high_stride,
    LOOKUP: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Return sums (ROWS, BN) of products of a few rows of x with codes, M <= ROWS.

    Reading the weight is the only cost, so each of its rows is read in long pieces and multiplied in fp32. A thread
    adds up its own 16 codes' products; threads' sums are added at the end. LOOKUP: the rows are those at `index` of a
    table x of `x_rows` rows, some row of it where it has none.
    """
    row = columns.to(tl.int64)[:, None, None]
    which = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, BN, BK // 16), tl.float32)
    for k in range(0, K, BK):
        depth = k + (tl.arange(0, BK // 16) * 16)[:, None] + tl.arange(0, 16)[None, :]
        here = (columns < N)[:, None, None] & (depth < K)[None, :, :]
        weight = _codes(
            codes + row * codes_stride, codes_high + row * high_stride, depth[None, :, :], here, BITS, NATIVE
        )
        weight = _floats(weight, False, NATIVE)
        for r in tl.static_range(ROWS):
            place = tl.minimum(r, M - 1)
            if LOOKUP:
                place = tl.load(index + place * index_stride).to(tl.int64)
                place = tl.minimum(tl.maximum(place, 0), x_rows - 1)
            value = tl.load(x + place * x_stride + depth, depth < K, 0.0).to(tl.float32)
            part = tl.sum(weight * value[None, :, :], 2)
            sums += tl.where(which[:, :, None] == r, part[None, :, :], 0.0)
    return tl.sum(sums, 2)


@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x, codes, codes_high, weight_scale, bias, out, M, N, K, x_stride, codes_stride, high_stride,
    BITS: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the result of `float_input_kernel` for a few rows, M <= ROWS."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    which = tl.arange(0, ROWS)[:, None]
    sums = few_sums(
        x, x, 0, M, codes, codes_high, columns, M, N, K, x_stride, codes_stride, high_stride, False, BITS, NATIVE,
        ROWS, BN, BK,
    )  # fmt: skip
    scale = tl.load(weight_scale + columns, columns < N, 0.0)
    added = tl.load(bias + columns, columns < N, 0.0)
    y = stored_as(sums * scale[None, :] + added[None, :], out.dtype.element_ty, NATIVE)
    tl.store(out + which * N + columns[None, :], y, (which < M) & (columns < N)[None, :])


@triton.jit
def dequantize_kernel(
    codes, codes_high, weight_scale, bias, weight_out, bias_out, N, K, codes_stride, high_stride,
    BITS: tl.constexpr, NATIVE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a weight (N, K) and its bias as floats, each rounded once: codes times scale, for a product elsewhere."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.program_id(1) * BK + tl.arange(0, BK)
    here = (columns < N)[:, None] & (depth < K)[None, :]
    row = columns.to(tl.int64)[:, None]
    weight = _codes(codes + row * codes_stride, codes_high + row * high_stride, depth[None, :], here, BITS, NATIVE)
    scale = tl.load(weight_scale + columns, columns < N, 0.0)
    values = _floats(weight, False, NATIVE) * scale[:, None]
    tl.store(weight_out + row * K + depth[None, :], stored_as(values, weight_out.dtype.element_ty, NATIVE), here)
    if tl.program_id(1) == 0:
        added = stored_as(tl.load(bias + columns, columns < N, 0.0), bias_out.dtype.element_ty, NATIVE)
        tl.store(bias_out + columns, added, columns < N)
