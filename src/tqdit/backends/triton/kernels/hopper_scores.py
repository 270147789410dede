"""Share code between the attention kernels for Hopper: layouts of blocks and products, sums and maxima of rows, scores.

Scores start from what zero points need, as the bits of floats: the bits of the integer scores then are floats as well.
"""

from collections.abc import Sequence

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

PRIVATE = gl.constexpr(not hasattr(gl.shared_memory_descriptor, "reinterpret"))  # its name before Triton 3.7


def block_layout(width: int) -> gl.NVMMASharedLayout:
    """Return the layout of a block of `width` columns of codes in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(width, 128), element_bitwidth=8, rank=2)


def blocks_of(codes: torch.Tensor, shape: Sequence[int], stride: int, block: Sequence[int]) -> TensorDescriptor:
    """Describe blocks of `block` rows and columns of a matrix of codes whose rows are `stride` bytes apart."""
    return TensorDescriptor(codes, list(shape), [stride, 1], list(block), block_layout(block[1]))


@gluon.constexpr_function
def product_layout(columns: int, warps: int) -> gl.NVMMADistributedLayout:
    """Return the layout of a product of 16 rows a warp and this number of columns."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 32])


@gluon.jit
def byte_sums(memory, ROWS: gl.constexpr, BYTES: gl.constexpr, WARPS: gl.constexpr):
    """Return the sums of the rows of int8 (ROWS, BYTES) in shared memory.

    The place of a byte in its row does not matter.
    """
    WORDS: gl.constexpr = BYTES // 4
    ACROSS: gl.constexpr = WORDS // 4
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    blocked: gl.constexpr = gl.BlockedLayout([1, 4], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    if PRIVATE:
        words = memory._reinterpret(gl.int32, [ROWS, WORDS], flat).load(blocked)
    else:
        words = memory.reinterpret(gl.int32, [ROWS, WORDS], flat).load(blocked)
    sums = gl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, 0x01010101, 0;", "=r,r", [words], gl.int32, is_pure=True, pack=1
    )
    return gl.sum(sums, 1)


@gluon.jit
def halves(x, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Return the left and the right half of the columns of a product, in the registers where they are."""
    layout: gl.constexpr = product_layout(COLUMNS // 2, WARPS)
    left, right = x.reshape(16 * WARPS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def of_rows(x, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Return a value per row in a layout for products of this number of columns."""
    return gl.convert_layout(x, gl.SliceLayout(1, product_layout(COLUMNS, WARPS)), assert_trivial=True)


@gluon.jit
def row_maxima(x, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Return the maxima of rows, compared by halves first: these comparisons do not wait for each other."""
    if COLUMNS > 16:
        left, right = halves(x, COLUMNS, WARPS)
        return row_maxima(gl.maximum(left, right), COLUMNS // 2, WARPS)
    else:
        return gl.max(x, 1)


@gluon.jit
def start_scores(
    queries, keys, slot, starts, block, D_REST: gl.constexpr, BK: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Start computing starts + q k^T of a slot of keys, int32 (16 WARPS, BK), without waiting for the result."""
    layout: gl.constexpr = product_layout(BK, WARPS)
    start = gl.full((16 * WARPS, BK), 0, gl.int32, layout)
    start += starts.index(block).load(gl.SliceLayout(0, layout))[None, :]
    scores = warpgroup_mma(queries[0], keys[0].index(slot).permute((1, 0)), start, is_async=True)
    if D_REST:
        scores = warpgroup_mma(queries[1], keys[1].index(slot).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def as_floats(scores):
    """Return integer scores, which start from MAGIC_BITS, as the floats of the same bits."""
    return scores.to(gl.float32, bitcast=True)
