"""Call the kernels for Hopper, which are in Gluon: where they run, their operands, sizes and descriptors."""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton

from tqdit.backends.triton.kernels.linear import ACTIVATION, HEADS
from tqdit.backends.triton.layouts import (
    NATIVE,
    Config,
    Projected,
    Weight,
    attended,
    groups_of,
    mode,
    pitch,
    powers_of_two,
    row_stride,
    with_steps,
)
from tqdit.backends.triton.relaunch import PLANS, Blocks, Plan, check_device, launch_options
from tqdit.errors import InputError
from tqdit.ops.schema import Codes, OperandParams

GLUON = (3, 6), (3, 9)  # Triton's versions that were tried with the kernels for Hopper
LINE = 128  # bytes of a row of a block in shared memory
MOST_STAGES = 12
SHARED_MEMORY = 232448  # bytes of a Hopper multiprocessor, without the 1024 that each program takes


class Kernels(NamedTuple):
    """The modules of the kernels in Gluon."""

    linear: Any
    attention: Any
    floats: Any
    flash: Any
    scores: Any


@functools.cache
def kernels() -> Kernels | None:
    """Return the modules of the kernels in Gluon, or None with a version of Triton that was not tried.

    Gluon changes between versions. TQDIT_HOPPER=0 in the environment does without them.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in GLUON or os.environ.get("TQDIT_HOPPER") == "0":
        return None
    try:
        from tqdit.backends.triton.kernels import hopper, hopper_attention, hopper_flash, hopper_float, hopper_scores
    except (ImportError, AttributeError):
        return None
    return Kernels(hopper, hopper_attention, hopper_float, hopper_flash, hopper_scores)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU that runs the kernels for Hopper; 0 if the device does not run them."""
    if not NATIVE or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count if kernels() else 0


def rows_of_tile(device: torch.device, tokens: int, bits: int, two: bool, head_dim: int = 8) -> int:
    """Return the rows of the largest tile in which `kernels.hopper` takes a product: 128, 64, or 0 if it takes none.

    `tokens`: of a sample, `bits`: of weights as stored, `two`: products. A tile is of one sample.
    """
    if bits != 8 or two or head_dim % 8 or not processors(device):
        return 0
    return next((rows for rows in (128, 64) if tokens % rows == 0), 0)


def supports_product(config: Config, tile: int, width: int) -> bool:
    """Say whether the Hopper kernel has tiles of this configuration, and whether they are whole.

    `tile`: of `rows_of_tile`; `width`: columns of the product, or of one part where they are those of heads.
    """
    sizes = config.block_m in (64, 128) and config.block_n in (64, 128) and config.block_k == 128
    pieces = config.piece in (0, 16, 32, 64, 128) and config.piece <= config.block_n
    pieces = pieces and config.stages >= 2  # a stage is given back when the next block is being multiplied
    return sizes and pieces and config.block_m <= tile and width % config.block_n == 0


