"""Multiply codes of probabilities with values, and write what becomes of the sums: the end of `hopper_attention`.

There are sums for the first channels and for the rest, each of one operand or of two. Below the values in shared memory
are rows of ones, so the columns after the last channel are the sums of the codes. Zero points of values need these.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from tqdit.backends.triton.kernels.hopper_scores import halves, of_rows, product_layout
from tqdit.backends.triton.kernels.rounding import SOFTMAX, SOFTMAX_ROW, divide, uniform_codes


@gluon.jit
def _operand(codes, BK: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Return codes of probabilities as an operand of a product of COLUMNS.

    They stay in their registers (`attention._permuted`).
    """
    codes = codes.reshape(16 * WARPS, BK // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(16 * WARPS, BK)
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(COLUMNS, WARPS), k_width=4)
    return gl.convert_layout(codes, layout, assert_trivial=True)


@gluon.jit
def start_values(
    codes, values, slot, sums, D_FIRST: gl.constexpr, V_PAD: gl.constexpr, MODE: gl.constexpr, BK: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Start computing sums + P V of a slot without waiting for the result.

    The first channels and the rest are separate, of one operand or two.
    """
    first, rest, fine, fine_rest = sums
    first_values, rest_values = values[0].index(slot).permute((1, 0)), values[1].index(slot).permute((1, 0))
    first = warpgroup_mma(_operand(codes[0], BK, D_FIRST, WARPS), first_values, first, is_async=True)
    rest = warpgroup_mma(_operand(codes[0], BK, V_PAD, WARPS), rest_values, rest, is_async=True)
    if MODE == SOFTMAX:
        fine = warpgroup_mma(_operand(codes[1], BK, D_FIRST, WARPS), first_values, fine, is_async=True)
        fine_rest = warpgroup_mma(_operand(codes[1], BK, V_PAD, WARPS), rest_values, fine_rest, is_async=True)
    return first, rest, fine, fine_rest


@gluon.jit
def complete_values(sums, MODE: gl.constexpr):
    """Wait for the products that `start_values` started."""
    first, rest, fine, fine_rest = sums
    if MODE == SOFTMAX:
        first, rest, fine, fine_rest = warpgroup_mma_wait(0, deps=(first, rest, fine, fine_rest))
    else:
        first, rest = warpgroup_mma_wait(0, deps=(first, rest))
    return first, rest, fine, fine_rest


@gluon.jit
def _quantized(sums, fine, sum_one, sum_two, value, softmax, target, MODE: gl.constexpr, BITS: gl.constexpr):
    """Return codes of P V, whose scales are applied as the reference does; P V itself, fp32, if BITS is 0.

    `sum_one`, `sum_two`: sums of the codes of a row.
    """
    scale, zero = value
    if MODE == SOFTMAX:
        coarse = (sums - zero * sum_one[:, None]).to(gl.float32) * softmax[1]
        small = (fine - zero * sum_two[:, None]).to(gl.float32) * -softmax[0]
        y = (coarse + small) * scale
    elif MODE == SOFTMAX_ROW:
        total = sum_one.to(gl.float32)
        share = gl.div_rn(gl.full_like(total, 0.0) + scale, total)
        y = (sums - zero * sum_one[:, None]).to(gl.float32) * share[:, None]
    else:
        y = (sums - zero * sum_one[:, None]).to(gl.float32) * (softmax[0] * scale)
    if BITS == 0:
        return y
    else:
        return uniform_codes(divide(y, target[0], target[1], True), target[2], BITS)


@gluon.jit
def _split(rest, V_REST: gl.constexpr, V_PAD: gl.constexpr, WARPS: gl.constexpr):
    """Return the last channels of P V, and the sums of the codes, which all columns after these channels have."""
    if V_REST == 0:
        return rest, gl.max(rest, 1)
    else:
        left, right = halves(rest, V_PAD, WARPS)
        return left, gl.max(right, 1)


@gluon.jit
def _store(out, codes, row, column, out_stride, COLUMNS: gl.constexpr, BITS: gl.constexpr, WARPS: gl.constexpr):
    """Write codes (16 WARPS, COLUMNS), 8 bytes a store where that is worth a change of layout; fp32 as it is."""
    ACROSS: gl.constexpr = COLUMNS // 8
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    layout: gl.constexpr = blocked if COLUMNS > 8 and BITS else product_layout(COLUMNS, WARPS)
    down = (row + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, layout))).to(gl.int64) * out_stride
    across = gl.max_contiguous(gl.multiple_of(column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)), 8), 8)
    gl.store(out + (down[:, None] + across[None, :]), gl.convert_layout(codes, layout))


@gluon.jit
def store_result(
    out, sums, row, column, out_stride, value, softmax, target, D_FIRST: gl.constexpr, V_REST: gl.constexpr,
    V_PAD: gl.constexpr, MODE: gl.constexpr, BITS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write the codes, or the fp32 values, of a tile's rows at `column` of the output."""
    first, rest, fine, fine_rest = sums
    last, sum_one = _split(rest, V_REST, V_PAD, WARPS)
    if MODE == SOFTMAX:
        fine_last, sum_two = _split(fine_rest, V_REST, V_PAD, WARPS)
    else:
        fine_last, sum_two = last, sum_one
    if V_REST:
        codes = _quantized(last, fine_last, sum_one, sum_two, value, softmax, target, MODE, BITS)
        _store(out, codes, row, column + D_FIRST, out_stride, V_REST, BITS, WARPS)
    sum_one, sum_two = of_rows(sum_one, D_FIRST, WARPS), of_rows(sum_two, D_FIRST, WARPS)
    codes = _quantized(first, fine, sum_one, sum_two, value, softmax, target, MODE, BITS)
    _store(out, codes, row, column, out_stride, D_FIRST, BITS, WARPS)
