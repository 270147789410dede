"""The linear kernel: int8 codes times int8 weights, int32 sums, and an epilogue before they leave the chip.

Operands arrive through tensor descriptors (bulk copies on Hopper), zero beyond their edges.
"""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.dependent import follow
from tqdit.backends.triton.kernels.rounding import (
    COARSE,
    GELU_MERGED,
    INVERSE,
    ROW,
    UNIFORM,
    ZERO,
    divide,
    gelu,
    gelu_codes,
    nearest_codes,
    negative_part,
    positive_part,
    stored_as,
    uniform_codes,
)

# The epilogues.
PLAIN = tl.constexpr(0)  # y, in the dtype of `out`
RESIDUAL = tl.constexpr(1)  # x + gate y, or x + y
ACTIVATION = tl.constexpr(2)  # codes of GELU(y)
HEADS = tl.constexpr(3)  # codes of y per head: q and k by token, v transposed. Parts: q, k, v; or k, v; or q


@triton.jit
def tile_of(program, tiles_m, tiles_n, BAND: tl.constexpr):
    """Return the place of a tile, in bands of BAND rows: tiles that run together share operands in the L2 cache."""
    first = program // (BAND * tiles_n) * BAND
    height = min(tiles_m - first, BAND)
    within = program % (BAND * tiles_n)
    return first + within % height, within // height


