"""The attention kernel: integer Q K^T, softmax in fp32, codes of the probabilities, integer P V, codes of the result.

The keys and values are those of the queries' own tokens, or of a context with another number of tokens. A bias, one
number a key, may be added to the scaled scores.

Static scales apply to normalized probabilities, so a row's maximum and sum come first; softmax rows need the maximum
only, for the sum of their codes takes the place of the sum. Keys that fit one tile are multiplied once; longer
sequences take two passes over the keys, the second with the final maximum and sum.
"""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.rounding import (
    COARSE,
    FACTOR,
    INVERSE,
    INVERSE_COARSE,
    MAGIC,
    MAGIC_BITS,
    ROW,
    SOFTMAX,
    SOFTMAX_MERGED,
    SOFTMAX_ROW,
    UNIFORM,
    ZERO,
    divide,
    negative_part,
    positive_part,
    power_of_two,
    saturated,
    uniform_codes,
)

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _row_sums(codes, DEPTH: tl.constexpr):
    """Return the sums of the rows of int8 (rows, DEPTH), int32.

    They are a product with a column of ones, cheaper than adding bytes.
    """
    ones = tl.broadcast_to((tl.arange(0, 16) == 0).to(tl.int8)[None, :], (DEPTH, 16))
    return tl.sum(tl.dot(codes, ones, out_dtype=tl.int32), 1)


