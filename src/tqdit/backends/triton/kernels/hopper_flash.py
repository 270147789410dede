"""Attention in one pass over the keys, for Hopper: any number of keys and queries, softmax rows.

The highest score of a row so far decides its codes. Where a later key has a higher score, the sums so far are made
smaller by the power of the difference, in int32. So codes of earlier keys are relative to a lower score: they are finer
than those of `hopper_attention`, never coarser.

One warp copies blocks of BK keys and values into a ring of stages, and tiles of queries. Two warps make the sums that
zero points need: of each key, and of the values so far. Two groups of four warps compute, each for 64 rows of queries
of its own: while one makes codes, the tensor cores work for the other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tqdit.backends.triton.kernels.attention import LOG2E
from tqdit.backends.triton.kernels.flash_ptx import coding, constraints, rescaling
from tqdit.backends.triton.kernels.hopper import COPY
from tqdit.backends.triton.kernels.hopper_scores import (
    as_floats,
    byte_sums,
    halves,
    of_rows,
    product_layout,
    row_maxima,
    start_scores,
)
from tqdit.backends.triton.kernels.rounding import (
    INVERSE,
    MAGIC_BITS,
    ROW,
    ZERO,
    divide,
    power_of_two,
    uniform_codes,
)

MASKED = gl.constexpr(-16777216)  # as a float -1.7e38; with sums of codes added to these bits still as low
PARTS = gl.constexpr(2)  # groups of warps that compute
WARPS = gl.constexpr(4)  # of each of them
SUMMING = gl.constexpr(2)  # warps that sum; with the one that copies they are a warpgroup
UNIT_BITS = gl.constexpr(6)  # a code counts 2^6 in the sum of codes: that sum is rounded that much finer
REGISTERS = 224, 56, 56  # of a thread that computes, that sums, that copies: at most 65,536 in all
RESCALED_BY = gl.constexpr(-2147483648.0)  # 2^31


@gluon.jit
def _rescale(sums, offsets, by, COLUMNS: gl.constexpr):
    """Return sums + 2 floor((sums + offsets) by 2^-32), skipped where no row of a warp has a `by` but 0."""
    layout: gl.constexpr = product_layout(COLUMNS, WARPS)
    COUNT: gl.constexpr = COLUMNS // 2
    nothing = gl.full_like(sums, 0)
    rows = nothing + of_rows(by, COLUMNS, WARPS)[:, None]
    columns = nothing + offsets.load(gl.SliceLayout(0, layout))[None, :]
    return gl.inline_asm_elementwise(
        rescaling(COUNT), constraints(COUNT), [sums, columns, rows], gl.int32, is_pure=True, pack=COUNT
    )


@gluon.jit
def _operand(x, BK: gl.constexpr, COLUMNS: gl.constexpr):
    """Return scores as the operand of a product of COLUMNS, in the registers where they are."""
    x = x.reshape(16 * WARPS, BK // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(16 * WARPS, BK)
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(COLUMNS, WARPS), k_width=4)
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _codes(
    scores, shift, levels, scale, COLUMNS: gl.constexpr, BK: gl.constexpr, BITS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Return the codes round(levels 2^(scores scale + shift)) - 128 as an operand.

    HALF: powers are rounded to fp16 first, and two of them are scaled at once, by 2^BITS - 1.
    """
    x = as_floats(scores)
    nothing = gl.full_like(x, 0.0)
    e = power_of_two(gl.fma(x, nothing + scale, nothing + shift[:, None]), True)
    e = _operand(e, BK, COLUMNS)
    if HALF:
        return gl.inline_asm_elementwise(coding(BITS, HALF), "=r,f,f,f,f", [e], gl.int8, is_pure=True, pack=4)
    else:
        by = gl.convert_layout(levels, gl.SliceLayout(1, e.type.layout), assert_trivial=True)
        return gl.inline_asm_elementwise(
            coding(BITS, HALF), "=r,f,f,f,f,f,f,f,f", [e, gl.full_like(e, 0.0) + by[:, None]], gl.int8, is_pure=True,
            pack=4,
        )  # fmt: skip


