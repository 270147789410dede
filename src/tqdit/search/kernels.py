"""The two kernels of `fused`: an operand's steps under many candidates, and the errors of their products.

A kernel's first axis has all candidates of a tile side by side: what they share is in the cache.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["COUNT", "BLOCK", "SCALES"])
def steps_kernel(
    values, fine, coarse, zero, out, out_coarse, M, N, COUNT, BLOCK, SCALES, LOW, HIGH,
    TWO_REGION: tl.constexpr, SOFTMAX: tl.constexpr, MERGED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write `grids.uniform.steps`, or `grids.regions.steps` as one tensor or, region by region, as two.

    There are COUNT candidates of SCALES scales each; in `out` they take turns, BLOCK rows at a time.
    """
    candidate = tl.program_id(0) % COUNT
    rows = tl.program_id(0) // COUNT * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    here = (rows[:, None] < M) & (columns < N)
    place = tl.minimum(rows, M - 1) // (M // SCALES)
    first_scale = tl.load(fine + candidate * SCALES + place)[:, None]
    x = tl.load(values + rows[:, None].to(tl.int64) * N + columns, here, 0.0).to(tl.float32)
    where = _among(rows, candidate, COUNT, BLOCK)[:, None].to(tl.int64) * N + columns
    if TWO_REGION:
        second_scale = tl.load(coarse + candidate * SCALES + place)[:, None]
        first = (x <= HIGH * first_scale) if SOFTMAX else (x < 0)
        found = _rounded(tl.div_rn(x, tl.where(first, first_scale, second_scale)))
        found = tl.minimum(tl.maximum(found, LOW), HIGH)
        if MERGED:
            tl.store(out + where, tl.where(first, found * tl.div_rn(first_scale, second_scale), found), here)
        else:
            tl.store(out + where, tl.minimum(found, 0.0), here)
            tl.store(out_coarse + where, tl.maximum(found, 0.0), here)
    else:
        point = tl.load(zero + place).to(tl.float32)[:, None]
        found = _rounded(tl.div_rn(x, first_scale + tl.zeros_like(x)))
        tl.store(out + where, tl.minimum(tl.maximum(found, LOW - point), HIGH - point), here)


@triton.jit(do_not_specialize=["COUNT", "BLOCK", "SCALES"])
def errors_kernel(
    product, product_coarse, scale, scale_coarse, column_scale, target, weights, out, M, N, COUNT, BLOCK, SCALES,
    MANY_SCALES: tl.constexpr, MANY_COLUMN_SCALES: tl.constexpr, TWO: tl.constexpr, BY_COLUMN: tl.constexpr,
    WEIGHED: tl.constexpr, OVER_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum weights (product scale - target)^2 over CHUNK rows of BN columns, or over all columns of BM rows.

    There are COUNT candidates, which take turns in `product`, BLOCK rows at a time. MANY: each candidate has scales of
    its own.
    """
    candidate, tile = tl.program_id(0) % COUNT, tl.program_id(0) // COUNT
    if OVER_ROWS:
        first_row, end_row = tl.program_id(1) * CHUNK, tl.minimum((tl.program_id(1) + 1) * CHUNK, M)
        first_column, end_column = tile * BN, tl.minimum((tile + 1) * BN, N)
    else:
        first_row, end_row = tile * BM, tl.minimum((tile + 1) * BM, M)
        first_column, end_column = 0, N
    own = candidate * SCALES if MANY_SCALES else 0
    own_column = candidate * N if MANY_COLUMN_SCALES else 0
    total = tl.zeros([BM, BN], tl.float32)
    for row in range(first_row, end_row, BM):
        rows = row + tl.arange(0, BM)[:, None]
        place = own + tl.minimum(rows, M - 1) // (M // SCALES)
        by = tl.load(scale + place)
        if TWO:
            by_coarse = tl.load(scale_coarse + place)
        among = _among(rows, candidate, COUNT, BLOCK).to(tl.int64) * N
        for column in range(first_column, end_column, BN):
            columns = column + tl.arange(0, BN)[None, :]
            here = (rows < end_row) & (columns < end_column)
            value = tl.load(product + among + columns, here, 0.0) * by
            if TWO:
                value += tl.load(product_coarse + among + columns, here, 0.0) * by_coarse
            if BY_COLUMN:
                value *= tl.load(column_scale + own_column + columns, columns < N, 0.0)
            where = rows.to(tl.int64) * N + columns
            error = value - tl.load(target + where, here, 0.0)
            error *= error
            if WEIGHED:
                error *= tl.load(weights + where, here, 0.0)
            total += error
    if OVER_ROWS:
        columns = first_column + tl.arange(0, BN)
        place = (tl.program_id(1) * N + columns) * COUNT + candidate
        tl.store(out + place, tl.sum(total, 0), columns < N)
    else:
        rows = first_row + tl.arange(0, BM)
        tl.store(out + rows * COUNT + candidate, tl.sum(total, 1), rows < M)


@triton.jit
def _among(rows, candidate, COUNT, BLOCK):
    """Return the rows of a candidate among COUNT candidates that take turns, BLOCK rows at a time."""
    return (rows // BLOCK * COUNT + candidate) * BLOCK + rows % BLOCK


@triton.jit
def _rounded(x):
    """Return the nearest integer, half to even. A number beyond 2^22 is clipped in any case."""
    magic = 12582912.0  # 1.5 2^23
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)
