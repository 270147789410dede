"""The search's inner loop on a GPU: two kernels around a product on tensor cores, each tensor read or written once.

As elementwise operations of torch a candidate would move the output of its matmul eleven times, which is most of a
calibration. Many candidates are scored at once: alone, each would wait for its launches longer than for its kernels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tqdit.search.objectives import MatmulObjective, tensor_cores
from tqdit.search.operands import Operand
from tqdit.spec import Grid, IntFormat, Role

TALL, WIDE = (16, 128), (4, 512)  # rows and columns of a tile: where sums are over rows, and everywhere else
CHUNK = 256  # rows of a program that sums over rows
MEMORY = 512 * 2**20  # bytes of the largest tensor that grows with the candidates


@dataclass(frozen=True)
class Steps:
    """An operand under K tables, as the sum of `parts`: whole numbers (fp32) times a scale per row.

    A matrix has the rows of all candidates, one candidate after the other; or their columns, where those are the
    output's (v). So one product takes all, and the other operand is read once. A number takes 9 bits at most, over a
    power of two, so that products in TF32 (11 bits) are exact. `scales`: of each part (K, n), for as many rows as the
    operand has to one of n.
    """

    parts: list[torch.Tensor]
    scales: list[torch.Tensor]


def at_once(objective: MatmulObjective, a: Operand, searched: Operand) -> int:
    """How many candidates of `searched` fit `MEMORY`. Shapes alone decide: sums round alike wherever they are made."""
    parts = 2 if _has_two_parts(a) else 1
    largest = max(objective.target.numel(), searched.values.numel())
    return max(1, MEMORY // (4 * parts * largest))


def steps(operand: Operand, tables: torch.Tensor) -> Steps:
    """The operand under tables (K, groups, units[, 2]); two parts where the regions' scales have no common step."""
    fmt, grid = IntFormat(operand.spec.bits), operand.spec.grid
    by_region = tables.unbind(-1) if grid.two_region else [tables]
    scales = [operand.by_row(table) for table in by_region]
    zero_point = operand.by_row(operand.zero_point[None])
    values = operand.values.contiguous()
    *matrices, height, columns = values.shape
    count, rows = len(tables), values.numel() // columns
    across = operand.spec.role is Role.VALUE
    shape = (*matrices, height, count * columns) if across else (*matrices, count * height, columns)
    two = _has_two_parts(operand)
    parts = [torch.empty(shape, dtype=torch.float32, device=values.device) for _ in range(1 + two)]
    steps_kernel[triton.cdiv(rows, WIDE[0]) * count, triton.cdiv(columns, WIDE[1])](
        values, scales[0], scales[-1], zero_point, parts[0], parts[-1], rows, columns, count, 1 if across else height,
        zero_point.numel(), fmt.qmin, fmt.qmax, grid.two_region, grid is Grid.MRQ_SOFTMAX, not two, *WIDE,
    )  # fmt: skip
    return Steps(parts, scales if two else scales[-1:])


def sums(objective: MatmulObjective, a: Steps, b: Steps, *, over_rows: bool, stacked: bool) -> torch.Tensor:
    """Weighted squared errors of the output, summed over its rows: (columns, K), or over its columns: (rows, K).

    One of `a` and `b` is of K candidates, the other of one. `stacked`: a matmul for each of many matrices, as in
    attention, and so the scales of `b` are of them; else they are of the output's columns.
    """
    (right,), (right_scale,) = b.parts, b.scales
    with tensor_cores():
        products = [objective.combine(left, right) for left in a.parts]
    height, columns = objective.target.shape[-2:]
    rows = objective.target.numel() // columns
    row_scales = [scale * right_scale if stacked else scale for scale in a.scales]
    count = max(len(row_scales[0]), len(right_scale))
    tile = TALL if over_rows else WIDE
    tiles = (triton.cdiv(columns, tile[1]), triton.cdiv(rows, CHUNK)) if over_rows else (triton.cdiv(rows, tile[0]), 1)
    found = torch.empty(tiles[1], columns if over_rows else rows, count, dtype=torch.float32, device=right.device)
    weights = objective.target if objective.weights is None else objective.weights
    errors_kernel[tiles[0] * count, tiles[1]](
        products[0], products[-1], row_scales[0], row_scales[-1], right_scale, objective.target, weights, found,
        rows, columns, count, height if len(right_scale) == 1 else 1, row_scales[0].shape[1], len(row_scales[0]) > 1,
        len(right_scale) > 1, len(products) == 2, not stacked, objective.weights is not None, over_rows, *tile, CHUNK,
    )  # fmt: skip
    return found.sum(0)


def _has_two_parts(operand: Operand) -> bool:
    """Whether the scales of two regions have no common step; s1 is s2 over a power of two where regions merge."""
    return operand.spec.grid is Grid.MRQ_GELU and not operand.merging


# A kernel's first axis has all candidates of a tile side by side: what they share is in the cache.


@triton.jit(do_not_specialize=["COUNT", "BLOCK", "SCALES"])
def steps_kernel(
    values, fine, coarse, zero, out, out_coarse, M, N, COUNT, BLOCK, SCALES, LOW, HIGH,
    TWO_REGION: tl.constexpr, SOFTMAX: tl.constexpr, MERGED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`grids.uniform.steps`, or `grids.regions.steps` as one tensor or, region by region, as two.

    COUNT candidates of SCALES scales each; in `out` they take turns, BLOCK rows at a time.
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
    """Sums of weights (product scale - target)^2: over CHUNK rows of BN columns, or over all columns of BM rows.

    COUNT candidates, which take turns in `product`, BLOCK rows at a time. MANY: each has scales of its own.
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
    """Where rows of a candidate are, of COUNT that take turns, BLOCK rows at a time."""
    return (rows // BLOCK * COUNT + candidate) * BLOCK + rows % BLOCK


@triton.jit
def _rounded(x):
    """Half to even. What is beyond 2^22 has no place in any code, and is whole."""
    magic = 12582912.0  # 1.5 2^23
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)