@triton.jit
def _permuted(codes, BM: tl.constexpr, BK: tl.constexpr):
    """Return columns, those of each 16 in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15.

    A thread has columns 2q, 2q + 1, 2q + 8, 2q + 9 of the scores, and as an operand of the next product needs four
    adjacent ones: so they are, and nothing moves between threads. The rows of v are stored in this order.
    """
    return codes.reshape(BM, BK // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BM, BK)


@triton.jit
def _key_sums(keys, keys_rest, zero, FIRST: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr):
    """Return the start of the sums of q k^T: FIRST - zero sum(k)."""
    sums = _row_sums(keys, D_FIRST)
    if D_REST:
        sums += _row_sums(keys_rest, D_REST)
    return FIRST - zero * sums


@triton.jit
def _shifted(sums, keys, keys_rest, zero, D_FIRST: tl.constexpr, D_REST: tl.constexpr, BM: tl.constexpr):
    """Return sums - zero sum(k), as a product with a constant matrix: tensor cores have time, and registers are few.

    - zero may be 128, which int8 lacks: then once more with a matrix of ones.
    """
    most = tl.minimum(-zero, 127)
    sums = tl.dot(tl.full((BM, D_FIRST), 0, tl.int8) + most.to(tl.int8), keys.trans(), sums, out_dtype=tl.int32)
    if D_REST:
        sums = tl.dot(tl.full((BM, D_REST), 0, tl.int8) + most.to(tl.int8), keys_rest.trans(), sums, out_dtype=tl.int32)
    if zero == -128:
        sums = tl.dot(tl.full((BM, D_FIRST), 1, tl.int8), keys.trans(), sums, out_dtype=tl.int32)
        if D_REST:
            sums = tl.dot(tl.full((BM, D_REST), 1, tl.int8), keys_rest.trans(), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def _products(queries, queries_rest, keys, keys_rest, start, D_REST: tl.constexpr):
    """Return start + q k^T, int32."""
    sums = tl.dot(queries, keys.trans(), start, out_dtype=tl.int32)
    if D_REST:
        sums = tl.dot(queries_rest, keys_rest.trans(), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def _scores(sums, first_key, KEYS, centre, scale, bias, EDGE: tl.constexpr, MAGIC_SUM: tl.constexpr, BK: tl.constexpr):
    """Return scores but for their factor and a constant of the row, fp32 (BM, BK), exact; lowest beyond KEYS keys.

    The constant of a row comes from the zero point of the keys and changes nothing in a softmax. With MAGIC_SUM the
    bits of the sums are floats, 1.5 2^23 more than the scores; that cancels when the maximum is subtracted.

    With a bias both constants are taken out first, while the scores are whole numbers. The rest is small, so that its
    product with the scale and the sum with the bias are rounded as those of the reference. Such scores are final.
    """
    if bias is None:
        scores = sums.to(tl.float32, bitcast=True) if MAGIC_SUM else sums.to(tl.float32)
    else:
        if MAGIC_SUM:
            scores = sums.to(tl.float32, bitcast=True) - MAGIC - centre.to(tl.float32)[:, None]
        else:
            scores = (sums - centre[:, None]).to(tl.float32)
        keys = first_key + tl.arange(0, BK)
        scores = scores * scale + (tl.load(bias + keys, keys < KEYS, 0.0) * LOG2E)[None, :]
    if EDGE:
        scores = tl.where((first_key + tl.arange(0, BK) < KEYS)[None, :], scores, LOWEST)
    return scores


@triton.jit
def _centre(queries, queries_rest, query, key, bias, D: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr,
            BM: tl.constexpr):  # fmt: skip
    """Return z_k sum(q - z_q), int32 (BM,): the constant of a row of scores.

    Nothing is computed where there is no bias.
    """
    centre = tl.zeros((BM,), tl.int32)
    if bias is not None:
        centre = _row_sums(queries, D_FIRST)
        if D_REST:
            centre += _row_sums(queries_rest, D_REST)
        centre = (centre - D * tl.load(query + ZERO).to(tl.int32)) * tl.load(key + ZERO).to(tl.int32)
    return centre


@triton.jit
def _tile_scores(
    queries, queries_rest, k, k_rest, first_row, first_key, zero, KEYS, centre, scale, bias, FIRST: tl.constexpr,
    D_FIRST: tl.constexpr, D_REST: tl.constexpr, EDGE: tl.constexpr, MAGIC_SUM: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Return `_scores` of a tile of keys. `first_row`: the first row of the head's keys."""
    keys = k.load([first_row + first_key, 0])
    keys_rest = keys
    if D_REST:
        keys_rest = k_rest.load([first_row + first_key, D_FIRST])
    start = _key_sums(keys, keys_rest, zero, FIRST, D_FIRST, D_REST)
    start = tl.broadcast_to(start[None, :], (BM, BK))
    sums = _products(queries, queries_rest, keys, keys_rest, start, D_REST)
    return _scores(sums, first_key, KEYS, centre, scale, bias, EDGE, MAGIC_SUM, BK)


@triton.jit
def softmax_parameters(softmax):
    """Return a row of the softmax's table in the form that `probability_codes` reads."""
    return (
        tl.load(softmax), tl.load(softmax + COARSE), tl.load(softmax + ZERO), tl.load(softmax + FACTOR),
        tl.load(softmax + INVERSE), tl.load(softmax + INVERSE_COARSE),
    )  # fmt: skip


@triton.jit
def probability_codes(e, total, parameters, MODE: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return codes of e / total as int8 operands of one or two products, within 2^-16 steps before rounding.

    A single operand is the integer minus 128: probabilities are not negative and have up to 256 levels. Two regions:
    the coarse operand, then the fine one, negative as in its codes.
    """
    scale, coarse_scale, zero, factor, inverse, inverse_coarse = parameters
    share = 1.0 / total
    half: tl.constexpr = 1 << (BITS - 1)
    if MODE == UNIFORM:
        high = half - 1.0 - zero
        level = saturated(e, (share * (inverse / high))[:, None], 0.0, NATIVE)
        one = tl.fma(level, high, MAGIC - 128.0).to(tl.int32, bitcast=True).to(tl.int8)
        two = one
    else:
        top: tl.constexpr = half - 1.0
        small = e <= (total * (scale * top))[:, None]
        # Were the fine scale the larger one, values beyond its region would have the top code, as under its own.
        coarse_scale, inverse_coarse = tl.maximum(scale, coarse_scale), tl.minimum(inverse, inverse_coarse)
        fine, coarse = share * inverse, share * inverse_coarse
        if MODE == SOFTMAX:
            fine = -fine
        clipped = tl.minimum(e, (total * (coarse_scale * top))[:, None])
        rounded = tl.fma(clipped, tl.where(small, fine[:, None], coarse[:, None]), MAGIC).to(tl.int32, bitcast=True)
        if MODE == SOFTMAX:
            codes = rounded.to(tl.int8)
            one, two = positive_part(codes, NATIVE), negative_part(codes, NATIVE)
        else:
            merged = rounded - MAGIC_BITS
            merged = tl.where(small, merged, merged * factor.to(tl.int32))
            one = (merged - 128).to(tl.int8)
            two = one
    return one, two


@triton.jit
def row_codes(e, levels):
    """Return codes of e, 1 at a row's maximum, as `probability_codes` does: the integer round(e levels) minus 128.

    `levels`: of a code, 2^bits - 1, times a correction of the row where there is one.
    """
    one = tl.fma(e, levels, MAGIC - 128.0).to(tl.int32, bitcast=True).to(tl.int8)
    return one, one


@triton.jit
def _code_sums(one, two, MODE: tl.constexpr, BK: tl.constexpr):
    """Return the sums of the rows of `probability_codes`, counted as the integers they stand for."""
    sum_one = _row_sums(one, BK)
    sum_two = sum_one
    if MODE == SOFTMAX:
        sum_two = _row_sums(two, BK)
    else:
        sum_one += 128 * BK
    return sum_one, sum_two


@triton.jit
def _trace(trace, one, two, softmax, row, first_row, first_key, N, KEYS, MODE: tl.constexpr, BM: tl.constexpr,
           BK: tl.constexpr):  # fmt: skip
    """Write the codes of the probabilities as the reference has them, (B H, N, KEYS); merged: their integer - 128."""
    rows, keys = first_row + tl.arange(0, BM), first_key + tl.arange(0, BK)
    codes = one
    if MODE == SOFTMAX:
        codes = one + two
    elif MODE != SOFTMAX_MERGED:
        codes = (one.to(tl.int32) + 128 + tl.load(softmax + ZERO).to(tl.int32)).to(tl.int8)
    offset = (row * N + rows).to(tl.int64)[:, None] * KEYS + keys[None, :]
    tl.store(trace + offset, codes, (rows < N)[:, None] & (keys < KEYS)[None, :])


@triton.jit
def _store(out, first_row, sample, head, N, out_stride, sums, fine, value_sum, sum_one, sum_two, value, softmax,
           target, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr,
           TARGET_BITS: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Write codes of the head_dim columns FIRST to FIRST + WIDTH of P V.

    Scales are applied as the reference does. TARGET_BITS of 0: write P V itself, fp32.
    """
    zero = tl.load(value + ZERO).to(tl.int32)
    if MODE == SOFTMAX:
        coarse = (sums - zero * sum_one[:, None]).to(tl.float32) * tl.load(softmax + COARSE)
        small = (fine - zero * sum_two[:, None]).to(tl.float32) * -tl.load(softmax)
        y = (coarse + small) * tl.load(value)
    else:
        centred = (sums + (128 * value_sum[None, :] - zero * sum_one[:, None])).to(tl.float32)
        if MODE == SOFTMAX_ROW:
            y = centred * tl.div_rn(tl.load(value) + tl.zeros((BM,), tl.float32), sum_one.to(tl.float32))[:, None]
        else:
            y = centred * (tl.load(softmax) * tl.load(value))
    if TARGET_BITS:
        steps = divide(y, tl.load(target), tl.load(target + INVERSE), NATIVE)
        y = uniform_codes(steps, tl.load(target + ZERO), TARGET_BITS)
    rows, columns = first_row + tl.arange(0, BM), FIRST + tl.arange(0, WIDTH)
    down = (sample * N + rows).to(tl.int64) * out_stride
    across = head * D + columns
    if ALIGNED:
        across = tl.max_contiguous(tl.multiple_of(across, 8), 8)
    tl.store(out + down[:, None] + across[None, :], y, (rows < N)[:, None] & (columns < D)[None, :])


@triton.jit
def attention_kernel(
    q, q_rest, k, k_rest, v, v_rest, out, trace, group, query, key, value, softmax, target,
    bias, bias_stride, N, CONTEXT, HEADS, out_stride, factor, BLOCKS,
    GROUP_STRIDE: tl.constexpr, QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    SOFTMAX_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, D: tl.constexpr, D_FIRST: tl.constexpr,
    D_REST: tl.constexpr, V_REST: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, TARGET_BITS: tl.constexpr,
    ONE_PASS: tl.constexpr, EDGE: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr, TRACE: tl.constexpr,
    NATIVE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Attend with BLOCKS times BM query rows of one head.

    q: (B H N, head_dim), k: (B H KEYS, head_dim); v: (B H head_dim, KEYS), its tokens in the order of `_permuted` if
    PERMUTED; `factor`: head_dim ** -0.5. ONE_PASS: KEYS <= BK.

    CONTEXT: its number of tokens, or None for KEYS = N. `bias`: fp32, a row of KEYS numbers per sample, or None. An
    argument of None costs nothing: the compiled kernel is that of a self-attention without a bias.

    head_dim is D_FIRST and D_REST (of v: V_REST) columns, powers of two: 72 is not padded to 128.
    """
    programs = tl.cdiv(N, BM * BLOCKS)  # of a head; neighbours share its keys
    head_row, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    sample, head = head_row // HEADS, head_row % HEADS
    time_group = tl.load(group + sample * GROUP_STRIDE).to(tl.int32)
    query += time_group * QUERY_STRIDE + head * ROW
    key += time_group * KEY_STRIDE + head * ROW
    value += time_group * VALUE_STRIDE + head * ROW
    softmax += time_group * SOFTMAX_STRIDE
    target += time_group * TARGET_STRIDE
    MAGIC_SUM: tl.constexpr = D <= 128  # 255 * 128 * 128 < 2^22
    FIRST: tl.constexpr = MAGIC_BITS if MAGIC_SUM else 0
    scale = tl.load(query) * tl.load(key) * factor * LOG2E
    zero = tl.load(query + ZERO).to(tl.int32)
    KEYS = N
    if CONTEXT is not None:
        KEYS = CONTEXT
    if bias is not None:
        bias += sample * bias_stride
    step = scale  # of scores; those with a bias are already scaled
    if bias is not None:
        step = 1.0
    first_token, first_key_token, first_channel = head_row * N, head_row * KEYS, head_row * D
    REST: tl.constexpr = V_REST if V_REST else 16

    if ONE_PASS:
        keys = k.load([first_key_token, 0])
        keys_rest = keys
        if D_REST:
            keys_rest = k_rest.load([first_key_token, D_FIRST])
        values = v.load([first_channel, 0])
        value_sum = tl.zeros((D_FIRST,), tl.int32)
        rest_sum = tl.zeros((REST,), tl.int32)
        values_rest = values
        if V_REST:
            values_rest = v_rest.load([first_channel + D_FIRST, 0])
        if MODE != SOFTMAX:
            value_sum = _row_sums(values, BK)
            if V_REST:
                rest_sum = tl.sum(values_rest.to(tl.int32), 1)
        for block in range(BLOCKS):
            first_row = (program * BLOCKS + block) * BM
            queries = q.load([first_token + first_row, 0])
            queries_rest = queries
            if D_REST:
                queries_rest = q_rest.load([first_token + first_row, D_FIRST])
            start = tl.full((BM, BK), FIRST, tl.int32)
            sums = _products(queries, queries_rest, keys, keys_rest, start, D_REST)
            sums = _shifted(sums, keys, keys_rest, zero, D_FIRST, D_REST, BM)
            centre = _centre(queries, queries_rest, query, key, bias, D, D_FIRST, D_REST, BM)
            scores = _scores(sums, 0, KEYS, centre, scale, bias, EDGE, MAGIC_SUM, BK)
            e = power_of_two((scores - tl.max(scores, 1)[:, None]) * step, NATIVE)
            if MODE == SOFTMAX_ROW:
                one, two = row_codes(e, (1 << BITS) - 1.0)
            else:
                one, two = probability_codes(e, tl.sum(e, 1), softmax_parameters(softmax), MODE, BITS, NATIVE)
            if TRACE:
                _trace(trace, one, two, softmax, head_row, first_row, 0, N, KEYS, MODE, BM, BK)
            if PERMUTED:
                one = _permuted(one, BM, BK)
                two = _permuted(two, BM, BK)
            sum_one, sum_two = _code_sums(one, two, MODE, BK)
            sums = tl.dot(one, values.trans(), out_dtype=tl.int32)
            fine = sums
            if MODE == SOFTMAX:
                fine = tl.dot(two, values.trans(), out_dtype=tl.int32)
            if V_REST:
                rest = tl.dot(one, values_rest.trans(), out_dtype=tl.int32)
                fine_rest = rest
                if MODE == SOFTMAX:
                    fine_rest = tl.dot(two, values_rest.trans(), out_dtype=tl.int32)
                _store(out, first_row, sample, head, N, out_stride, rest, fine_rest, rest_sum, sum_one, sum_two, value,
                       softmax, target, D, D_FIRST, REST, MODE, TARGET_BITS, ALIGNED, NATIVE, BM)  # fmt: skip
            _store(out, first_row, sample, head, N, out_stride, sums, fine, value_sum, sum_one, sum_two, value,
                   softmax, target, D, 0, D_FIRST, MODE, TARGET_BITS, ALIGNED, NATIVE, BM)  # fmt: skip
    else:
        first_row = program * BM
        queries = q.load([first_token + first_row, 0])
        queries_rest = queries
        if D_REST:
            queries_rest = q_rest.load([first_token + first_row, D_FIRST])
        centre = _centre(queries, queries_rest, query, key, bias, D, D_FIRST, D_REST, BM)
        top = tl.full((BM,), LOWEST, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for first_key in tl.range(0, KEYS, BK):
            scores = _tile_scores(
                queries, queries_rest, k, k_rest, first_key_token, first_key, zero, KEYS, centre, scale, bias, FIRST,
                D_FIRST, D_REST, EDGE, MAGIC_SUM, BM, BK,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(scores, 1))
            if MODE != SOFTMAX_ROW:
                e = power_of_two((scores - higher[:, None]) * step, NATIVE)
                total = total * power_of_two((top - higher) * step, NATIVE) + tl.sum(e, 1)
            top = higher

        sums = tl.zeros((BM, D_FIRST), tl.int32)
        fine = sums
        rest = tl.zeros((BM, REST), tl.int32)
        fine_rest = rest
        value_sum = tl.zeros((D_FIRST,), tl.int32)
        rest_sum = tl.zeros((REST,), tl.int32)
        sum_one = tl.zeros((BM,), tl.int32)
        sum_two = sum_one
        for first_key in tl.range(0, KEYS, BK):
            scores = _tile_scores(
                queries, queries_rest, k, k_rest, first_key_token, first_key, zero, KEYS, centre, scale, bias, FIRST,
                D_FIRST, D_REST, EDGE, MAGIC_SUM, BM, BK,
            )  # fmt: skip
            e = power_of_two((scores - top[:, None]) * step, NATIVE)
            if MODE == SOFTMAX_ROW:
                one, two = row_codes(e, (1 << BITS) - 1.0)
            else:
                one, two = probability_codes(e, total, softmax_parameters(softmax), MODE, BITS, NATIVE)
            if TRACE:
                _trace(trace, one, two, softmax, head_row, first_row, first_key, N, KEYS, MODE, BM, BK)
            if PERMUTED:
                one = _permuted(one, BM, BK)
                two = _permuted(two, BM, BK)
            more_one, more_two = _code_sums(one, two, MODE, BK)
            sum_one += more_one
            sum_two += more_two
            values = v.load([first_channel, first_key])
            sums = tl.dot(one, values.trans(), sums, out_dtype=tl.int32)
            if MODE == SOFTMAX:
                fine = tl.dot(two, values.trans(), fine, out_dtype=tl.int32)
            else:
                value_sum += _row_sums(values, BK)
            if V_REST:
                values_rest = v_rest.load([first_channel + D_FIRST, first_key])
                rest = tl.dot(one, values_rest.trans(), rest, out_dtype=tl.int32)
                if MODE == SOFTMAX:
                    fine_rest = tl.dot(two, values_rest.trans(), fine_rest, out_dtype=tl.int32)
                else:
                    rest_sum += tl.sum(values_rest.to(tl.int32), 1)
        if V_REST:
            _store(out, first_row, sample, head, N, out_stride, rest, fine_rest, rest_sum, sum_one, sum_two, value,
                   softmax, target, D, D_FIRST, REST, MODE, TARGET_BITS, ALIGNED, NATIVE, BM)  # fmt: skip
        _store(out, first_row, sample, head, N, out_stride, sums, fine, value_sum, sum_one, sum_two, value, softmax,
               target, D, 0, D_FIRST, MODE, TARGET_BITS, ALIGNED, NATIVE, BM)  # fmt: skip
