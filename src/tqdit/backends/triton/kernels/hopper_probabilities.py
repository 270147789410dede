"""Turn the scores of `hopper_attention` into codes of probabilities: maxima and sums of rows, powers, levels, codes.

A score becomes a power with one multiply-add. All powers of a row have a factor in common, and so has their sum;
`code_levels` takes it out. Where keys fill more than two slots, scores are not kept: `sums_over_keys` and
`maxima_over_keys` multiply anew.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from tqdit.backends.triton.kernels.attention import probability_codes, row_codes
from tqdit.backends.triton.kernels.hopper_scores import as_floats, halves, product_layout, start_scores
from tqdit.backends.triton.kernels.rounding import SOFTMAX, SOFTMAX_MERGED, SOFTMAX_ROW, power_of_two


@gluon.jit
def row_sums(x, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Return the sums of rows, added by halves first: these additions do not wait for each other."""
    if COLUMNS > 16:
        left, right = halves(x, COLUMNS, WARPS)
        return row_sums(left + right, COLUMNS // 2, WARPS)
    else:
        return gl.sum(x, 1)


@gluon.jit
def narrowed_maxima(x, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Return the maxima of columns 16 apart, (rows, 16): nothing moves between threads."""
    if COLUMNS > 16:
        left, right = halves(x, COLUMNS, WARPS)
        return narrowed_maxima(gl.maximum(left, right), COLUMNS // 2, WARPS)
    else:
        return x


@gluon.jit
def powers(scores, shift, scale):
    """Return 2^(scores scale + shift) within 2^-20, times a factor of the row that is the same in the row's sum.

    The factor is within 2^(+-scale), for shift is rounded near 1.5 2^23 scale: scales of scores are far below 100.
    """
    x = as_floats(scores)
    nothing = gl.full_like(x, 0.0)
    return power_of_two(gl.fma(x, nothing + scale, nothing + shift[:, None]), True)


@gluon.jit
def code_levels(highest, shift, scale, BITS: gl.constexpr):
    """Return the levels of a code, less the factor that `powers` have in common, for each row; `highest`: its maximum.

    The factor is the power at the maximum, whose exponent is what rounding took from `shift`: a multiply-add has it
    exactly.
    """
    excess = gl.fma(highest, gl.full_like(highest, 0.0) + scale, shift)
    return power_of_two(-excess, True) * ((1 << BITS) - 1.0)


@gluon.jit
def slot_codes(scores, shift, scale, total, probability, MODE: gl.constexpr, BITS: gl.constexpr):
    """Return the codes of a slot's probabilities.

    `total`: the sums of the rows' powers; for softmax rows their `code_levels`.
    """
    e = powers(scores, shift, scale)
    if MODE == SOFTMAX_ROW:
        return row_codes(e, gl.full_like(e, 0.0) + total[:, None])
    else:
        return probability_codes(e, total, probability, MODE, BITS, True)


@gluon.jit
def sums_over_keys(
    queries, keys, starts, base, shift, scale, BLOCKS: gl.constexpr, D_REST: gl.constexpr, HIGHEST: gl.constexpr,
    BK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Return the sums of the powers of all keys, one for each row. HIGHEST: the maxima of the scores instead."""
    result = gl.full_like(shift, 0.0)
    for block in range(0, BLOCKS):
        scores = start_scores(queries, keys, base + block, starts, block, D_REST, BK, WARPS)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if HIGHEST:
            result = gl.maximum(result, gl.max(as_floats(scores), 1))  # floats of MAGIC are positive
        else:
            result += gl.sum(powers(scores, shift, scale), 1)
    return result


@gluon.jit
def maxima_over_keys(
    queries, keys, starts, base, BLOCKS: gl.constexpr, D_REST: gl.constexpr, AT_ONCE: gl.constexpr, BK: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Return the highest score of each row over all keys; threads compare theirs once, at the end."""
    PRODUCTS: gl.constexpr = 2 if D_REST else 1
    result = gl.full((16 * WARPS, 16), 0.0, gl.float32, product_layout(16, WARPS))  # floats of MAGIC are positive
    for block in range(0, BLOCKS, AT_ONCE):
        now = start_scores(queries, keys, base + block, starts, block, D_REST, BK, WARPS)
        if AT_ONCE == 2:
            after = start_scores(queries, keys, base + (block + 1), starts, block + 1, D_REST, BK, WARPS)
            now = warpgroup_mma_wait(PRODUCTS, deps=(now,))
            result = gl.maximum(result, narrowed_maxima(as_floats(now), BK, WARPS))
            now = warpgroup_mma_wait(0, deps=(after,))
        else:
            now = warpgroup_mma_wait(0, deps=(now,))
        result = gl.maximum(result, narrowed_maxima(as_floats(now), BK, WARPS))
    return gl.max(result, 1)


@gluon.jit
def store_trace(
    trace, codes, softmax_zero, row, first_row, first_key, N, MODE: gl.constexpr, BK: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Write the codes of the probabilities as `attention._trace` does."""
    layout: gl.constexpr = product_layout(BK, WARPS)
    rows = first_row + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, layout))
    keys = first_key + gl.arange(0, BK, gl.SliceLayout(0, layout))
    written = codes[0]
    if MODE == SOFTMAX:
        written = codes[0] + codes[1]
    elif MODE != SOFTMAX_MERGED:
        written = (codes[0].to(gl.int32) + 128 + softmax_zero.to(gl.int32)).to(gl.int8)
    gl.store(trace + ((row * N + rows).to(gl.int64)[:, None] * N + keys[None, :]), written)