def x_blocks(block_m: int, block_n: int, stages: int, columns: int) -> int:
    """Return how many blocks of the residual stream fit beside the operands in shared memory.

    They are at most those of two tiles. `columns`: of a block.
    """
    found = kernels()
    assert found
    others = stages * (block_m + block_n) * 128 + 2 * 4 * block_n * 4 + 512  # constants of columns; barriers
    return max(1, min((SHARED_MEMORY - others) // (block_m * found.linear.X_ROW), 2 * block_n // columns))


def linear(
    given: Codes, source: OperandParams, weight: Weight, config: Config, epilogue: int, out: torch.Tensor,
    out_stride: int, x: torch.Tensor | None, gate: torch.Tensor | None, targets: tuple[OperandParams, ...],
    layout: tuple[int, int, int],
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel as `launch.linear` does. Raises `InputError` where the kernel cannot run."""
    codes, steps = with_steps(given)
    batch, tokens = codes.shape[:2]
    rows, columns, depth = batch * tokens, len(weight.codes), weight.depth
    head_dim, head_pitch, token_pitch = layout
    parts = len(targets) if epilogue == HEADS.value else 1
    width = columns // parts
    divides = head_dim if epilogue == HEADS.value else 8
    tile = rows_of_tile(codes.device, tokens, weight.bits, source.two_products, divides)
    if not supports_product(config, tile, width):
        raise InputError(
            f"{config} cannot run here: the Hopper kernel needs a GPU of compute capability 9.0, Triton with Gluon, "
            f"8-bit weights, one product, tiles of 64 or 128 rows and columns, and {tokens} tokens, {width} columns "
            "that are multiples of them"
        )
    found = kernels()
    assert found
    hopper = found.linear
    bm, bn, piece = config.block_m, config.block_n, config.piece or config.block_n
    before: Any = out
    after: Any = out
    if x is not None:
        x = x if x.data_ptr() % 16 == 0 else x.clone()  # bulk copies need this alignment
        before, after = (hopper.x_blocks_of(part, rows, width, out_stride, bm) for part in (x, out))
        piece = hopper.X_ROW // x.element_size()
    groups = groups_of(source, *targets)
    first, second, third = (targets * 3)[:3] if targets else (source,) * 3
    channels = first.channels if epilogue == ACTIVATION.value else None
    tiles = rows // bm * (columns // bn)
    hopper.hopper_linear_kernel[(min(tiles, processors(codes.device)),)](
        hopper.blocks_of(codes, rows, depth, codes.stride(1), bm),
        hopper.blocks_of(weight.codes, columns, depth, weight.codes.stride(0), bn),
        weight.scale, weight.sums, weight.bias, after, before,
        weight.scale if gate is None else gate, 0 if gate is None else gate.stride(0), groups.tensor,
        source.table, weight.scale if steps is None else steps, weight.scale if channels is None else channels,
        first.table, second.table, third.table, rows, width, depth, tokens, out_stride,
        groups.stride, row_stride(source), tuple(map(row_stride, (first, second, third))), head_dim, head_pitch,
        token_pitch, epilogue, parts, gate is not None, mode(first), first.bits, bm, bn, config.block_k, config.band,
        config.stages, piece,
        x_blocks(bm, bn, config.stages, piece), hopper.X_ROW, steps is not None, channels is not None,
        *hopper.REGISTERS,
        num_warps=4, enable_fp_fusion=epilogue == ACTIVATION.value, **launch_options(codes.get_device(), rows),
    )  # fmt: skip
    return out


def takes_floats(device: torch.device, columns: int, bits: int, two: bool, dtype: torch.dtype) -> bool:
    """Say whether `kernels.hopper_float` takes a product of any rows; rows of the result are multiples of 16 bytes."""
    return bits == 8 and not two and columns * dtype.itemsize % 16 == 0 and processors(device) > 0


def float_stages(bm: int, bn: int, by_row: bool) -> int:
    """Return the stages of `kernels.hopper_float` that fit beside a block of results of each group."""
    others = 2 * bm * LINE + 2 * bn * (2 if by_row else 3) * 4 + 512  # constants of columns; barriers
    return min((SHARED_MEMORY - others) // ((bm + bn) * LINE), MOST_STAGES)


def float_linear(
    given: Codes, source: OperandParams, weight: Weight, config: Config, dtype: torch.dtype
) -> torch.Tensor:
    """Launch the kernel as `launch.plain` does, in as few steps of Python as there can be."""
    codes, steps = with_steps(given)
    codes = codes.contiguous()
    groups, table, scale = groups_of(source), source.table, weight.scale
    check_device(codes, weight.codes, table)
    (batch, tokens, pitched), (columns, stride) = codes.shape, (weight.codes.shape[0], weight.codes.stride(0))
    rows, depth = batch * tokens, weight.depth
    y = torch.empty((batch, tokens, columns), dtype=dtype, device=codes.device)
    plan = _float_plan(
        codes.device, dtype, rows, columns, depth, tokens, groups.stride, row_stride(source), steps is not None, config
    )
    blocks: tuple[Any, ...]
    if plan.launched:
        blocks = (
            Blocks(codes, [rows, depth], [pitched, 1]),
            Blocks(weight.codes, [columns, depth], [stride, 1]),
            Blocks(y, [rows, columns], [columns, 1]),
        )
    else:
        found = kernels()
        assert found
        blocks = (
            found.linear.blocks_of(codes, rows, depth, pitched, config.block_m),
            found.linear.blocks_of(weight.codes, columns, depth, stride, config.block_n),
            found.floats.y_blocks_of(y, rows, columns, config.block_m),
        )
    tensors = scale, weight.sums, weight.bias, scale if steps is None else steps, groups.tensor, table
    plan.launch(tensors, blocks)
    return y


@functools.lru_cache(PLANS)
def _float_plan(
    device: torch.device, dtype: torch.dtype, rows: int, columns: int, depth: int, tokens: int, group_stride: int,
    source_stride: int, by_row: bool, config: Config,
) -> Plan:  # fmt: skip
    found = kernels()
    assert found
    bm, bn, bk = config[:3]
    tiles = triton.cdiv(rows, bm) * triton.cdiv(columns, bn)
    others = (
        rows, columns, depth, tokens, group_stride, source_stride, by_row, columns % bn == 0, bm, bn, bk, config.band,
        config.stages, LINE // dtype.itemsize, config.blocks, *found.linear.REGISTERS,
    )  # fmt: skip
    grid = min(tiles, processors(device)), 1
    options = launch_options(0 if device.index is None else device.index, rows)
    return Plan(found.floats.hopper_float_kernel, grid, others, num_warps=4, enable_fp_fusion=False, **options)


def supports_attention(config: Config, device: torch.device, tokens: int, head_dim: int) -> bool:
    """Say whether `kernels.hopper_attention` takes such sequences with a configuration: slots and tiles are whole."""
    return AttentionSizes.fitting(config, tokens, head_dim) is not None and processors(device) > 0


class AttentionSizes(NamedTuple):
    """The sizes of `kernels.hopper_attention`.

    A head's keys and values fill `blocks` slots of a ring of `slots`.
    """

    warps: int
    blocks: int
    parts: int
    slots: int
    q_slots: int
    first: int
    rest: int
    programs: int  # of a multiprocessor

    @property
    def padded(self) -> tuple[int, int]:
        """Return the columns after the first of q and k, and those of v with its columns of ones."""
        return max(32, self.rest) if self.rest else 0, triton.next_power_of_2(self.rest + 8)

    @classmethod
    def fitting(cls, config: Config, tokens: int, head_dim: int) -> "AttentionSizes | None":
        """Return the sizes for a configuration, or None where the kernel cannot have them."""
        bm, bk, rows = config.block_m, config.block_k, config.block_n or tokens
        first, rest = powers_of_two(head_dim, 32)
        whole = bm in (64, 128, 256) and bk in (64, 128) and tokens % bk == 0 and tokens % rows == 0 and rows % bm == 0
        if not whole or head_dim not in (first, first + rest) or first > 64 or rest not in (0, 8, 16, 32):
            return None
        blocks = tokens // bk
        if config.blocks not in (1, 2) or (blocks > 2 and blocks % config.blocks):
            return None
        programs = 2 if bm == 64 else 1
        found = cls(bm // 16, blocks, tokens // rows, blocks, 2 if blocks <= 2 else 1, first, rest, programs)
        k_rest, v_pad = found.padded
        head = tokens * (2 * first + k_rest + v_pad)
        others = found.q_slots * bm * (first + k_rest)
        others += 4 * tokens + bm * first + 2048  # sums of keys, codes on their way out, barriers
        heads = min((SHARED_MEMORY // programs - 1024 - others) // head, max(config.stages // blocks, 1))
        return found._replace(slots=heads * blocks) if heads > 0 else None


def attention(
    projected: Projected, heads: int, operands: tuple[OperandParams, ...], config: Config, trace: torch.Tensor | None
) -> torch.Tensor:
    """Launch the kernel as `launch.attend` does for a self-attention. `InputError` where the kernel cannot run."""
    batch, tokens, head_dim = projected.batch, projected.tokens, projected.head_dim
    device = projected.codes.device
    sizes = AttentionSizes.fitting(config, tokens, head_dim)
    if sizes is None or not processors(device):
        raise InputError(
            f"{config} cannot run here: the Hopper kernel needs a GPU of compute capability 9.0, Triton with Gluon, "
            f"and {tokens} tokens of {head_dim} channels a head that fill its tiles and its shared memory"
        )
    found = kernels()
    assert found
    hopper, blocks_of = found.attention, found.scores.blocks_of
    query, key, value, softmax, *targets = operands
    target = targets[0] if targets else softmax  # a kernel without a target does not read it
    columns, dtype = attended(operands, heads * head_dim)
    out = torch.empty(batch, tokens, columns, dtype=dtype, device=device)
    bm, bk = config.block_m, config.block_k
    first, (k_rest, v_pad) = sizes.first, sizes.padded
    rows, head_pitch, token_pitch = batch * heads * tokens, pitch(head_dim), pitch(tokens)
    q, k, v = projected.split(3, heads)

    def by_token(part: torch.Tensor, block: int, width: int) -> Any:
        return blocks_of(part, (rows, head_dim), head_pitch, (block, width)) if width else None

    def by_channel(width: int) -> Any:
        return blocks_of(v, (batch * heads * head_dim, tokens), token_pitch, (width, bk)) if width else None

    groups = groups_of(*operands)
    programs = min(processors(device) * sizes.programs, batch * heads * sizes.parts)
    hopper.hopper_attention_kernel[(programs,)](
        by_token(q, bm, first), by_token(q, bm, k_rest), by_token(k, bk, first), by_token(k, bk, k_rest),
        by_channel(first), by_channel(sizes.rest), out, out if trace is None else trace, groups.tensor,
        query.table, key.table, value.table, softmax.table, target.table, batch * heads, heads, out.stride(1),
        head_dim**-0.5,
        groups.stride, tuple(map(row_stride, (query, key, value, softmax, target))),
        tokens, sizes.parts, head_dim, first, k_rest, sizes.rest, v_pad, mode(softmax), softmax.bits,
        target.bits if targets else 0,
        sizes.slots, sizes.q_slots, bk, config.blocks, trace is not None, sizes.warps, hopper.COPY_REGISTERS,
        num_warps=sizes.warps, maxnreg=128 if sizes.programs == 2 else None, enable_fp_fusion=False,
        **launch_options(projected.codes.get_device(), batch * tokens),
    )  # fmt: skip
    return out
