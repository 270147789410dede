"""The linear kernel for Hopper: a program stays on its multiprocessor, and its products and epilogues overlap.

One warp copies blocks of both operands into a ring of stages in shared memory. Two groups of four warps take the
program's tiles in turn: while one multiplies, the other finishes its tile. Results are those of `linear_kernel`. For
8-bit weights, one product, whole tiles of one sample each (`triton.hopper.rows_of_tile`).

Another warp copies blocks of the residual stream into a second ring. A group turns a block into that of the result
where it is, and copies write it: ordinary loads of the stream, a few registers ahead, made epilogues wait for memory.

The barriers. `full[s]`: the copies into stage s are complete (one arrival, and their bytes). `empty[s]`: the group that
read stage s has multiplied it. `turn[g]`: group g may multiply. Block number i of all that go through the ring is in
stage i % STAGES for the (i // STAGES)-th time, whose parity a wait asks for. A wait tells a round of the ring from the
next one only, so a group must not wait for a block before the other group has seen all blocks of its tile: `turn` is
needed for that too, not for speed alone.

Blocks of the residual stream, PIECES for a tile, have an `x_full` for every group and piece: `turn` orders products,
and a group may be done with one before the stream of the tile before has come. Only one group waits for such a barrier,
for its phases one by one; with at most 2 PIECES blocks in the ring, a phase is complete only after the group has given
back the block of the one before. `x_empty[s]`, as `empty`, has one warp wait for it. A block is given back when the one
LAG blocks after it is on its way out, and LAG is less than the blocks in the ring: what a group waits for is behind
blocks that it has given back, or that the other group will, which waits for earlier ones only. The streams have a warp
of their own because operands must not wait for epilogues.

Stages and rounds are computed from the numbers of tile and block, never carried from one step to the next: a name that
is assigned another's value in a loop (`last = stage`) is taken for a constant if both had one value before the loop,
for Triton finds what a loop changes by comparing values after visiting its body once.

Written in Gluon, Triton's language with explicit layouts: the main language has no such turns. Gluon is experimental;
`triton.hopper` imports this module where it is to run.
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

from tqdit.backends.triton.kernels.dependent import let_successor_start, wait_for_predecessor
from tqdit.backends.triton.kernels.linear import ACTIVATION, HEADS, PLAIN, RESIDUAL, permuted_rows, tile_of
from tqdit.backends.triton.kernels.rounding import (
    GELU_MERGED,
    INVERSE,
    MAGIC_BITS,
    ROW,
    UNIFORM,
    ZERO,
    divide,
    gelu,
    gelu_codes,
    nearest_codes,
    packed_codes,
    uniform_codes,
)

BLOCK_K = 128  # bytes of a row of a swizzled block
X_ROW = 128  # bytes of a row of a block of the residual stream: 32 columns of fp32, 64 of fp16 or bf16
COPY = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # their names in Triton 3.6
COPY_BACK = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
REGISTERS = 240, 24  # of a thread that multiplies, and of one that copies: at most 65,536 in all


def block_layout() -> gl.NVMMASharedLayout:
    """Return the layout of a block of codes in shared memory, as copies write it and products read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=BLOCK_K, element_bitwidth=8, rank=2)


def blocks_of(codes: torch.Tensor, rows: int, columns: int, stride: int, block: int) -> TensorDescriptor:
    """Describe blocks of `block` rows and BLOCK_K columns of a matrix of codes whose rows are `stride` bytes apart."""
    return TensorDescriptor(codes, [rows, columns], [stride, 1], [block, BLOCK_K], block_layout())


def x_layout(size: int) -> gl.NVMMASharedLayout:
    """Return the layout of a block of the residual stream in shared memory; `size`: bytes of its numbers."""
    return gl.NVMMASharedLayout(swizzle_byte_width=X_ROW, element_bitwidth=8 * size, rank=2)


