"""The linear kernel for Hopper whose results are floats: any number of rows and columns, steps of rows or static ones.

It is made as `kernels.hopper`, whose module text explains the barriers: one warp copies blocks of both operands into a
ring of stages, and two groups of four warps take a program's tiles in turn. What differs: results leave through shared
memory by bulk copies, which write whole lines and nothing beyond the matrix. So tiles may hang over its edges, where
bulk copies read zeros. No row needs to know its sample, but on static grids with time groups.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tqdit.backends.triton.kernels.dependent import wait_for_predecessor
from tqdit.backends.triton.kernels.hopper import COPY_BACK, X_ROW, _pieces, _produce, x_layout
from tqdit.backends.triton.kernels.linear import tile_of
from tqdit.backends.triton.kernels.rounding import ZERO

SMALL_INTEGERS = ("M", "N", "K", "TOKENS")  # a kernel compiled for one of these serves all others
SCALARS = ("weight_scale", "weight_sums", "bias", "row_steps", "group", "source")  # read by number: any alignment


def y_blocks_of(y: torch.Tensor, rows: int, columns: int, block: int) -> TensorDescriptor:
    """Describe blocks of `block` rows of X_ROW bytes of a matrix (rows, columns) of fp32, fp16 or bf16."""
    size = y.element_size()
    return TensorDescriptor(y, [rows, columns], [columns, 1], [block, X_ROW // size], x_layout(size))


@gluon.jit
def _consume(
    a_ring, b_ring, y_ring, barriers, y, pointers, numbers,
    GROUP_STRIDE: gl.constexpr, SOURCE_STRIDE: gl.constexpr, ROWS: gl.constexpr, EVEN: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, SLOTS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Run one of the two groups of four warps: multiply and finish every second tile of the program."""
    full, empty, turn = barriers
    weight_scale, weight_sums, bias, row_steps, group, source = pointers
    M, N, K, TOKENS, tiles_m, tiles_n = numbers
    PIECES: gl.constexpr = BN // PIECE
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    of_part: gl.constexpr = gl.SliceLayout(0, part)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [BN], flat)
    biases = gl.allocate_shared_memory(gl.float32, [BN], flat)
    if not ROWS:
        totals = gl.allocate_shared_memory(gl.int32, [BN], flat)

    wait_for_predecessor()
    programs, steps = gl.num_programs(0), gl.cdiv(K, BK)
    for tile in range(gl.program_id(0) + ME * programs, tiles_m * tiles_n, 2 * programs):
        # What the epilogue reads is on its way before the group waits for its turn.
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, BAND)
        first_row, first_column = tile_m * BM, tile_n * BN
        rows = first_row + gl.arange(0, BM, gl.SliceLayout(1, part))
        columns = first_column + gl.arange(0, BN, line)
        if EVEN:
            by_weight, added = gl.load(weight_scale + columns), gl.load(bias + columns)
        else:
            by_weight = gl.load(weight_scale + columns, columns < N, 0.0)
            added = gl.load(bias + columns, columns < N, 0.0)
        if ROWS:
            step = gl.load(row_steps + rows, rows < M, 0.0)
        else:
            sample = gl.minimum(rows, M - 1) // TOKENS
            operand = source + gl.load(group + sample * GROUP_STRIDE).to(gl.int32) * SOURCE_STRIDE
            step = gl.load(operand)
            zero = gl.load(operand + ZERO).to(gl.int32)
            if EVEN:
                total = gl.load(weight_sums + columns)
            else:
                total = gl.load(weight_sums + columns, columns < N, 0)
            totals.store(total)
        scales.store(by_weight)
        biases.store(added)

        nth = tile // programs  # of the program's tiles
        first_block = nth * steps
        mbarrier.wait(turn.index(ME), (nth // 2 & 1) ^ (1 - ME))  # the first turn of the first group comes by itself
        sums = gl.zeros((BM, BN), gl.int32, product)
        for k in range(0, steps):
            stage = (first_block + k) % STAGES
            mbarrier.wait(full.index(stage), (first_block + k) // STAGES & 1)
            weights = b_ring.index(stage).permute((1, 0))
            running = warpgroup_mma(a_ring.index(stage), weights, sums, use_acc=k > 0, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(running,))  # the block before this one is multiplied
            mbarrier.arrive(empty.index((first_block + k + STAGES - 1) % STAGES), pred=k > 0)
        mbarrier.arrive(turn.index(1 - ME))
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((first_block + steps - 1) % STAGES))

        # s_x s_w (acc - z_x colsum(W)) + bias, or (acc s_row) s_w + bias, rounded in the order of ops.reference.
        pieces = _pieces(sums, BM, BN, PIECE)
        for piece in gl.static_range(PIECES):
            scale = scales.slice(piece * PIECE, PIECE).load(of_part)[None, :]
            if ROWS:
                result = pieces[piece].to(gl.float32) * step[:, None] * scale
            else:
                total = totals.slice(piece * PIECE, PIECE).load(of_part)[None, :]
                result = (pieces[piece] - zero[:, None] * total).to(gl.float32) * (step[:, None] * scale)
            result = result + biases.slice(piece * PIECE, PIECE).load(of_part)[None, :]
            block = y_ring.index(ME * SLOTS + piece % SLOTS)
            tma.store_wait(SLOTS - 1)  # what was in this slot is on its way out
            block.store(result.to(y.dtype))
            fence_async_shared()
            COPY_BACK(y, [first_row, first_column + piece * PIECE], block)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SMALL_INTEGERS, do_not_specialize_on_alignment=SCALARS)
def hopper_float_kernel(
    weight_scale, weight_sums, bias, row_steps, group, source, a, b, y, M, N, K, TOKENS,
    GROUP_STRIDE: gl.constexpr, SOURCE_STRIDE: gl.constexpr, ROWS: gl.constexpr, EVEN: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, SLOTS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write y (M, N) = scaled a (M, K) . b (N, K)^T + bias; a, b and y are descriptors of blocks.

    ROWS: each row of `a` has a step of its own in `row_steps`, fp32 (M,); else steps and zero points are in the table
    `source`, in the row that `group` has for a row's sample, of TOKENS rows. EVEN: N is a multiple of BN. SLOTS: blocks
    of results that each group has on their way out, a divisor of BN / PIECE.
    """
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], a.layout)
    b_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], b.layout)
    y_ring = gl.allocate_shared_memory(y.dtype, [2 * SLOTS, BM, PIECE], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()  # copies arrive at the barriers as initialized
    barriers = (full, empty, turn)

    tiles_m, tiles_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
    pointers = (weight_scale, weight_sums, bias, row_steps, group, source)
    numbers = (M, N, K, TOKENS, tiles_m, tiles_n)
    gl.warp_specialize(
        [
            (_consume, (
                a_ring, b_ring, y_ring, barriers, y, pointers, numbers, GROUP_STRIDE, SOURCE_STRIDE, ROWS, EVEN, BM,
                BN, BK, BAND, STAGES, PIECE, SLOTS, gl.constexpr(0))),
            (_consume, (
                a_ring, b_ring, y_ring, barriers, y, pointers, numbers, GROUP_STRIDE, SOURCE_STRIDE, ROWS, EVEN, BM,
                BN, BK, BAND, STAGES, PIECE, SLOTS, gl.constexpr(1))),
            (_produce, (a, b, a_ring, b_ring, barriers, tiles_m, tiles_n, K, BM, BN, BK, BAND, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