@triton.jit
def _weights(b, b_high, row, k, BK: tl.constexpr, BITS: tl.constexpr, part: tl.constexpr):
    """Return a (BK / parts, rows) operand of weight codes, as stored or out of packed ones.

    Of packed codes it is one half (4 bits) or one quarter (6 bits). These codes are in the upper bits of a byte, 16 c
    or 4 c; the sums are shifted back once, at the end.
    """
    if BITS == 4:
        packed = b.load([row, k // 2])
        return (packed << 4 if part == 0 else packed & -16).trans()
    if BITS == 6:
        low = b.load([row, k // 2 + (part % 2) * (BK // 4)])
        high = b_high.load([row, k // 4])
        nibble = (low << 2) & 60 if part < 2 else (low >> 2) & 60
        return ((high << (6 - 2 * part)) & -64 | nibble).trans()
    return b.load([row, k]).trans()


@triton.jit
def _sums(
    a, b, b_high, first_row, first_column, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, TWO: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Return int32 sums (BM, BN) of all codes, or of the positive codes and of the negative ones."""
    sums = tl.zeros((BM, BN), tl.int32)
    negative = sums
    PARTS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    STEP: tl.constexpr = BK // PARTS
    for k in tl.range(0, K, BK):
        for part in tl.static_range(PARTS):
            codes = a.load([first_row, k + part * STEP])
            weights = _weights(b, b_high, first_column, k, BK, BITS, part)
            if TWO:
                sums = tl.dot(positive_part(codes, NATIVE), weights, sums, out_dtype=tl.int32)
                negative = tl.dot(negative_part(codes, NATIVE), weights, negative, out_dtype=tl.int32)
            else:
                sums = tl.dot(codes, weights, sums, out_dtype=tl.int32)
    if BITS < 8:
        sums = sums >> (8 - BITS)
        negative = negative >> (8 - BITS)
    return sums, negative


@triton.jit
def permuted_rows(codes, BM: tl.constexpr, BN: tl.constexpr):
    """Return tokens in the order in which attention has probabilities in its registers (`attention._permuted`)."""
    return codes.reshape(BM // 16, 2, 4, 2, BN).permute(0, 2, 1, 3, 4).reshape(BM, BN)


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Return the left and the right half of the columns; they stay in their registers."""
    return x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def _finish(
    sums, negative, rows, sample, which, width, first_column, weight_scale, weight_sums, bias, out, x, gate,
    gate_stride, source, steps, channels, targets, target_row, M, TOKENS, out_stride,
    HEAD_DIM: tl.constexpr, HEAD_PITCH: tl.constexpr, TOKEN_PITCH: tl.constexpr,
    TWO: tl.constexpr, EPILOGUE: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, MODE: tl.constexpr,
    TARGET_BITS: tl.constexpr, PERMUTED: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scale the sums of BN columns and write the epilogue's result."""
    columns = first_column + tl.arange(0, BN)
    inside_n = columns < (which + 1) * width
    inside = (rows < M)[:, None] & inside_n[None, :]

    # s_x s_w (acc - z_x colsum(W)) + bias, or (acc s_row) s_w + bias, rounded in the order of ops.reference.
    by_weight = tl.load(weight_scale + columns, inside_n, 1.0)[None, :]
    added = tl.load(bias + columns, inside_n, 0.0)[None, :]
    if TWO:
        fine = negative.to(tl.float32) * tl.load(source)
        y = (sums.to(tl.float32) * tl.load(source + COARSE) + fine) * by_weight + added
    elif steps is not None:
        step = tl.load(steps + rows, rows < M, 0.0)
        y = sums.to(tl.float32) * step[:, None] * by_weight + added
    else:
        shift = tl.load(source + ZERO).to(tl.int32) * tl.load(weight_sums + columns, inside_n, 0)[None, :]
        y = (sums - shift).to(tl.float32) * (tl.load(source) * by_weight) + added

    offset = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    if EPILOGUE == PLAIN:
        tl.store(out + offset, stored_as(y, out.dtype.element_ty, NATIVE), inside)
    elif EPILOGUE == RESIDUAL:
        if GATED:
            through = tl.load(gate + sample * gate_stride + columns[None, :], inside_n[None, :], 0.0)
            total = tl.load(x + offset, inside).to(tl.float32) + through * y
        else:
            total = tl.load(x + offset, inside).to(tl.float32) + y
        tl.store(out + offset, stored_as(total, out.dtype.element_ty, NATIVE), inside)
    elif EPILOGUE == ACTIVATION:
        target = targets + target_row
        if MODE == UNIFORM:
            inverse, zero = tl.load(target + INVERSE), tl.load(target + ZERO)
            if channels is not None:
                inverse *= tl.load(channels + columns, inside_n, 1.0)[None, :]
            codes = nearest_codes(gelu(y, NATIVE), inverse, zero, TARGET_BITS, NATIVE)
        else:
            activated = gelu(y, NATIVE)
            if channels is not None:
                activated *= tl.load(channels + columns, inside_n, 1.0)[None, :]
            codes = gelu_codes(activated, target, MODE == GELU_MERGED, TARGET_BITS)
        tl.store(out + offset, codes, inside)
    else:
        channel = columns - which * width
        head = channel // HEAD_DIM
        chosen = targets + target_row + tl.where(inside_n, head, 0)[None, :] * ROW
        steps = divide(y, tl.load(chosen), tl.load(chosen + INVERSE), NATIVE)
        codes = uniform_codes(steps, tl.load(chosen + ZERO), TARGET_BITS)
        samples, tokens = rows // TOKENS, rows % TOKENS
        size = (M // TOKENS) * (width // HEAD_DIM) * TOKENS * HEAD_PITCH  # of q, and of k
        if PARTS > 1 and which == PARTS - 1:  # v: (B, H, head_dim, TOKEN_PITCH)
            down = samples * (width * TOKEN_PITCH) + tokens
            if PERMUTED:
                down = tl.max_contiguous(tl.multiple_of(down, 16), 16)
                codes = permuted_rows(codes, BM, BN)
            across = channel * TOKEN_PITCH + (PARTS - 1) * size
            tl.store(out + down[:, None] + across[None, :], codes, inside)
        else:  # q or k: (B, H, N, HEAD_PITCH)
            down = (samples * ((width // HEAD_DIM) * TOKENS) + tokens) * HEAD_PITCH
            across = head * (TOKENS * HEAD_PITCH) + channel % HEAD_DIM + which * size
            if ALIGNED:
                across = tl.max_contiguous(tl.multiple_of(across, 8), 8)
            tl.store(out + down[:, None] + across[None, :], codes, inside)


@triton.jit
def linear_kernel(
    a, b, b_high, weight_scale, weight_sums, bias, out, x, gate, gate_stride, group,
    source, steps, channels, target, second, third, M, width, K, TOKENS, out_stride,
    GROUP_STRIDE: tl.constexpr, SOURCE_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr,
    SECOND_STRIDE: tl.constexpr, THIRD_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PITCH: tl.constexpr, TOKEN_PITCH: tl.constexpr,
    BITS: tl.constexpr, TWO: tl.constexpr, EPILOGUE: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr,
    MODE: tl.constexpr, TARGET_BITS: tl.constexpr, PER_TILE: tl.constexpr, PERMUTED: tl.constexpr,
    ALIGNED: tl.constexpr, NATIVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, PIECE: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Compute one (BM, BN) tile of a (M, K) . b (N, K)^T and its epilogue, PIECE columns at a time.

    M = samples * TOKENS.

    PER_TILE: a tile's rows are of one sample. PERMUTED: v gets its tokens in the order of `permuted_rows`. ALIGNED:
    heads are whole groups of 8 columns. HEADS: N = PARTS width, and a tile has columns of one part, whose target is
    `target`, `second` or `third`; else PARTS is 1, and N is `width`, an argument so that the compiler knows what
    divides it. GATED: whether a RESIDUAL has a gate.

    `steps`: fp32 (M,), those of the rows of `a`, or None where it is on a static grid. `channels`: fp32 (N,), factors
    of channels after an ACTIVATION, or None. An argument of None costs nothing.

    EARLY: the kernel may be launched before its predecessor has ended.
    """
    follow(EARLY)
    tiles_part = tl.cdiv(width, BN)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), PARTS * tiles_part, BAND)
    which = tile_n // tiles_part
    first_row, first_column = tile_m * BM, which * width + (tile_n % tiles_part) * BN
    sums, negative = _sums(a, b, b_high, first_row, first_column, K, BM, BN, BK, BITS, TWO, NATIVE)

    rows = first_row + tl.arange(0, BM)
    if PER_TILE:
        sample = first_row // TOKENS
    else:
        sample = (tl.minimum(rows, M - 1) // TOKENS)[:, None]
    time_group = tl.load(group + sample * GROUP_STRIDE).to(tl.int32)
    source += time_group * SOURCE_STRIDE
    stride = TARGET_STRIDE
    if PARTS > 1:
        stride = tl.where(which == 0, TARGET_STRIDE, tl.where(which == 1, SECOND_STRIDE, THIRD_STRIDE))
        if which == 1:
            target = second
        elif which == 2:
            target = third

    if PIECE == BN:
        columns = (sums,)
        columns_negative = (negative,)
    else:
        columns = _halves(sums, BM, BN)
        columns_negative = _halves(negative, BM, BN)
        if PIECE == BN // 4:
            columns = _halves(columns[0], BM, BN // 2) + _halves(columns[1], BM, BN // 2)
            columns_negative = _halves(columns_negative[0], BM, BN // 2) + _halves(columns_negative[1], BM, BN // 2)
    for piece in tl.static_range(BN // PIECE):
        _finish(
            columns[piece], columns_negative[piece], rows, sample, which, width, first_column + piece * PIECE,
            weight_scale, weight_sums, bias, out, x, gate, gate_stride, source, steps, channels, target,
            time_group * stride, M, TOKENS, out_stride, HEAD_DIM, HEAD_PITCH, TOKEN_PITCH, TWO, EPILOGUE, PARTS, GATED,
            MODE, TARGET_BITS, PERMUTED, ALIGNED, NATIVE, BM, PIECE,
        )  # fmt: skip
