"""Linear layers whose input stays in float: integer weights are exact in bf16, and an fp32 input is three bf16 numbers.

So tensor cores compute the product with the precision of fp32, and the weight is read as integers.
"""

import triton
import triton.language as tl


@triton.jit
def _codes(low, high, depth, inside, BITS: tl.constexpr):
    """Codes at `depth` of rows that start at the pointers `low` and `high`, packed as `TritonLinear` says."""
    block, place = depth // 128, depth % 128
    quarter = place // 32
    if BITS == 8:
        codes = tl.load(low + depth, inside, 0).to(tl.int32)
    elif BITS == 4:
        packed = tl.load(low + block * 64 + place % 64, inside, 0).to(tl.int32)
        codes = (((packed >> (4 * (place // 64))) & 15) ^ 8) - 8
    else:
        nibble = tl.load(low + block * 64 + quarter % 2 * 32 + place % 32, inside, 0).to(tl.int32)
        top = tl.load(high + block * 32 + place % 32, inside, 0).to(tl.int32) >> (2 * quarter)
        codes = (((top & 3) << 4 | ((nibble >> (4 * (quarter // 2))) & 15)) ^ 32) - 32
    return codes


@triton.jit
def float_input_kernel(
    x, codes, codes_high, weight_scale, bias, out, M, N, K, x_stride, codes_stride, high_stride,
    BITS: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (M, N) = (x (M, K) codes (N, K)^T) scale + bias. WIDE: bf16 numbers multiplied as fp32, if interpreted."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        value = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + depth[None, :],
                        (rows < M)[:, None] & (depth < K)[None, :], 0.0)  # fmt: skip
        here = (columns < N)[:, None] & (depth < K)[None, :]
        row = columns.to(tl.int64)[:, None]
        weight = _codes(codes + row * codes_stride, codes_high + row * high_stride, depth[None, :], here, BITS)
        high = value.to(tl.bfloat16)
        value -= high.to(tl.float32)
        middle = value.to(tl.bfloat16)
        low = (value - middle.to(tl.float32)).to(tl.bfloat16)
        operand: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
        weight = weight.to(operand).trans()
        sums = tl.dot(low.to(operand), weight, sums)
        sums = tl.dot(middle.to(operand), weight, sums)
        sums = tl.dot(high.to(operand), weight, sums)
    scale = tl.load(weight_scale + columns, columns < N, 0.0)
    added = tl.load(bias + columns, columns < N, 0.0)
    y = sums * scale[None, :] + added[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], y, (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def few_rows_kernel(
    x, codes, codes_high, weight_scale, bias, out, M, N, K, x_stride, codes_stride, high_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same for M <= ROWS, a few: reading the weight is all there is, so each of its rows is read in long pieces and
    multiplied in fp32."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    row = columns.to(tl.int64)[:, None]
    which = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, BN), tl.float32)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        here = (columns < N)[:, None] & (depth < K)[None, :]
        weight = _codes(codes + row * codes_stride, codes_high + row * high_stride, depth[None, :], here, BITS)
        weight = weight.to(tl.float32)
        for r in tl.static_range(ROWS):
            value = tl.load(x + tl.minimum(r, M - 1) * x_stride + depth, depth < K, 0.0)
            sums += tl.where(which == r, tl.sum(weight * value[None, :], 1)[None, :], 0.0)
    scale = tl.load(weight_scale + columns, columns < N, 0.0)
    added = tl.load(bias + columns, columns < N, 0.0)
    y = sums * scale[None, :] + added[None, :]
    tl.store(out + which * N + columns[None, :], y, (which < M) & (columns < N)[None, :])
