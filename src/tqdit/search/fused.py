"""The search's inner loop on a GPU: two kernels around a product on tensor cores, each tensor read or written once.

As elementwise operations of torch a candidate would move the output of its matmul eleven times, which is most of a
calibration.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tqdit.search.objectives import MatmulObjective, tensor_cores
from tqdit.search.operands import Operand
from tqdit.spec import Grid, IntFormat

TALL, WIDE = (16, 128), (4, 512)  # rows and columns of a tile: where sums are over rows, and everywhere else
CHUNK = 256  # rows of a program that sums over rows


@dataclass(frozen=True)
class Steps:
    """An operand as the sum of `parts`: whole numbers (fp32, in the shape of its values) times a scale per row.

    A number takes 9 bits at most, over a power of two, so that products in TF32 (11 bits) are exact. `scales`: of each
    part (n,), for as many rows as the operand has to one of n.
    """

    parts: list[torch.Tensor]
    scales: list[torch.Tensor]


def steps(operand: Operand, table: torch.Tensor) -> Steps:
    """The operand under the scales of `table`; two parts where the regions' scales have no common step."""
    fmt, grid = IntFormat(operand.spec.bits), operand.spec.grid
    values = operand.values.contiguous()
    if grid.two_region:
        scales = [operand.by_row(table[..., region]) for region in (0, 1)]
        merged = grid is Grid.MRQ_SOFTMAX or operand.merging  # s1 is s2 over a power of two
    else:
        scales, merged = [operand.by_row(table)], False
    parts = [torch.empty_like(values, dtype=torch.float32)]
    if grid.two_region and not merged:
        parts.append(torch.empty_like(parts[0]))
    columns = values.shape[-1]
    rows = values.numel() // columns
    steps_kernel[triton.cdiv(rows, WIDE[0]), triton.cdiv(columns, WIDE[1])](
        values, scales[0], scales[-1], operand.by_row(operand.zero_point), parts[0], parts[-1], rows, columns,
        rows // len(scales[0]), fmt.qmin, fmt.qmax, grid.two_region, grid is Grid.MRQ_SOFTMAX, merged, *WIDE,
    )  # fmt: skip
    return Steps(parts, scales[-1:] if merged else scales)


def sums(objective: MatmulObjective, a: Steps, b: Steps, over_rows: bool, stacked: bool) -> torch.Tensor:
    """Weighted squared errors of the output, summed over its rows: (columns,), or over its columns: (rows,).

    `stacked`: a matmul for each of many matrices, as in attention, and so the scales of `b` are of them; else they are
    of the output's columns.
    """
    (right,), (right_scale,) = b.parts, b.scales
    with tensor_cores():
        products = [objective.combine(left, right) for left in a.parts]
    columns = products[0].shape[-1]
    rows = products[0].numel() // columns
    row_scales = [scale * right_scale if stacked else scale for scale in a.scales]
    tile = TALL if over_rows else WIDE
    programs = (triton.cdiv(columns, tile[1]), triton.cdiv(rows, CHUNK)) if over_rows else (triton.cdiv(rows, tile[0]),)
    shape = (programs[1], columns) if over_rows else (1, rows)
    found = torch.empty(shape, dtype=torch.float32, device=right.device)
    weights = objective.target if objective.weights is None else objective.weights
    errors_kernel[programs](
        products[0], products[-1], row_scales[0], row_scales[-1], right_scale, objective.target, weights, found,
        rows, columns, rows // len(row_scales[0]), len(products) == 2, not stacked, objective.weights is not None,
        over_rows, *tile, CHUNK,
    )  # fmt: skip
    return found.sum(0)


@triton.jit
def steps_kernel(
    values, fine, coarse, zero, out, out_coarse, M, N, SPAN, LOW, HIGH,
    TWO_REGION: tl.constexpr, SOFTMAX: tl.constexpr, MERGED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`grids.uniform.steps`, or `grids.regions.steps` as one tensor or, region by region, as two; SPAN rows a scale."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    here = (rows[:, None] < M) & (columns < N)
    place = tl.minimum(rows, M - 1) // SPAN
    first_scale = tl.load(fine + place)[:, None]
    where = rows[:, None].to(tl.int64) * N + columns
    x = tl.load(values + where, here, 0.0).to(tl.float32)
    if TWO_REGION:
        second_scale = tl.load(coarse + place)[:, None]
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


@triton.jit
def errors_kernel(
    product, product_coarse, scale, scale_coarse, column_scale, target, weights, out, M, N, SPAN,
    TWO: tl.constexpr, BY_COLUMN: tl.constexpr, WEIGHED: tl.constexpr, OVER_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of weights (product scale - target)^2: over CHUNK rows of BN columns, or over all columns of BM rows."""
    if OVER_ROWS:
        first_row, end_row = tl.program_id(1) * CHUNK, tl.minimum((tl.program_id(1) + 1) * CHUNK, M)
        first_column, end_column = tl.program_id(0) * BN, tl.minimum((tl.program_id(0) + 1) * BN, N)
    else:
        first_row, end_row = tl.program_id(0) * BM, tl.minimum((tl.program_id(0) + 1) * BM, M)
        first_column, end_column = 0, N
    total = tl.zeros([BM, BN], tl.float32)
    for row in range(first_row, end_row, BM):
        rows = row + tl.arange(0, BM)[:, None]
        place = tl.minimum(rows, M - 1) // SPAN
        by = tl.load(scale + place)
        if TWO:
            by_coarse = tl.load(scale_coarse + place)
        for column in range(first_column, end_column, BN):
            columns = column + tl.arange(0, BN)[None, :]
            here = (rows < end_row) & (columns < end_column)
            where = rows.to(tl.int64) * N + columns
            value = tl.load(product + where, here, 0.0) * by
            if TWO:
                value += tl.load(product_coarse + where, here, 0.0) * by_coarse
            if BY_COLUMN:
                value *= tl.load(column_scale + columns, columns < N, 0.0)
            error = value - tl.load(target + where, here, 0.0)
            error *= error
            if WEIGHED:
                error *= tl.load(weights + where, here, 0.0)
            total += error
    if OVER_ROWS:
        columns = first_column + tl.arange(0, BN)
        tl.store(out + tl.program_id(1) * N + columns, tl.sum(total, 0), columns < N)
    else:
        rows = first_row + tl.arange(0, BM)
        tl.store(out + rows, tl.sum(total, 1), rows < M)


@triton.jit
def _rounded(x):
    """Half to even. What is beyond 2^22 has no place in any code, and is whole."""
    magic = 12582912.0  # 1.5 2^23
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)
