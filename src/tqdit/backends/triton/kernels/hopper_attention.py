"""The attention kernel for Hopper: a head's keys and values stay in shared memory for all its rows of queries.

One warp copies: keys and values into a ring of slots of BK tokens, tiles of queries into one of their own. The
other WARPS (4, 8 or 16, 16 rows each) compute. `full[s]`: the copies into slot s are complete; `empty[s]`: all rows
have read it; likewise for queries. Slots and parities are computed from numbers, as in `kernels.hopper`.

Keys that fill one or two slots are multiplied once, and a tile's scores stay in registers. For more there are two
passes: sums of powers first, codes with the final sums second; or, of softmax rows, which need no sum of powers, the
maximum first. What the ordinary kernel spends instructions on is free
here or shared by a head's rows: zero points of queries and values are in what sums start from, the bits of the integer
scores are floats, a score becomes a power with one multiply-add, and rows of ones below the values add up the codes.

`hopper_probabilities` turns scores into codes; `hopper_values` multiplies these with values and writes the result.

All computing warps run the same instructions: as two partitions of a program their code, twice as long, did not stay
in the instruction cache.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from tqdit.backends.triton.kernels.attention import LOG2E, probability_codes, softmax_parameters
from tqdit.backends.triton.kernels.dependent import let_successor_start, wait_for_predecessor
from tqdit.backends.triton.kernels.hopper import COPY
from tqdit.backends.triton.kernels.hopper_probabilities import (
    code_levels,
    maxima_over_keys,
    narrowed_maxima,
    powers,
    row_sums,
    slot_codes,
    store_trace,
    sums_over_keys,
)
from tqdit.backends.triton.kernels.hopper_scores import (
    as_floats,
    byte_sums,
    of_rows,
    product_layout,
    row_maxima,
    start_scores,
)
from tqdit.backends.triton.kernels.hopper_values import complete_values, start_values, store_result
from tqdit.backends.triton.kernels.rounding import INVERSE, MAGIC_BITS, ROW, SOFTMAX, SOFTMAX_ROW, ZERO

COPY_REGISTERS = 24  # registers of a thread that copies


@gluon.jit
def _produce(
    inputs, rings, barriers, sequences, N: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr, D_FIRST: gl.constexpr,
    D_REST: gl.constexpr, V_REST: gl.constexpr, SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr, BK: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Copy operands for this program's parts of heads: the first queries, keys and values, then the other queries."""
    q, q_rest, k, k_rest, v, v_rest = inputs
    queries, keys, values = rings
    full, empty, q_full, q_empty = barriers
    BM: gl.constexpr = 16 * WARPS
    BLOCKS: gl.constexpr = N // BK
    TILES: gl.constexpr = N // BM // PARTS
    program, programs = gl.program_id(0), gl.num_programs(0)
    for part in range(0, (sequences * PARTS - program + programs - 1) // programs):
        row = (program + part * programs) // PARTS
        first_tile = (program + part * programs) % PARTS * TILES
        for tile in range(0, TILES):
            number = part * TILES + tile
            place = number % Q_SLOTS
            mbarrier.wait(q_empty.index(place), (number // Q_SLOTS & 1) ^ 1)
            ready = q_full.index(place)
            mbarrier.expect(ready, BM * (D_FIRST + D_REST))
            token = row * N + (first_tile + tile) * BM
            COPY(q, [token, 0], ready, queries[0].index(place))
            if D_REST:
                COPY(q_rest, [token, D_FIRST], ready, queries[1].index(place))
            if tile == 0:
                for block in range(0, BLOCKS):
                    number = part * BLOCKS + block
                    slot = number % SLOTS
                    mbarrier.wait(empty.index(slot), (number // SLOTS & 1) ^ 1)
                    ready = full.index(slot)
                    mbarrier.expect(ready, BK * (2 * D_FIRST + D_REST + V_REST))
                    token = row * N + block * BK
                    COPY(k, [token, 0], ready, keys[0].index(slot))
                    if D_REST:
                        COPY(k_rest, [token, D_FIRST], ready, keys[1].index(slot))
                    COPY(v, [row * D, block * BK], ready, values[0].index(slot))
                    if V_REST:
                        above = values[1].index(slot).slice(0, V_REST, 0)
                        COPY(v_rest, [row * D + D_FIRST, block * BK], ready, above)


@gluon.jit
def _consume(
    rings, barriers, pointers, numbers, GROUP_STRIDE: gl.constexpr, STRIDES: gl.constexpr, N: gl.constexpr,
    PARTS: gl.constexpr, D: gl.constexpr, D_FIRST: gl.constexpr, D_REST: gl.constexpr, V_REST: gl.constexpr,
    V_PAD: gl.constexpr, SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr, BK: gl.constexpr, MODE: gl.constexpr,
    BITS: gl.constexpr, TARGET_BITS: gl.constexpr, AT_ONCE: gl.constexpr, TRACE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Compute and write the rows of this program's parts of heads."""
    query_ring, keys, values = rings
    full, empty, q_full, q_empty = barriers
    out, trace, group, query, key, value, softmax, target = pointers
    sequences, heads, out_stride, factor = numbers
    BM: gl.constexpr = 16 * WARPS
    BLOCKS: gl.constexpr = N // BK
    TILES: gl.constexpr = N // BM // PARTS
    PRODUCTS: gl.constexpr = 2 if D_REST else 1  # of a call of start_scores
    first_layout: gl.constexpr = product_layout(D_FIRST, WARPS)
    rest_layout: gl.constexpr = product_layout(V_PAD, WARPS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    starts = gl.allocate_shared_memory(gl.int32, [BLOCKS, BK], flat)
    first_starts = gl.allocate_shared_memory(gl.int32, [D_FIRST], flat)
    rest_starts = gl.allocate_shared_memory(gl.int32, [V_PAD], flat)

    program, programs = gl.program_id(0), gl.num_programs(0)
    time_group = gl.load(group).to(gl.int32)
    probability = softmax_parameters(softmax + time_group * STRIDES[3])
    of_target = target + time_group * STRIDES[4]
    result = (gl.load(of_target), gl.load(of_target + INVERSE), gl.load(of_target + ZERO))
    for part in range(0, (sequences * PARTS - program + programs - 1) // programs):
        row = (program + part * programs) // PARTS
        first_tile = (program + part * programs) % PARTS * TILES
        sample, which = row // heads, row % heads
        if GROUP_STRIDE:
            time_group = gl.load(group + sample * GROUP_STRIDE).to(gl.int32)
            probability = softmax_parameters(softmax + time_group * STRIDES[3])
            of_target = target + time_group * STRIDES[4]
            result = (gl.load(of_target), gl.load(of_target + INVERSE), gl.load(of_target + ZERO))
        of_query = query + (time_group * STRIDES[0] + which * ROW)
        of_value = value + (time_group * STRIDES[2] + which * ROW)
        scale = gl.load(of_query) * gl.load(key + (time_group * STRIDES[1] + which * ROW)) * factor * LOG2E
        zero = gl.load(of_query + ZERO).to(gl.int32)
        of_values = (gl.load(of_value), gl.load(of_value + ZERO).to(gl.int32))

        base = part * BLOCKS % SLOTS  # SLOTS is a multiple of BLOCKS: a head's slots follow each other
        for block in range(0, BLOCKS):
            mbarrier.wait(full.index(base + block), part * BLOCKS // SLOTS & 1)
            total = byte_sums(keys[0].index(base + block), BK, D_FIRST, WARPS)
            if D_REST:
                rest_total = byte_sums(keys[1].index(base + block), BK, D_REST, WARPS)
                total += gl.convert_layout(rest_total, total.type.layout)
            starts.index(block).store(MAGIC_BITS - zero * total)
        if MODE != SOFTMAX:  # operands are 128 less than the integers
            first_total = byte_sums(values[0].index(base), D_FIRST, BK, WARPS)
            rest_total = byte_sums(values[1].index(base), V_PAD, BK, WARPS)
            for block in range(1, BLOCKS):
                first_total += byte_sums(values[0].index(base + block), D_FIRST, BK, WARPS)
                rest_total += byte_sums(values[1].index(base + block), V_PAD, BK, WARPS)
            first_starts.store(128 * first_total)
            rest_starts.store(128 * rest_total)

        for tile in range(0, TILES):
            first_row = (first_tile + tile) * BM
            number = part * TILES + tile
            place = number % Q_SLOTS
            mbarrier.wait(q_full.index(place), number // Q_SLOTS & 1)
            queries = (query_ring[0].index(place), query_ring[1].index(place))
            first = gl.zeros((BM, D_FIRST), gl.int32, first_layout)
            rest = gl.zeros((BM, V_PAD), gl.int32, rest_layout)
            if MODE == SOFTMAX:
                fine = gl.zeros((BM, D_FIRST), gl.int32, first_layout)
                fine_rest = gl.zeros((BM, V_PAD), gl.int32, rest_layout)
            else:
                first += first_starts.load(gl.SliceLayout(0, first_layout))[None, :]
                rest += rest_starts.load(gl.SliceLayout(0, rest_layout))[None, :]
                fine = 0
                fine_rest = 0
            sums = (first, rest, fine, fine_rest)

            if BLOCKS <= 2:
                scores = start_scores(queries, keys, base, starts, 0, D_REST, BK, WARPS)
                if BLOCKS == 2:
                    others = start_scores(queries, keys, base + 1, starts, 1, D_REST, BK, WARPS)
                    if MODE == SOFTMAX_ROW:  # the second product goes on while scores of the first are compared
                        scores = warpgroup_mma_wait(PRODUCTS, deps=(scores,))
                        narrowed = narrowed_maxima(as_floats(scores), BK, WARPS)
                        others = warpgroup_mma_wait(0, deps=(others,))
                        narrowed = gl.maximum(narrowed, narrowed_maxima(as_floats(others), BK, WARPS))
                        highest = gl.max(narrowed, 1)
                    else:
                        scores, others = warpgroup_mma_wait(0, deps=(scores, others))
                        highest = row_maxima(gl.maximum(as_floats(scores), as_floats(others)), BK, WARPS)
                else:
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                    highest = row_maxima(as_floats(scores), BK, WARPS)
                mbarrier.arrive(q_empty.index(place))
                shift = -of_rows(highest, BK, WARPS) * scale
                if MODE == SOFTMAX_ROW:
                    total = code_levels(of_rows(highest, BK, WARPS), shift, scale, BITS)
                    codes = slot_codes(scores, shift, scale, total, probability, MODE, BITS)
                else:
                    e = powers(scores, shift, scale)
                    if BLOCKS == 2:
                        more = powers(others, shift, scale)
                        total = of_rows(row_sums(e + more, BK, WARPS), BK, WARPS)
                    else:
                        total = of_rows(row_sums(e, BK, WARPS), BK, WARPS)
                    codes = probability_codes(e, total, probability, MODE, BITS, True)
                if TRACE:
                    store_trace(trace, codes, probability[2], row, first_row, 0, N, MODE, BK, WARPS)
                sums = start_values(codes, values, base, sums, D_FIRST, V_PAD, MODE, BK, WARPS)
                if BLOCKS == 2:
                    if MODE == SOFTMAX_ROW:
                        codes = slot_codes(others, shift, scale, total, probability, MODE, BITS)
                    else:
                        codes = probability_codes(more, total, probability, MODE, BITS, True)
                    if TRACE:
                        store_trace(trace, codes, probability[2], row, first_row, BK, N, MODE, BK, WARPS)
                    sums = start_values(codes, values, base + 1, sums, D_FIRST, V_PAD, MODE, BK, WARPS)
                sums = complete_values(sums, MODE)
            else:
                if MODE == SOFTMAX_ROW:
                    highest = maxima_over_keys(queries, keys, starts, base, BLOCKS, D_REST, AT_ONCE, BK, WARPS)
                    highest = of_rows(highest, BK, WARPS)
                    shift = -highest * scale
                    total = code_levels(highest, shift, scale, BITS)
                else:
                    # Powers relative to the highest score of the first slot instead of all: their sums overflow only
                    # where another score makes a power beyond 2^127.
                    scores = start_scores(queries, keys, base, starts, 0, D_REST, BK, WARPS)
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                    shift = -of_rows(row_maxima(as_floats(scores), BK, WARPS), BK, WARPS) * scale
                    total = row_sums(powers(scores, shift, scale), BK, WARPS)
                    for block in range(1, BLOCKS - AT_ONCE + 1, AT_ONCE):
                        now = start_scores(queries, keys, base + block, starts, block, D_REST, BK, WARPS)
                        if AT_ONCE == 2:
                            after = start_scores(
                                queries, keys, base + (block + 1), starts, block + 1, D_REST, BK, WARPS
                            )
                            now = warpgroup_mma_wait(PRODUCTS, deps=(now,))
                            total += row_sums(powers(now, shift, scale), BK, WARPS)
                            now = warpgroup_mma_wait(0, deps=(after,))
                        else:
                            now = warpgroup_mma_wait(0, deps=(now,))
                        total += row_sums(powers(now, shift, scale), BK, WARPS)
                    if AT_ONCE == 2:  # an even number of slots, less the first
                        last = start_scores(queries, keys, base + (BLOCKS - 1), starts, BLOCKS - 1, D_REST, BK, WARPS)
                        last = warpgroup_mma_wait(0, deps=(last,))
                        total += row_sums(powers(last, shift, scale), BK, WARPS)
                    total = of_rows(total, BK, WARPS)
                    if gl.max((total > 3e38).to(gl.int32), 0) != 0:
                        highest = sums_over_keys(
                            queries, keys, starts, base, shift, scale, BLOCKS, D_REST, True, BK, WARPS
                        )
                        shift = -highest * scale
                        total = sums_over_keys(
                            queries, keys, starts, base, shift, scale, BLOCKS, D_REST, False, BK, WARPS
                        )

                for block in range(0, BLOCKS, AT_ONCE):
                    now = start_scores(queries, keys, base + block, starts, block, D_REST, BK, WARPS)
                    if AT_ONCE == 2:
                        after = start_scores(queries, keys, base + (block + 1), starts, block + 1, D_REST, BK, WARPS)
                        now = warpgroup_mma_wait(PRODUCTS, deps=(now,))
                    else:
                        now = warpgroup_mma_wait(0, deps=(now,))
                    codes = slot_codes(now, shift, scale, total, probability, MODE, BITS)
                    if TRACE:
                        store_trace(trace, codes, probability[2], row, first_row, block * BK, N, MODE, BK, WARPS)
                    started = start_values(codes, values, base + block, sums, D_FIRST, V_PAD, MODE, BK, WARPS)
                    if AT_ONCE == 2:
                        now = warpgroup_mma_wait(4 if MODE == SOFTMAX else 2, deps=(after,))
                        codes = slot_codes(now, shift, scale, total, probability, MODE, BITS)
                        if TRACE:
                            store_trace(
                                trace, codes, probability[2], row, first_row, (block + 1) * BK, N, MODE, BK, WARPS
                            )
                        started = start_values(
                            codes, values, base + (block + 1), started, D_FIRST, V_PAD, MODE, BK, WARPS
                        )
                    sums = complete_values(started, MODE)
                mbarrier.arrive(q_empty.index(place))
            store_result(
                out, sums, sample * N + first_row, which * D, out_stride, of_values, probability, result, D_FIRST,
                V_REST, V_PAD, MODE, TARGET_BITS, WARPS,
            )  # fmt: skip
        for block in range(0, BLOCKS):
            mbarrier.arrive(empty.index(base + block))


@gluon.jit
def hopper_attention_kernel(
    q, q_rest, k, k_rest, v, v_rest, out, trace, group, query, key, value, softmax, target,
    sequences, heads, out_stride, factor,
    GROUP_STRIDE: gl.constexpr, STRIDES: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr,
    D_FIRST: gl.constexpr, D_REST: gl.constexpr, V_REST: gl.constexpr, V_PAD: gl.constexpr, MODE: gl.constexpr,
    BITS: gl.constexpr, TARGET_BITS: gl.constexpr, SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr, BK: gl.constexpr,
    AT_ONCE: gl.constexpr, TRACE: gl.constexpr, WARPS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attend as `attention_kernel` does, for N tokens that fill slots of BK and tiles of 16 WARPS rows.

    head_dim D is D_FIRST and D_REST (of v: V_REST, 0 or half of V_PAD or less) columns. PARTS: of a head's rows, which
    programs take one by one. AT_ONCE: slots whose scores a tile has in registers together, of two passes.
    """
    BM: gl.constexpr = 16 * WARPS
    q_ring = gl.allocate_shared_memory(gl.int8, [Q_SLOTS, BM, D_FIRST], q.layout)
    k_ring = gl.allocate_shared_memory(gl.int8, [SLOTS, BK, D_FIRST], k.layout)
    v_ring = gl.allocate_shared_memory(gl.int8, [SLOTS, D_FIRST, BK], v.layout)
    v_rest_ring = gl.allocate_shared_memory(gl.int8, [SLOTS, V_PAD, BK], v.layout)
    if D_REST:
        q_rest_ring = gl.allocate_shared_memory(gl.int8, [Q_SLOTS, BM, D_REST], q_rest.layout)
        k_rest_ring = gl.allocate_shared_memory(gl.int8, [SLOTS, BK, D_REST], k_rest.layout)
    else:
        q_rest_ring, k_rest_ring = q_ring, k_ring
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], mbarrier.MBarrierLayout())
    ACROSS: gl.constexpr = BK // 16
    ones: gl.constexpr = gl.BlockedLayout([1, 16], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
        v_rest_ring.index(slot).store(gl.full((V_PAD, BK), 1, gl.int8, ones))  # copies fill the first rows only
    for place in gl.static_range(Q_SLOTS):
        mbarrier.init(q_full.index(place), count=1)
        mbarrier.init(q_empty.index(place), count=1)
    fence_async_shared()  # without it copies and products would not see these stores
    wait_for_predecessor()
    let_successor_start()
    rings = ((q_ring, q_rest_ring), (k_ring, k_rest_ring), (v_ring, v_rest_ring))
    barriers = (full, empty, q_full, q_empty)
    pointers = (out, trace, group, query, key, value, softmax, target)
    numbers = (sequences, heads, out_stride, factor)
    gl.warp_specialize(
        [
            (_consume, (
                rings, barriers, pointers, numbers, GROUP_STRIDE, STRIDES, N, PARTS, D, D_FIRST, D_REST, V_REST, V_PAD,
                SLOTS, Q_SLOTS, BK, MODE, BITS, TARGET_BITS, AT_ONCE, TRACE, WARPS)),
            (_produce, (
                (q, q_rest, k, k_rest, v, v_rest), rings, barriers, sequences, N, PARTS, D, D_FIRST, D_REST, V_REST,
                SLOTS, Q_SLOTS, BK, WARPS)),
        ],
        [1],
        [COPY_REGISTERS],
    )  # fmt: skip
