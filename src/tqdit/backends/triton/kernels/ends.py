"""The first and the last layer of a transformer on patches: latents to tokens, and tokens to latents.

Both compute with the precision of fp32, on tensor cores: a number of 24 binary digits is three of 8, each exact in
bf16. Rounded to nearest, the first two leave the third without error. Of the nine products of two such numbers the
three smallest are left out, at most 2^-23 of the whole.
"""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.float_input import _added, _bf16, _codes, _floats
from tqdit.backends.triton.kernels.rounding import stored_as


@triton.jit
def embed_kernel(
    x, weight, weight_high, weight_scale, bias, position, out, BATCH, TOKENS, ACROSS, of_sample, of_channel, of_row,
    of_column, weight_stride, high_stride, D, K: tl.constexpr, SIDE: tl.constexpr, BITS: tl.constexpr,
    BIASED: tl.constexpr, NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """Write the residual stream, out (BATCH, TOKENS, D) = patches (BATCH, TOKENS, K) weight (D, K)^T + bias + position.

    x: latents (BATCH, K / SIDE^2, H, W) with any strides, of ACROSS patches in a row. `position`: fp32 (TOKENS, D). A
    tile is BM tokens of each of SAMPLES samples, whose weight and positions are read once.
    """
    across = tl.cdiv(D, BN)
    rows = tl.program_id(0) // across * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % across * BN + tl.arange(0, BN)
    here = (rows < TOKENS)[:, None] & (columns < D)[None, :]
    place = rows[:, None] * D + columns[None, :]
    added = tl.load(position + place, here, 0.0)
    scale, addend = _scale_and_bias(weight_scale, bias, columns, D, BITS, BIASED)
    corner = (rows // ACROSS * SIDE).to(tl.int64) * of_row + (rows % ACROSS * SIDE).to(tl.int64) * of_column
    whole: tl.constexpr = K <= BK
    if whole:
        kept = _weight(weight, weight_high, columns, 0, D, K, weight_stride, high_stride, BITS, True, NATIVE, BK)
    first = tl.program_id(1) * SAMPLES
    for sample in range(first, tl.minimum(first + SAMPLES, BATCH)):
        read = x + tl.cast(sample, tl.int64) * of_sample + corner
        sums = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            depth = k + tl.arange(0, BK)
            channel, line, column = depth // (SIDE * SIDE), depth // SIDE % SIDE, depth % SIDE
            offset = channel.to(tl.int64) * of_channel + line.to(tl.int64) * of_row + column.to(tl.int64) * of_column
            inside = (rows < TOKENS)[:, None] & (depth < K)[None, :]
            pixels = tl.load(read[:, None] + offset[None, :], inside, 0.0).to(tl.float32)
            if whole:
                part = kept
            else:
                part = _weight(
                    weight, weight_high, columns, k, D, K, weight_stride, high_stride, BITS, True, NATIVE, BK
                )
            sums = _product(sums, pixels, part, BITS, NATIVE)
        y = sums * scale[None, :] + addend[None, :] + added
        write = out + tl.cast(sample, tl.int64) * TOKENS * D + place
        tl.store(write, stored_as(y, out.dtype.element_ty, NATIVE), here)


@triton.jit
def unembed_kernel(
    stream, modulation, weight, weight_high, weight_scale, bias, out, flags, eps, TOKENS, ACROSS, modulation_stride,
    weight_stride, high_stride, P: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr, BITS: tl.constexpr,
    BIASED: tl.constexpr, NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write latents, out (B, P / SIDE^2, H, W), for the residual stream (B, TOKENS, D) after the last block.

    A token's pixels are (LayerNorm(x) (1 + scale) + shift) weight (P, D)^T + bias. `modulation`: fp32, shift (D) and
    scale (D) of each sample. `flags`: int8 (B, tiles), whether a tile of a sample has a number that is not finite.
    """
    parts: tl.constexpr = (P + BN - 1) // BN
    sample = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) // parts * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % parts * BN + tl.arange(0, BN)
    there = (rows < TOKENS)[:, None]
    read = stream + (sample * TOKENS + rows)[:, None] * D
    mean, deviation = _moments(read, there, eps, D, BM, BK, STAGES)

    shift = modulation + sample * modulation_stride
    sums = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        depth = k + tl.arange(0, BK)
        value = tl.load(read + depth[None, :], there & (depth < D)[None, :], 0.0).to(tl.float32)
        factor = 1.0 + tl.load(shift + D + depth, depth < D, 0.0)
        addend = tl.load(shift + depth, depth < D, 0.0)
        value = (value - mean[:, None]) * deviation[:, None] * factor[None, :] + addend[None, :]
        part = _weight(weight, weight_high, columns, k, P, D, weight_stride, high_stride, BITS, True, NATIVE, BK)
        sums = _product(sums, value, part, BITS, NATIVE)
    scale, addend = _scale_and_bias(weight_scale, bias, columns, P, BITS, BIASED)
    y = sums * scale[None, :] + addend[None, :]

    here = there & (columns < P)[None, :]
    bad = tl.max(tl.max((here & ((y - y) != 0.0)).to(tl.int32), 1), 0)  # NaN or Inf
    tl.store(flags + sample * tl.num_programs(0) + tl.program_id(0), bad.to(tl.int8))
    channels: tl.constexpr = P // (SIDE * SIDE)
    channel, line, column = columns % channels, columns // channels // SIDE, columns // channels % SIDE
    width = ACROSS * SIDE
    corner = rows // ACROSS * SIDE * width + rows % ACROSS * SIDE
    pixel = channel * (TOKENS * SIDE * SIDE) + line * width + column
    write = out + sample * TOKENS * P + corner[:, None] + pixel[None, :]
    tl.store(write, stored_as(y, out.dtype.element_ty, NATIVE), here)


@triton.jit
def poison_kernel(out, flags, SIZE, TILES, BLOCK: tl.constexpr, FLAGS: tl.constexpr):
    """Overwrite the samples of out (B, SIZE) with NaN that have any of their `flags`, int8 (B, TILES)."""
    sample = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, FLAGS)
    if tl.max(tl.load(flags + sample * TILES + tiles, tiles < TILES, 0).to(tl.int32), 0) > 0:
        for start in range(0, SIZE, BLOCK):
            place = start + tl.arange(0, BLOCK)
            nan = tl.full((BLOCK,), float("nan"), tl.float32).to(out.dtype.element_ty)
            tl.store(out + sample * SIZE + place, nan, place < SIZE)


@triton.jit
def _moments(read, there, eps, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Return the means of rows and the inverses of their deviations, read once.

    A block of columns has two passes in registers. Means and sums of squares of blocks are joined as Chan, Golub and
    LeVeque (1983) do, without the loss of digits that a sum of squares alone has.
    """
    mean, squares = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    seen = tl.zeros((BM,), tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        depth = k + tl.arange(0, BK)
        inside = (depth < D)[None, :]
        value = tl.load(read + depth[None, :], there & inside, 0.0).to(tl.float32)
        count = tl.sum((depth < D).to(tl.float32), 0)
        own = tl.sum(value, 1) / count
        centred = tl.where(inside, value - own[:, None], 0.0)
        delta, total = own - mean, seen + count
        squares += tl.sum(centred * centred, 1) + delta * delta * (seen * count / total)
        mean += delta * (count / total)
        seen = total
    return mean, 1.0 / tl.sqrt_rn(squares / D + eps)


@triton.jit
def _weight(
    weight, high, columns, k, N, K, weight_stride, high_stride, BITS: tl.constexpr, BF16: tl.constexpr,
    NATIVE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return a tile (BN, BK) of a weight (N, K): fp32 of fp32 (BITS of 0), or codes as bf16 or fp32."""
    depth = k + tl.arange(0, BK)[None, :]
    here = (columns < N)[:, None] & (depth < K)
    row = columns.to(tl.int64)[:, None]
    if BITS == 0:
        tile = tl.load(weight + row * weight_stride + depth, here, 0.0)
    else:
        tile = _codes(weight + row * weight_stride, high + row * high_stride, depth, here, BITS, NATIVE)
        tile = _floats(tile, BF16, NATIVE)
    return tile


@triton.jit
def _scale_and_bias(weight_scale, bias, columns, N, BITS: tl.constexpr, BIASED: tl.constexpr):
    """Return what sums are multiplied by, and what is added to the product."""
    scale = tl.full(columns.shape, 1.0, tl.float32)
    if BITS:
        scale = tl.load(weight_scale + columns, columns < N, 0.0)
    addend = tl.zeros(columns.shape, tl.float32)
    if BIASED:
        addend = tl.load(bias + columns, columns < N, 0.0)
    return scale, addend


@triton.jit
def _nearest(value):
    """Return fp32 rounded to 8 binary digits; a NaN may become 0, and then stays in the difference."""
    return ((value.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _product(sums, value, weight, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return sums plus the product of fp32 numbers (BM, BK) with a weight (BN, BK), smallest parts first."""
    high = _nearest(value)
    rest = value - high
    middle = _nearest(rest)
    low = _bf16(rest - middle, NATIVE)
    high, middle = _bf16(high, NATIVE), _bf16(middle, NATIVE)
    if BITS:  # codes are exact in bf16
        sums = _added(sums, low, weight, False)
        sums = _added(sums, middle, weight, False)
        sums = _added(sums, high, weight, False)
    else:
        first = _nearest(weight)
        other = weight - first
        second = _nearest(other)
        third = _bf16(other - second, NATIVE)
        first, second = _bf16(first, NATIVE), _bf16(second, NATIVE)
        sums = _added(sums, low, first, False)
        sums = _added(sums, high, third, False)
        sums = _added(sums, middle, second, False)
        sums = _added(sums, middle, first, False)
        sums = _added(sums, high, second, False)
        sums = _added(sums, high, first, False)
    return sums