def x_blocks_of(x: torch.Tensor, rows: int, columns: int, stride: int, block: int) -> TensorDescriptor:
    """Describe blocks of `block` rows of X_ROW bytes of a matrix whose rows are `stride` numbers apart.

    The numbers are fp32, fp16 or bf16.
    """
    size = x.element_size()
    return TensorDescriptor(x, [rows, columns], [stride, 1], [block, X_ROW // size], x_layout(size))


@gluon.jit
def _pieces(x, BM: gl.constexpr, BN: gl.constexpr, PIECE: gl.constexpr):
    """Divide columns into pieces that stay in their registers, each in the layout of a product of PIECE columns."""
    if PIECE == BN:
        return (x,)
    else:
        left, right = x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN // 2, 32])
        left = gl.convert_layout(left, layout, assert_trivial=True)
        right = gl.convert_layout(right, layout, assert_trivial=True)
        return _pieces(left, BM, BN // 2, PIECE) + _pieces(right, BM, BN // 2, PIECE)


@gluon.jit
def _produce(
    a, b, a_ring, b_ring, barriers, tiles_m, tiles_n, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy blocks of codes and weights into the ring, in the order in which they are multiplied.

    The first blocks of weights are copied while the kernel before this one still runs. That one writes no weights: it
    makes codes or multiplies them. Whatever was before it has ended.
    """
    full, empty, _ = barriers
    programs, steps = gl.num_programs(0), gl.cdiv(K, BK)
    ahead = gl.minimum(steps, STAGES)
    _, first_n = tile_of(gl.program_id(0), tiles_m, tiles_n, BAND)
    for k in range(0, ahead):
        mbarrier.expect(full.index(k), (BM + BN) * BK)
        COPY(b, [first_n * BN, k * BK], full.index(k), b_ring.index(k))
    wait_for_predecessor()
    for tile in range(gl.program_id(0), tiles_m * tiles_n, programs):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, BAND)
        first_block = tile // programs * steps
        for k in range(0, steps):
            stage = (first_block + k) % STAGES
            ready = full.index(stage)
            if first_block + k >= ahead:
                mbarrier.wait(empty.index(stage), ((first_block + k) // STAGES & 1) ^ 1)
                mbarrier.expect(ready, (BM + BN) * BK)
                COPY(b, [tile_n * BN, k * BK], ready, b_ring.index(stage))
            COPY(a, [tile_m * BM, k * BK], ready, a_ring.index(stage))
    let_successor_start()


@gluon.jit
def _produce_x(
    x, x_ring, barriers, tiles_m, tiles_n, EPILOGUE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BAND: gl.constexpr, PIECE: gl.constexpr, X_BLOCKS: gl.constexpr, X_BYTES: gl.constexpr,
):  # fmt: skip
    """Copy blocks of the residual stream into their ring, in the order in which results are added to them."""
    if EPILOGUE == RESIDUAL:
        full, empty = barriers
        PIECES: gl.constexpr = BN // PIECE
        programs = gl.num_programs(0)
        wait_for_predecessor()
        for tile in range(gl.program_id(0), tiles_m * tiles_n, programs):
            tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, BAND)
            nth = tile // programs
            for piece in range(0, PIECES):
                number = nth * PIECES + piece
                slot = number % X_BLOCKS
                mbarrier.wait(empty.index(slot), (number // X_BLOCKS & 1) ^ 1)
                ready = full.index(nth % 2 * PIECES + piece)
                mbarrier.expect(ready, BM * X_BYTES)
                COPY(x, [tile_m * BM, tile_n * BN + piece * PIECE], ready, x_ring.index(slot))


@gluon.jit
def _consume(
    a_ring, b_ring, x_ring, barriers, x_barriers, pointers, numbers,
    GROUP_STRIDE: gl.constexpr, SOURCE_STRIDE: gl.constexpr, TARGET_STRIDES: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_PITCH: gl.constexpr, TOKEN_PITCH: gl.constexpr,
    EPILOGUE: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, MODE: gl.constexpr, TARGET_BITS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, X_BLOCKS: gl.constexpr, ROWS: gl.constexpr, CHANNELS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Run one of the two groups of four warps.

    The group multiplies and finishes every second tile of the program, from its ME-th.
    """
    full, empty, turn = barriers
    x_full, x_empty = x_barriers
    weight_scale, weight_sums, bias, out, gate, group, source, row_steps, channels, first, second, third = pointers
    gate_stride, M, width, K, TOKENS, out_stride, tiles_m, tiles_n = numbers
    PIECES: gl.constexpr = BN // PIECE
    LAG: gl.constexpr = min(1, X_BLOCKS - 1)
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    # Stores: a row's columns next to each other across threads, 16 bytes each; 8 where heads break them.
    VECTOR: gl.constexpr = 16 if EPILOGUE == ACTIVATION else (8 if EPILOGUE == HEADS else 4)
    ACROSS: gl.constexpr = min(32, PIECE // VECTOR)
    stored: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    stored_rows: gl.constexpr = gl.SliceLayout(1, stored)
    stored_columns: gl.constexpr = gl.SliceLayout(0, stored)
    by_token: gl.constexpr = gl.BlockedLayout([16, 1], [BM // 16, 512 // BM], [1, 4], [0, 1])

    # The columns' scales, sums and biases wait in shared memory while the group multiplies.
    of_part: gl.constexpr = gl.SliceLayout(0, part)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [BN], flat)
    if not ROWS:
        shifts = gl.allocate_shared_memory(gl.int32, [BN], flat)
    biases = gl.allocate_shared_memory(gl.float32, [BN], flat)
    if GATED:
        gates = gl.allocate_shared_memory(gl.float32, [BN], flat)
    if CHANNELS:
        factors = gl.allocate_shared_memory(gl.float32, [BN], flat)
    if EPILOGUE == HEADS:
        target_scales = gl.allocate_shared_memory(gl.float32, [BN], flat)
        target_inverses = gl.allocate_shared_memory(gl.float32, [BN], flat)
        target_zeros = gl.allocate_shared_memory(gl.int32, [BN], flat)

    wait_for_predecessor()
    programs, steps = gl.num_programs(0), gl.cdiv(K, BK)
    for tile in range(gl.program_id(0) + ME * programs, tiles_m * tiles_n, 2 * programs):
        # The epilogue's operands are on their way before the group waits for its turn.
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, BAND)
        first_row, first_column = tile_m * BM, tile_n * BN
        sample = first_row // TOKENS
        time_group = gl.load(group + sample * GROUP_STRIDE).to(gl.int32)
        operand = source + time_group * SOURCE_STRIDE
        which = 0
        target = first + time_group * TARGET_STRIDES[0]
        if PARTS > 1:
            which = first_column // width
            if which == 1:
                target = second + time_group * TARGET_STRIDES[1]
            elif which == 2:
                target = third + time_group * TARGET_STRIDES[2]
        columns = first_column + gl.arange(0, BN, line)
        by_weight = gl.load(weight_scale + columns)
        if not ROWS:
            total = gl.load(weight_sums + columns)
        added = gl.load(bias + columns)
        if ROWS:
            steps_of_rows = gl.load(row_steps + first_row + gl.arange(0, BM, gl.SliceLayout(1, part)))
        else:
            source_scale = gl.load(operand)
            source_zero = gl.load(operand + ZERO)
        if CHANNELS:
            factor_of_channel = gl.load(channels + columns)
        corner = first_row.to(gl.int64) * out_stride + first_column
        offset = gl.arange(0, BM, stored_rows)[:, None] * out_stride + gl.arange(0, PIECE, stored_columns)[None, :]
        if GATED:
            through = gl.load(gate + sample * gate_stride + columns)
        if EPILOGUE == HEADS:
            chosen = target + (columns - which * width) // HEAD_DIM * ROW
            target_scale = gl.load(chosen)
            target_inverse = gl.load(chosen + INVERSE)
            target_zero = gl.load(chosen + ZERO)
        if EPILOGUE == ACTIVATION and MODE == UNIFORM:
            inverse = gl.load(target + INVERSE)
            zero = gl.load(target + ZERO)
        if ROWS:
            scales.store(by_weight)
        else:
            scales.store(source_scale * by_weight)
            shifts.store(source_zero.to(gl.int32) * total)
        biases.store(added)
        if CHANNELS:
            if MODE == UNIFORM:
                factors.store(factor_of_channel * inverse)
            else:
                factors.store(factor_of_channel)
        if GATED:
            gates.store(through)
        if EPILOGUE == HEADS:
            target_scales.store(target_scale)
            target_inverses.store(target_inverse)
            target_zeros.store(target_zero.to(gl.int32) - MAGIC_BITS)

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
                y = pieces[piece].to(gl.float32) * steps_of_rows[:, None] * scale
            else:
                shift = shifts.slice(piece * PIECE, PIECE).load(of_part)[None, :]
                y = (pieces[piece] - shift).to(gl.float32) * scale
            y = y + biases.slice(piece * PIECE, PIECE).load(of_part)[None, :]
            if EPILOGUE == PLAIN:
                gl.store(out + corner + piece * PIECE + offset, gl.convert_layout(y, stored))
            elif EPILOGUE == RESIDUAL:
                if GATED:
                    factor = gates.slice(piece * PIECE, PIECE).load(of_part)[None, :]
                number = nth * PIECES + piece
                block = x_ring.index(number % X_BLOCKS)
                mbarrier.wait(x_full.index(ME * PIECES + piece), nth // 2 & 1)
                if GATED:
                    block.store((block.load(part).to(gl.float32) + factor * y).to(out.dtype))
                else:
                    block.store((block.load(part).to(gl.float32) + y).to(out.dtype))
                fence_async_shared()
                COPY_BACK(out, [first_row, first_column + piece * PIECE], block)
                if piece >= LAG:
                    tma.store_wait(LAG)
                    mbarrier.arrive(x_empty.index((number - LAG) % X_BLOCKS))
            elif EPILOGUE == ACTIVATION:
                activated = gelu(y, True)
                if CHANNELS:
                    channel = factors.slice(piece * PIECE, PIECE).load(of_part)[None, :]
                if MODE == UNIFORM:
                    by = channel if CHANNELS else inverse
                    codes = nearest_codes(activated, by, zero, TARGET_BITS, True)
                else:
                    if CHANNELS:
                        activated = activated * channel
                    codes = gelu_codes(activated, target, MODE == GELU_MERGED, TARGET_BITS)
                gl.store(out + corner + piece * PIECE + offset, gl.convert_layout(codes, stored))
            else:
                by_scale = target_scales.slice(piece * PIECE, PIECE).load(of_part)[None, :]
                by_inverse = target_inverses.slice(piece * PIECE, PIECE).load(of_part)[None, :]
                zeros = target_zeros.slice(piece * PIECE, PIECE).load(of_part)[None, :]
                steps_of_y = divide(y, by_scale, by_inverse, True)
                if TARGET_BITS == 8:
                    codes = packed_codes(steps_of_y, zeros)
                else:
                    codes = uniform_codes(steps_of_y, (zeros + MAGIC_BITS).to(gl.float32), TARGET_BITS)
                first_token = first_row % TOKENS
                size = (M // TOKENS) * (width // HEAD_DIM) * TOKENS * HEAD_PITCH  # of q, and of k
                first_channel = first_column - which * width + piece * PIECE
                if PARTS > 1 and which == PARTS - 1:  # v: (B, H, head_dim, TOKEN_PITCH)
                    token = sample * (width * TOKEN_PITCH) + first_token + (PARTS - 1) * size
                    token += gl.arange(0, BM, gl.SliceLayout(1, by_token))
                    token = gl.max_contiguous(gl.multiple_of(token, 16), 16)
                    line_of = (first_channel + gl.arange(0, PIECE, gl.SliceLayout(0, by_token))) * TOKEN_PITCH
                    turned = gl.convert_layout(permuted_rows(codes, BM, PIECE), by_token)
                    gl.store(out + (token[:, None] + line_of[None, :]), turned)
                else:  # q or k: (B, H, N, HEAD_PITCH)
                    channel = first_channel + gl.arange(0, PIECE, stored_columns)
                    across = channel // HEAD_DIM * (TOKENS * HEAD_PITCH) + channel % HEAD_DIM
                    across += which * size + (sample * (width // HEAD_DIM) * TOKENS + first_token) * HEAD_PITCH
                    across = gl.max_contiguous(gl.multiple_of(across, 8), 8)
                    down = gl.arange(0, BM, stored_rows) * HEAD_PITCH
                    gl.store(out + (down[:, None] + across[None, :]), gl.convert_layout(codes, stored))
        if EPILOGUE == RESIDUAL and LAG > 0:
            tma.store_wait(0)
            mbarrier.arrive(x_empty.index((nth * PIECES + PIECES - 1) % X_BLOCKS))


@gluon.jit
def hopper_linear_kernel(
    a, b, weight_scale, weight_sums, bias, out, x, gate, gate_stride, group,
    source, row_steps, channels, target, second, third, M, width, K, TOKENS, out_stride,
    GROUP_STRIDE: gl.constexpr, SOURCE_STRIDE: gl.constexpr, TARGET_STRIDES: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_PITCH: gl.constexpr, TOKEN_PITCH: gl.constexpr,
    EPILOGUE: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, MODE: gl.constexpr, TARGET_BITS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr, X_BLOCKS: gl.constexpr, X_BYTES: gl.constexpr, ROWS: gl.constexpr, CHANNELS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Compute all (BM, BN) tiles of a (M, K) . b (N, K)^T and the epilogue; arguments are those of `linear_kernel`.

    The residual stream differs: x and out are descriptors of its blocks, X_BLOCKS of which are in shared memory, with
    rows of X_BYTES. ROWS, CHANNELS: whether `row_steps` (`steps` there) and `channels` are read.
    """
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], a.layout)
    b_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    x_ring, x_full, x_empty = a_ring, turn, turn  # where there is no such stream
    if EPILOGUE == RESIDUAL:
        x_ring = gl.allocate_shared_memory(x.dtype, [X_BLOCKS, BM, PIECE], x.layout)
        x_full = gl.allocate_shared_memory(gl.int64, [2 * (BN // PIECE), 1], mbarrier.MBarrierLayout())
        x_empty = gl.allocate_shared_memory(gl.int64, [X_BLOCKS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2 * (BN // PIECE)):
            mbarrier.init(x_full.index(i), count=1)
        for slot in gl.static_range(X_BLOCKS):
            mbarrier.init(x_empty.index(slot), count=1)
    fence_async_shared()  # copies arrive at the barriers as initialized
    barriers, x_barriers = (full, empty, turn), (x_full, x_empty)

    tiles_m = M // BM
    tiles_n = PARTS * (width // BN)
    pointers = (
        weight_scale, weight_sums, bias, out, gate, group, source, row_steps, channels, target, second, third
    )  # fmt: skip
    numbers = (gate_stride, M, width, K, TOKENS, out_stride, tiles_m, tiles_n)
    gl.warp_specialize(
        [
            (_consume, (
                a_ring, b_ring, x_ring, barriers, x_barriers, pointers, numbers, GROUP_STRIDE, SOURCE_STRIDE,
                TARGET_STRIDES, HEAD_DIM, HEAD_PITCH, TOKEN_PITCH, EPILOGUE, PARTS, GATED, MODE, TARGET_BITS, BM, BN,
                BK, BAND, STAGES, PIECE, X_BLOCKS, ROWS, CHANNELS, gl.constexpr(0))),
            (_consume, (
                a_ring, b_ring, x_ring, barriers, x_barriers, pointers, numbers, GROUP_STRIDE, SOURCE_STRIDE,
                TARGET_STRIDES, HEAD_DIM, HEAD_PITCH, TOKEN_PITCH, EPILOGUE, PARTS, GATED, MODE, TARGET_BITS, BM, BN,
                BK, BAND, STAGES, PIECE, X_BLOCKS, ROWS, CHANNELS, gl.constexpr(1))),
            (_produce, (a, b, a_ring, b_ring, barriers, tiles_m, tiles_n, K, BM, BN, BK, BAND, STAGES)),
            (_produce_x, (x, x_ring, x_barriers, tiles_m, tiles_n, EPILOGUE, BM, BN, BAND, PIECE, X_BLOCKS, X_BYTES)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
