"""The search's inner loop on a GPU: two kernels around a product on tensor cores, instead of a dozen passes of torch.

Many candidates are scored at once: alone, each would wait for its launches longer than for its kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton

from tqdit.search.kernels import errors_kernel, steps_kernel
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand
from tqdit.spec import Grid, IntFormat, Role

TALL, WIDE = (16, 128), (4, 512)  # the most rows and columns of a tile: TALL where sums are over rows, else WIDE
CHUNK = 256  # rows of a program that sums over rows
MEMORY = 512 * 2**20  # bytes of the steps of all candidates, or of their products, whichever are more


@dataclass(frozen=True)
class Steps:
    """An operand under K tables, as the sum of `parts`: whole numbers (fp32) times a scale per row.

    A matrix has the rows of all candidates, one candidate after the other; or their columns, where those are the
    output's (v). So one product takes all candidates, and the other operand is read once. A number takes 9 bits at
    most, over a power of two, so that products in TF32 (11 bits) are exact. `scales`: (K, n) for each part; where the
    operand has more than n rows, one scale is for rows / n consecutive ones.
    """

    parts: list[torch.Tensor]
    scales: list[torch.Tensor]


def at_once(objective: MatmulObjective, a: Operand, searched: Operand) -> int:
    """Return how many candidates of `searched` fit `MEMORY`.

    Shapes alone decide, so that sums round alike on every machine.
    """
    parts = 1 + a.independent_regions
    largest = max(objective.target.numel(), searched.values.numel())
    return max(1, MEMORY // (4 * parts * largest))


def steps(operand: Operand, tables: torch.Tensor) -> Steps:
    """Return the operand under tables (K, groups, units[, 2]), with a part for each of two independent regions."""
    fmt, grid = IntFormat(operand.spec.bits), operand.spec.grid
    by_region = tables.unbind(-1) if grid.two_region else [tables]
    scales = [operand.by_row(table) for table in by_region]
    zero_point = operand.by_row(operand.zero_point[None])
    values = operand.values.contiguous()
    *matrices, height, columns = values.shape
    count, rows = len(tables), values.numel() // columns
    across = operand.spec.role is Role.VALUE
    shape = (*matrices, height, count * columns) if across else (*matrices, count * height, columns)
    two = operand.independent_regions
    parts = [torch.empty(*shape, dtype=torch.float32, device=values.device) for _ in range(1 + two)]
    tile = _wide(columns)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        steps_kernel[triton.cdiv(rows, tile[0]) * count, triton.cdiv(columns, tile[1])](
            values, scales[0], scales[-1], zero_point, parts[0], parts[-1], rows, columns, count,
            1 if across else height, zero_point.numel(), fmt.qmin, fmt.qmax, grid.two_region,
            grid is Grid.MRQ_SOFTMAX, not two, *tile,
        )  # fmt: skip
    return Steps(parts, scales if two else scales[-1:])


def sums(objective: MatmulObjective, a: Steps, b: Steps, *, over_rows: bool, stacked: bool) -> torch.Tensor:
    """Return the weighted squared errors of the output, summed over its rows (columns, K) or its columns (rows, K).

    One of `a` and `b` has K candidates, the other one. `stacked`: a matmul for each of many matrices, as in attention;
    the scales of `b` then belong to the matrices, else to the output's columns.
    """
    (right,), (right_scale,) = b.parts, b.scales
    with _tensor_cores():
        products = [objective.combine(left, right) for left in a.parts]
    target = objective.target.contiguous()
    weights = target if objective.weights is None else objective.weights.contiguous()
    height, columns = target.shape[-2:]
    rows = target.numel() // columns
    row_scales = [scale * right_scale if stacked else scale for scale in a.scales]
    count = max(len(row_scales[0]), len(right_scale))
    tile = TALL if over_rows else _wide(columns)
    tiles = (triton.cdiv(columns, tile[1]), triton.cdiv(rows, CHUNK)) if over_rows else (triton.cdiv(rows, tile[0]), 1)
    found = torch.empty(tiles[1], columns if over_rows else rows, count, dtype=torch.float32, device=right.device)
    with torch.cuda.device_of(right):
        errors_kernel[tiles[0] * count, tiles[1]](
            products[0], products[-1], row_scales[0], row_scales[-1], right_scale, target, weights, found,
            rows, columns, count, height if len(right_scale) == 1 else 1, row_scales[0].shape[1],
            len(row_scales[0]) > 1, len(right_scale) > 1, len(products) == 2, not stacked,
            objective.weights is not None, over_rows, *tile, CHUNK,
        )  # fmt: skip
    return found.sum(0)


def _wide(columns: int) -> tuple[int, int]:
    """Return a tile as large as `WIDE`, but no wider than the matrix needs."""
    width = min(WIDE[1], triton.next_power_of_2(columns))
    return WIDE[0] * WIDE[1] // width, width


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let fp32 matmuls on a GPU round their operands to TF32's 11 bits and sum in fp32; on a CPU nothing changes."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before