@gluon.jit
def _start_values(codes, values, slot, sums, D_FIRST: gl.constexpr, V_PAD: gl.constexpr):
    """Start computing sums + P V of a slot without waiting for the result."""
    rest_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(V_PAD, WARPS), k_width=4)
    first = warpgroup_mma(codes, values[0].index(slot).permute((1, 0)), sums[0], is_async=True)
    codes = gl.convert_layout(codes, rest_layout, assert_trivial=True)
    rest = warpgroup_mma(codes, values[1].index(slot).permute((1, 0)), sums[1], is_async=True)
    return first, rest


@gluon.jit
def _zero_of(pointers, row, heads, GROUP_STRIDE: gl.constexpr, STRIDES: gl.constexpr):
    """Return the zero point of a sequence's queries, int32."""
    group, query = pointers[1:3]
    time_group = gl.load(group + row // heads * GROUP_STRIDE).to(gl.int32)
    return gl.load(query + (time_group * STRIDES[0] + row % heads * ROW + ZERO)).to(gl.int32)


@gluon.jit
def _parameters(pointers, row, heads, factor, GROUP_STRIDE: gl.constexpr, STRIDES: gl.constexpr):
    """Return what a sequence's rows need: the scale of scores as powers of two, and of v and the target theirs."""
    group, query, key, value, target = pointers[1:]
    time_group, head = gl.load(group + row // heads * GROUP_STRIDE).to(gl.int32), row % heads * ROW
    scale = gl.load(query + (time_group * STRIDES[0] + head)) * gl.load(key + (time_group * STRIDES[1] + head))
    of_value = value + (time_group * STRIDES[2] + head)
    of_target = target + time_group * STRIDES[3]
    return (
        scale * factor * LOG2E, gl.load(of_value), gl.load(of_value + ZERO), gl.load(of_target),
        gl.load(of_target + INVERSE), gl.load(of_target + ZERO),
    )  # fmt: skip


@gluon.jit
def _produce(
    inputs, rings, barriers, numbers, D: gl.constexpr, D_FIRST: gl.constexpr, D_REST: gl.constexpr,
    V_REST: gl.constexpr, STAGES: gl.constexpr, Q_SLOTS: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Copy operands for this program's tiles: the queries of each part, then all keys and values of the head."""
    q, q_rest, k, k_rest, v, v_rest = inputs
    queries, keys, values = rings
    full, empty, q_full, q_empty = barriers[0], barriers[1], barriers[3], barriers[4]
    sequences, N, KEYS = numbers[0], numbers[2], numbers[3]
    BM: gl.constexpr = 16 * WARPS
    tiles, blocks = gl.cdiv(N, BM * PARTS), gl.cdiv(KEYS, BK)
    program, programs = gl.program_id(0), gl.num_programs(0)
    for i in range(0, (sequences * tiles - program + programs - 1) // programs):
        row, tile = (program + i * programs) // tiles, (program + i * programs) % tiles
        place = i % Q_SLOTS
        for part in gl.static_range(PARTS):
            mbarrier.wait(q_empty.index(place * PARTS + part), (i // Q_SLOTS & 1) ^ 1)
            arrived = q_full.index(place * PARTS + part)
            mbarrier.expect(arrived, BM * (D_FIRST + D_REST))
            token = row * N + (tile * PARTS + part) * BM
            COPY(q, [token, 0], arrived, queries[0].index(place * PARTS + part))
            if D_REST:
                COPY(q_rest, [token, D_FIRST], arrived, queries[1].index(place * PARTS + part))
        for block in range(0, blocks):
            number = i * blocks + block
            slot = number % STAGES
            mbarrier.wait(empty.index(slot), (number // STAGES & 1) ^ 1)
            arrived = full.index(slot)
            mbarrier.expect(arrived, BK * (2 * D_FIRST + D_REST + V_REST))
            token = row * KEYS + block * BK
            COPY(k, [token, 0], arrived, keys[0].index(slot))
            if D_REST:
                COPY(k_rest, [token, D_FIRST], arrived, keys[1].index(slot))
            COPY(v, [row * D, block * BK], arrived, values[0].index(slot))
            if V_REST:
                above = values[1].index(slot).slice(0, V_REST, 0)
                COPY(v_rest, [row * D + D_FIRST, block * BK], arrived, above)


@gluon.jit
def _sum(
    rings, barriers, sums, pointers, numbers, GROUP_STRIDE: gl.constexpr, STRIDES: gl.constexpr, D_FIRST: gl.constexpr,
    D_REST: gl.constexpr, V_PAD: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Write what sums of a block start from, and 128 sum(v) of the keys before a block and through it."""
    keys, values = rings[1:]
    full, ready = barriers[0], barriers[2]
    starts, before, through = sums
    sequences, heads, N, KEYS = numbers[:4]
    tiles, blocks = gl.cdiv(N, 16 * WARPS * PARTS), gl.cdiv(KEYS, BK)
    program, programs = gl.program_id(0), gl.num_programs(0)
    zero = _zero_of(pointers, program // tiles, heads, GROUP_STRIDE, STRIDES)
    for i in range(0, (sequences * tiles - program + programs - 1) // programs):
        following = gl.minimum((program + (i + 1) * programs) // tiles, sequences - 1)
        next_zero = _zero_of(pointers, following, heads, GROUP_STRIDE, STRIDES)  # on its way meanwhile
        first_total = byte_sums(values[0].index(0), D_FIRST, BK, SUMMING) * 0
        rest_total = byte_sums(values[1].index(0), V_PAD, BK, SUMMING) * 0
        for block in range(0, blocks):
            number = i * blocks + block
            slot = number % STAGES
            mbarrier.wait(full.index(slot), number // STAGES & 1)
            total = byte_sums(keys[0].index(slot), BK, D_FIRST, SUMMING)
            if D_REST:
                of_rest = byte_sums(keys[1].index(slot), BK, D_REST, SUMMING)
                total += gl.convert_layout(of_rest, total.type.layout)
            numbers_of = block * BK + gl.arange(0, BK, total.type.layout)
            starts.index(slot).store(gl.where(numbers_of < KEYS, MAGIC_BITS - zero * total, MASKED))
            before[0].index(slot).store(128 * first_total)
            before[1].index(slot).store(128 * rest_total)
            first_total += byte_sums(values[0].index(slot), D_FIRST, BK, SUMMING)
            rest_total += byte_sums(values[1].index(slot), V_PAD, BK, SUMMING)
            through[0].index(slot).store(128 * first_total)
            through[1].index(slot).store(128 * rest_total)
            mbarrier.arrive(ready.index(slot))
        zero = next_zero


@gluon.jit
def _quantized(sums, counted, value, target, BITS: gl.constexpr):
    """Return codes of P V; P V itself, fp32, if BITS is 0. `counted`: 2^UNIT_BITS times the sums of codes."""
    scale, zero = value
    total = counted.to(gl.float32) * (1.0 / (1 << UNIT_BITS))
    share = gl.div_rn(gl.full_like(total, 0.0) + scale, total)
    part = (counted & ((1 << UNIT_BITS) - 1)).to(gl.float32) * (1.0 / (1 << UNIT_BITS))  # 0 where no sum has shrunk
    less = part * zero.to(gl.float32)
    y = ((sums - zero * (counted >> UNIT_BITS)[:, None]).to(gl.float32) - less[:, None]) * share[:, None]
    if BITS == 0:
        return y
    else:
        return uniform_codes(divide(y, target[0], target[1], True), target[2], BITS)


@gluon.jit
def _store(
    out, codes, row, N, base, column, out_stride, COLUMNS: gl.constexpr, BITS: gl.constexpr
):  # fmt: skip
    """Write codes (16 WARPS, COLUMNS), 8 bytes a store where that is worth a change of layout; fp32 as it is."""
    ACROSS: gl.constexpr = COLUMNS // 8
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    layout: gl.constexpr = blocked if COLUMNS > 8 and BITS else product_layout(COLUMNS, WARPS)
    rows = row + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, layout))
    down = (base + rows).to(gl.int64) * out_stride
    across = gl.max_contiguous(gl.multiple_of(column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)), 8), 8)
    inside = gl.full((16 * WARPS, COLUMNS), True, gl.int1, layout) & (rows < N)[:, None]
    gl.store(out + (down[:, None] + across[None, :]), gl.convert_layout(codes, layout), inside)


@gluon.jit
def _reference(
    scores, highest, shift, scale, BITS: gl.constexpr, HALF: gl.constexpr, BK: gl.constexpr
):  # fmt: skip
    """Return what the codes of a block follow from: the rows' highest scores so far, shifts of powers, levels of codes.

    The last number is by how much earlier sums shrink: (2^(difference of highest scores) - 1) 2^31, int32, 0 where a
    row has no higher score than before. A shift is rounded; HALF: that makes another highest score of it, so that the
    powers of a row have a factor near 1 in common; else levels are without that factor.
    """
    higher = gl.maximum(highest, of_rows(row_maxima(as_floats(scores), BK, WARPS), BK, WARPS))
    new_shift = -higher * scale
    if HALF:
        levels = new_shift
        shrink = power_of_two(new_shift - shift, True)
    else:
        excess = gl.fma(higher, gl.full_like(higher, 0.0) + scale, new_shift)
        levels = power_of_two(-excess, True) * ((1 << BITS) - 1.0)
        shrink = power_of_two((highest - higher) * scale, True)
    return higher, new_shift, levels, ((shrink - 1.0) * -RESCALED_BY).to(gl.int32)


@gluon.jit
def _consume(
    rings, barriers, sums_rings, pointers, numbers, GROUP_STRIDE: gl.constexpr, STRIDES: gl.constexpr, D: gl.constexpr,
    D_FIRST: gl.constexpr, D_REST: gl.constexpr, V_REST: gl.constexpr, V_PAD: gl.constexpr, STAGES: gl.constexpr,
    Q_SLOTS: gl.constexpr, BK: gl.constexpr, BITS: gl.constexpr, TARGET_BITS: gl.constexpr,
    HALF: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Compute and write the rows of part ME of this program's tiles."""
    query_ring, keys, values = rings
    full, empty, ready, q_full, q_empty = barriers
    starts, before, through = sums_rings
    out = pointers[0]
    sequences, heads, N, KEYS, out_stride, factor = numbers
    BM: gl.constexpr = 16 * WARPS
    tiles, blocks = gl.cdiv(N, BM * PARTS), gl.cdiv(KEYS, BK)
    first_layout: gl.constexpr = product_layout(D_FIRST, WARPS)
    rest_layout: gl.constexpr = product_layout(V_PAD, WARPS)
    program, programs = gl.program_id(0), gl.num_programs(0)
    numbers_of = _parameters(pointers, program // tiles, heads, factor, GROUP_STRIDE, STRIDES)
    for i in range(0, (sequences * tiles - program + programs - 1) // programs):
        row, tile = (program + i * programs) // tiles, (program + i * programs) % tiles
        scale = numbers_of[0]
        of_values = (numbers_of[1], numbers_of[2].to(gl.int32))
        result = (numbers_of[3], numbers_of[4], numbers_of[5])
        following = gl.minimum((program + (i + 1) * programs) // tiles, sequences - 1)
        numbers_of = _parameters(pointers, following, heads, factor, GROUP_STRIDE, STRIDES)  # on their way meanwhile
        place = i % Q_SLOTS * PARTS + ME
        mbarrier.wait(q_full.index(place), i // Q_SLOTS & 1)
        queries = (query_ring[0].index(place), query_ring[1].index(place))
        number = i * blocks
        slot = number % STAGES
        mbarrier.wait(full.index(slot), number // STAGES & 1)
        mbarrier.wait(ready.index(slot), number // STAGES & 1)
        scores = start_scores(queries, keys, slot, starts, slot, D_REST, BK, WARPS)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        highest = gl.full(
            (BM,), 0.0, gl.float32, gl.SliceLayout(1, product_layout(BK, WARPS))
        )  # floats of MAGIC are positive
        shift = highest
        first = gl.zeros((BM, D_FIRST), gl.int32, first_layout)
        rest = gl.zeros((BM, V_PAD), gl.int32, rest_layout)
        for block in range(1, blocks):
            highest, shift, levels, by = _reference(scores, highest, shift, scale, BITS, HALF, BK)
            codes = _codes(scores, shift, levels, scale, D_FIRST, BK, BITS, HALF)
            first = _rescale(first, before[0].index(slot), by, D_FIRST)
            rest = _rescale(rest, before[1].index(slot), by, V_PAD)
            earlier = slot
            slot = (number + block) % STAGES
            mbarrier.wait(full.index(slot), (number + block) // STAGES & 1)
            mbarrier.wait(ready.index(slot), (number + block) // STAGES & 1)
            scores = start_scores(queries, keys, slot, starts, slot, D_REST, BK, WARPS)
            first, rest = _start_values(codes, values, earlier, (first, rest), D_FIRST, V_PAD)
            scores, first, rest = warpgroup_mma_wait(0, deps=(scores, first, rest))
            mbarrier.arrive(empty.index(earlier))
        mbarrier.arrive(q_empty.index(place))
        highest, shift, levels, by = _reference(scores, highest, shift, scale, BITS, HALF, BK)
        codes = _codes(scores, shift, levels, scale, D_FIRST, BK, BITS, HALF)
        first = _rescale(first, before[0].index(slot), by, D_FIRST)
        rest = _rescale(rest, before[1].index(slot), by, V_PAD)
        first, rest = _start_values(codes, values, slot, (first, rest), D_FIRST, V_PAD)
        first, rest = warpgroup_mma_wait(0, deps=(first, rest))
        first += through[0].index(slot).load(gl.SliceLayout(0, first_layout))[None, :]
        rest += through[1].index(slot).load(gl.SliceLayout(0, rest_layout))[None, :]
        mbarrier.arrive(empty.index(slot))

        if V_REST:
            last, right = halves(rest, V_PAD, WARPS)
            counted = gl.max(right, 1)
        else:
            last = rest
            counted = gl.max(rest, 1)
        base, column = row // heads * N, row % heads * D
        first_row = (tile * PARTS + ME) * BM
        if V_REST:
            made = _quantized(last, counted, of_values, result, TARGET_BITS)
            _store(out, made, first_row, N, base, column + D_FIRST, out_stride, V_REST, TARGET_BITS)
        made = _quantized(first, of_rows(counted, D_FIRST, WARPS), of_values, result, TARGET_BITS)
        _store(out, made, first_row, N, base, column, out_stride, D_FIRST, TARGET_BITS)


@gluon.jit
def hopper_flash_kernel(
    q, q_rest, k, k_rest, v, v_rest, out, group, query, key, value, target, sequences, heads, N, KEYS, out_stride,
    factor, GROUP_STRIDE: gl.constexpr, STRIDES: gl.constexpr, D: gl.constexpr, D_FIRST: gl.constexpr,
    D_REST: gl.constexpr, V_REST: gl.constexpr, V_PAD: gl.constexpr, BITS: gl.constexpr, TARGET_BITS: gl.constexpr,
    STAGES: gl.constexpr, Q_SLOTS: gl.constexpr, BK: gl.constexpr, HALF: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attend as `attention_kernel` does on the grid of softmax rows, N queries to KEYS keys a head.

    The codes of v are in the order of `attention._permuted`. head_dim D is D_FIRST and D_REST (of v: V_REST, 0 or half
    of V_PAD or less) columns. REGISTERS: of a thread that computes, that sums, that copies.
    """
    BM: gl.constexpr = 16 * WARPS
    PLACES: gl.constexpr = Q_SLOTS * PARTS
    q_ring = gl.allocate_shared_memory(gl.int8, [PLACES, BM, D_FIRST], q.layout)
    k_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BK, D_FIRST], k.layout)
    v_ring = gl.allocate_shared_memory(gl.int8, [STAGES, D_FIRST, BK], v.layout)
    v_rest_ring = gl.allocate_shared_memory(gl.int8, [STAGES, V_PAD, BK], v.layout)
    if D_REST:
        q_rest_ring = gl.allocate_shared_memory(gl.int8, [PLACES, BM, D_REST], q_rest.layout)
        k_rest_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BK, D_REST], k_rest.layout)
    else:
        q_rest_ring, k_rest_ring = q_ring, k_ring
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    starts = gl.allocate_shared_memory(gl.int32, [STAGES, BK], flat)
    before = gl.allocate_shared_memory(gl.int32, [STAGES, D_FIRST], flat)
    before_rest = gl.allocate_shared_memory(gl.int32, [STAGES, V_PAD], flat)
    through = gl.allocate_shared_memory(gl.int32, [STAGES, D_FIRST], flat)
    through_rest = gl.allocate_shared_memory(gl.int32, [STAGES, V_PAD], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    ACROSS: gl.constexpr = BK // 16
    ones: gl.constexpr = gl.BlockedLayout([1, 16], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=PARTS)
        mbarrier.init(ready.index(slot), count=1)
        v_rest_ring.index(slot).store(gl.full((V_PAD, BK), 1 << UNIT_BITS, gl.int8, ones))  # copies fill the first rows
    for place in gl.static_range(PLACES):
        mbarrier.init(q_full.index(place), count=1)
        mbarrier.init(q_empty.index(place), count=1)
    fence_async_shared()  # without it copies and products would not see these stores
    rings = ((q_ring, q_rest_ring), (k_ring, k_rest_ring), (v_ring, v_rest_ring))
    barriers = (full, empty, ready, q_full, q_empty)
    sums = (starts, (before, before_rest), (through, through_rest))
    pointers = (out, group, query, key, value, target)
    numbers = (sequences, heads, N, KEYS, out_stride, factor)
    gl.warp_specialize(
        [
            (_consume, (
                rings, barriers, sums, pointers, numbers, GROUP_STRIDE, STRIDES, D, D_FIRST, D_REST, V_REST, V_PAD,
                STAGES, Q_SLOTS, BK, BITS, TARGET_BITS, HALF, gl.constexpr(0))),
            (_consume, (
                rings, barriers, sums, pointers, numbers, GROUP_STRIDE, STRIDES, D, D_FIRST, D_REST, V_REST, V_PAD,
                STAGES, Q_SLOTS, BK, BITS, TARGET_BITS, HALF, gl.constexpr(1))),
            (_sum, (
                rings, barriers, sums, pointers, numbers, GROUP_STRIDE, STRIDES, D_FIRST, D_REST, V_PAD, STAGES, BK)),
            (_produce, (
                (q, q_rest, k, k_rest, v, v_rest), rings, barriers, numbers, D, D_FIRST, D_REST, V_REST, STAGES,
                Q_SLOTS, BK)),
        ],
        [WARPS, SUMMING, 1],
        [REGISTERS[0], REGISTERS[1], REGISTERS[2]],
    )  # fmt: skip
