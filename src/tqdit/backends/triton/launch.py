"""Calling the kernels: layouts, grids of programs, descriptors."""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.kernels.attention import attention_kernel
from tqdit.backends.triton.kernels.float_input import few_rows_kernel, float_input_kernel
from tqdit.backends.triton.kernels.linear import ACTIVATION, HEADS, PLAIN, RESIDUAL, linear_kernel
from tqdit.backends.triton.kernels.norm import norm_quantize_kernel
from tqdit.backends.triton.layer import ALIGN
from tqdit.errors import InputError

NATIVE = not triton.knobs.runtime.interpret  # compiled for a GPU
GLUON = (3, 6), (3, 9)  # Triton's versions that compile the kernels for Hopper
SHARED_MEMORY = 232448  # bytes of a Hopper multiprocessor, but for 1024 that each program takes of them
FEW_ROWS = 2  # of a float input: no more than these are worth multiplying without tensor cores


class Operand(NamedTuple):
    """An activation site as kernels take it. `table`: of `ops.tables`; `mode`: a constant of `kernels.rounding`."""

    table: torch.Tensor
    group: torch.Tensor | None
    mode: int
    bits: int

    @property
    def stride(self) -> int:
        return self.table.stride(0) if len(self.table) > 1 else 0


class Weight(NamedTuple):
    """The tensors of a `TritonLinear`, and its depth and width of codes."""

    codes: torch.Tensor
    high: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor
    sums: torch.Tensor
    depth: int
    bits: int


class Config(NamedTuple):
    """Blocks and schedule of one kernel."""

    block_m: int
    block_n: int
    block_k: int
    band: int = 8  # rows of tiles that run together
    warps: int = 4
    stages: int = 3
    piece: int = 0  # columns that the epilogue has in registers at a time: block_n (0), or a half or a quarter of it
    registers: int | None = None  # a thread's, at most
    blocks: int = 1  # of rows that a program of the attention or norm kernel takes; attention for Hopper: AT_ONCE
    hopper: int = 0  # 1: by `kernels.hopper` or `kernels.hopper_attention`, with their own numbers of warps, registers


class Groups(NamedTuple):
    """Where kernels read the time group of a sample."""

    tensor: torch.Tensor
    stride: int


def groups_of(*operands: Operand) -> Groups:
    """The groups of a call: all operands of one that have any share them."""
    for operand in operands:
        if operand.group is not None:
            return Groups(operand.group, 0 if operand.group.numel() == 1 else 1)
    return Groups(operands[0].table, 0)  # read, and multiplied by a stride of 0


def takes_two_products(source: Operand) -> bool:
    return source.mode in (rounding.GELU.value, rounding.SOFTMAX.value)


def pitch(columns: int) -> int:
    """Bytes of a row of codes: bulk copies want multiples of 16."""
    return -(-columns // ALIGN) * ALIGN


def powers_of_two(width: int, least: int) -> tuple[int, int]:
    """Two powers of two, the first the largest below, that hold `width`; the second 0 if one does."""
    whole = triton.next_power_of_2(width)
    if whole in (width, least) or whole < least:
        return max(whole, least), 0
    return whole // 2, triton.next_power_of_2(width - whole // 2)


def permutes(tokens: int) -> bool:
    """Whether rows of v have their tokens in the order in which attention has its probabilities."""
    return tokens % 16 == 0


class HopperKernels(NamedTuple):
    linear: Any
    attention: Any


@functools.cache
def hopper_kernels() -> HopperKernels | None:
    """The modules of the kernels in Gluon, which changes between versions: None with a Triton that was not tried.

    TQDIT_HOPPER=0 in the environment does without them.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not GLUON[0] <= version <= GLUON[1] or os.environ.get("TQDIT_HOPPER") == "0":
        return None
    try:
        from tqdit.backends.triton.kernels import hopper, hopper_attention
    except (ImportError, AttributeError):
        return None
    return HopperKernels(hopper, hopper_attention)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU that runs the kernels for Hopper; 0 if the device does not."""
    if not NATIVE or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count if hopper_kernels() else 0


def hopper_rows(device: torch.device, tokens: int, bits: int, two: bool, head_dim: int = 8) -> int:
    """Rows of the largest tile in which `kernels.hopper` takes a product, 128 or 64; 0 if it takes none.

    `tokens`: of a sample, `bits`: of weights as stored, `two`: products. A tile is of one sample.
    """
    if bits != 8 or two or head_dim % 8 or not processors(device):
        return 0
    return next((rows for rows in (128, 64) if tokens % rows == 0), 0)


def hopper_takes(config: Config, tile: int, width: int) -> bool:
    """Whether the Hopper kernel has such tiles, and they are whole.

    `tile`: of `hopper_rows`; `width`: columns of the product, or of q alone where they are those of q, k and v.
    """
    sizes = config.block_m in (64, 128) and config.block_n in (64, 128) and config.block_k == 128
    pieces = config.piece in (0, 16, 32, 64, 128) and config.piece <= config.block_n
    pieces = pieces and config.stages >= 2  # a stage is given back when the next block is being multiplied
    return sizes and pieces and config.block_m <= tile and width % config.block_n == 0


def hopper_x_blocks(block_m: int, block_n: int, stages: int) -> int:
    """Blocks of the residual stream that fit beside the operands in shared memory, at most those of two tiles."""
    kernels = hopper_kernels()
    assert kernels
    columns = kernels.linear.X_COLUMNS
    others = stages * (block_m + block_n) * 128 + 2 * 4 * block_n * 4 + 512  # what belongs to columns; barriers
    return max(1, min((SHARED_MEMORY - others) // (block_m * columns * 4), 2 * block_n // columns))


def norm_quantize(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, target: Operand, config: Config
) -> torch.Tensor:
    batch, tokens, width = x.shape
    rows = batch * tokens
    out = torch.empty(batch, tokens, pitch(width), dtype=torch.int8, device=x.device)
    groups = groups_of(target)
    first, rest = powers_of_two(width, 16)
    of_program = config.block_m * config.blocks
    norm_quantize_kernel[(triton.cdiv(rows, of_program),)](
        x, shift, scale, shift.stride(0), eps, target.table, groups.tensor, out, rows, width, tokens, out.stride(1),
        groups.stride, target.stride, target.bits, tokens % of_program == 0, NATIVE, config.block_m, config.blocks,
        first, rest, num_warps=config.warps,
    )  # fmt: skip
    return out


def linear(
    codes: torch.Tensor, source: Operand, weight: Weight, config: Config, epilogue: int, out: torch.Tensor,
    out_stride: int, x: torch.Tensor | None = None, gate: torch.Tensor | None = None,
    targets: tuple[Operand, ...] = (), layout: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:  # fmt: skip
    """`layout`: head_dim, pitch of a token of q or k, pitch of a row of v."""
    if config.hopper:
        return _hopper_linear(codes, source, weight, config, epilogue, out, out_stride, x, gate, targets, layout)
    batch, tokens = codes.shape[:2]
    rows, columns, depth = batch * tokens, len(weight.codes), weight.depth
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    parts = {8: 1, 6: 4, 4: 2}[weight.bits]
    assert weight.bits == 8 or bk == 128
    packed_depth = {8: depth, 6: weight.codes.shape[1], 4: weight.codes.shape[1]}[weight.bits]
    packed_block = {8: bk, 6: bk // 4, 4: bk // 2}[weight.bits]
    a = TensorDescriptor(codes, [rows, depth], [codes.stride(1), 1], [bm, bk // parts])
    b = TensorDescriptor(weight.codes, [columns, packed_depth], [weight.codes.stride(0), 1], [bn, packed_block])
    high = None
    if weight.high is not None:
        high = TensorDescriptor(weight.high, list(weight.high.shape), [weight.high.stride(0), 1], [bn, bk // 4])
    groups = groups_of(source, *targets)
    first, second, third = (targets * 3)[:3] if targets else (source,) * 3
    two = takes_two_products(source)
    divided = 3 if epilogue == HEADS.value else 1
    programs = triton.cdiv(rows, bm) * divided * triton.cdiv(columns // divided, bn)
    head_dim, head_pitch, token_pitch = layout
    linear_kernel[(programs,)](
        a, b, high, weight.scale, weight.sums, weight.bias, out, out if x is None else x,
        weight.scale if gate is None else gate, 0 if gate is None else gate.stride(0), groups.tensor,
        source.table, first.table, second.table, third.table, rows, columns // divided, depth, tokens, out_stride,
        groups.stride, source.stride, first.stride, second.stride, third.stride, head_dim, head_pitch, token_pitch,
        weight.bits, two, epilogue, first.mode, first.bits, tokens % bm == 0, permutes(tokens),
        head_dim % 8 == 0, NATIVE, bm, bn, bk, config.band, config.piece or bn,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        enable_fp_fusion=epilogue == ACTIVATION.value,
    )  # fmt: skip
    return out


def _hopper_linear(
    codes: torch.Tensor, source: Operand, weight: Weight, config: Config, epilogue: int, out: torch.Tensor,
    out_stride: int, x: torch.Tensor | None, gate: torch.Tensor | None, targets: tuple[Operand, ...],
    layout: tuple[int, int, int],
) -> torch.Tensor:  # fmt: skip
    """As `linear`. `InputError` where the kernel cannot run."""
    batch, tokens = codes.shape[:2]
    rows, columns, depth = batch * tokens, len(weight.codes), weight.depth
    head_dim, head_pitch, token_pitch = layout
    width = columns // 3 if epilogue == HEADS.value else columns
    divides = head_dim if epilogue == HEADS.value else 8
    tile = hopper_rows(codes.device, tokens, weight.bits, takes_two_products(source), divides)
    if not hopper_takes(config, tile, width):
        raise InputError(
            f"{config} cannot run here: the Hopper kernel needs a GPU of compute capability 9.0, Triton with Gluon, "
            f"8-bit weights, one product, tiles of 64 or 128 rows and columns, and {tokens} tokens, {width} columns "
            "that are multiples of them"
        )
    kernels = hopper_kernels()
    assert kernels
    hopper = kernels.linear
    bm, bn, piece = config.block_m, config.block_n, config.piece or config.block_n
    before: Any = out
    after: Any = out
    if x is not None:
        x = x if x.data_ptr() % 16 == 0 else x.clone()  # as bulk copies want it
        before, after = (hopper.x_blocks_of(part, rows, width, out_stride, bm) for part in (x, out))
        piece = hopper.X_COLUMNS
    groups = groups_of(source, *targets)
    first, second, third = (targets * 3)[:3] if targets else (source,) * 3
    tiles = rows // bm * (columns // bn)
    hopper.hopper_linear_kernel[(min(tiles, processors(codes.device)),)](
        hopper.blocks_of(codes, rows, depth, codes.stride(1), bm),
        hopper.blocks_of(weight.codes, columns, depth, weight.codes.stride(0), bn),
        weight.scale, weight.sums, weight.bias, after, before,
        weight.scale if gate is None else gate, 0 if gate is None else gate.stride(0), groups.tensor,
        source.table, first.table, second.table, third.table, rows, width, depth, tokens, out_stride,
        groups.stride, source.stride, (first.stride, second.stride, third.stride), head_dim, head_pitch, token_pitch,
        epilogue, first.mode, first.bits, bm, bn, config.block_k, config.band, config.stages, piece,
        hopper_x_blocks(bm, bn, config.stages), *hopper.REGISTERS,
        num_warps=4, enable_fp_fusion=epilogue == ACTIVATION.value,
    )  # fmt: skip
    return out


def plain(codes: torch.Tensor, source: Operand, weight: Weight, config: Config) -> torch.Tensor:
    """fp32 (B, N, out)."""
    out = torch.empty(*codes.shape[:2], len(weight.codes), device=codes.device)
    return linear(codes, source, weight, config, PLAIN.value, out, out.stride(1))


def residual(
    codes: torch.Tensor, source: Operand, weight: Weight, config: Config, gate: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    out = torch.empty_like(x)
    return linear(codes, source, weight, config, RESIDUAL.value, out, out.stride(1), x, gate)


def activation(codes: torch.Tensor, source: Operand, weight: Weight, config: Config, target: Operand) -> torch.Tensor:
    out = torch.empty(*codes.shape[:2], pitch(len(weight.codes)), dtype=torch.int8, device=codes.device)
    return linear(codes, source, weight, config, ACTIVATION.value, out, out.stride(1), targets=(target,))


def heads(
    codes: torch.Tensor, source: Operand, weight: Weight, config: Config, targets: tuple[Operand, ...], head_dim: int
) -> torch.Tensor:
    """A flat buffer: q and k (B, H, N, head_pitch), then v (B, H, head_dim, token_pitch)."""
    batch, tokens = codes.shape[:2]
    width = len(weight.codes) // 3
    layout = head_dim, pitch(head_dim), pitch(tokens)
    size = heads_size(batch, tokens, width // head_dim, head_dim)
    if size >= 2**31:
        raise InputError(
            f"a batch of {batch} samples of {tokens} tokens is too large: q, k and v exceed 2 GiB of codes"
        )
    out = torch.empty(size, dtype=torch.int8, device=codes.device)
    return linear(codes, source, weight, config, HEADS.value, out, 0, targets=targets, layout=layout)


def heads_size(batch: int, tokens: int, count: int, head_dim: int) -> int:
    return batch * count * (2 * tokens * pitch(head_dim) + head_dim * pitch(tokens))


def attention(
    qkv: torch.Tensor, batch: int, tokens: int, count: int, head_dim: int, operands: tuple[Operand, ...],
    config: Config, trace: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`operands`: query, key, value, softmax, target."""
    if config.hopper:
        return _hopper_attention(qkv, batch, tokens, count, head_dim, operands, config, trace)
    query, key, value, softmax, target = operands
    out = torch.empty(batch, tokens, pitch(count * head_dim), dtype=torch.int8, device=qkv.device)
    bm, bk = config.block_m, config.block_k
    first, rest = powers_of_two(head_dim, 32)
    d_rest, v_rest = (max(32, rest), max(16, rest)) if rest else (0, 0)
    rows, head_pitch, token_pitch = batch * count * tokens, pitch(head_dim), pitch(tokens)
    q, k, v = qkv.split([rows * head_pitch, rows * head_pitch, batch * count * head_dim * token_pitch])

    def by_token(part: torch.Tensor, block: int, width: int) -> TensorDescriptor | None:
        return TensorDescriptor(part, [rows, head_dim], [head_pitch, 1], [block, width]) if width else None

    def by_channel(width: int) -> TensorDescriptor | None:
        shape = [batch * count * head_dim, tokens]
        return TensorDescriptor(v, shape, [token_pitch, 1], [width, bk]) if width else None

    groups = groups_of(*operands)
    one_pass = tokens <= bk
    blocks = min(config.blocks, triton.cdiv(tokens, bm)) if one_pass else 1
    attention_kernel[(triton.cdiv(tokens, bm * blocks) * batch * count,)](
        by_token(q, bm, first), by_token(q, bm, d_rest), by_token(k, bk, first), by_token(k, bk, d_rest),
        by_channel(first), by_channel(v_rest), out, out if trace is None else trace, groups.tensor,
        query.table, key.table, value.table, softmax.table, target.table, tokens, count, out.stride(1), head_dim**-0.5,
        blocks,
        groups.stride, query.stride, key.stride, value.stride, softmax.stride, target.stride,
        head_dim, first, d_rest, v_rest, softmax.mode, softmax.bits, target.bits,
        one_pass, tokens % bk != 0, head_dim % 8 == 0, permutes(tokens), trace is not None, NATIVE, bm, bk,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    return out


def hopper_attends(config: Config, device: torch.device, tokens: int, head_dim: int) -> bool:
    """Whether `kernels.hopper_attention` takes such sequences with a configuration: slots and tiles are whole."""
    return _HopperAttention.of(config, tokens, head_dim) is not None and processors(device) > 0


class _HopperAttention(NamedTuple):
    """Sizes of `kernels.hopper_attention`. A head's keys and values fill `blocks` slots of a ring of `slots`."""

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
        """Columns after the first of q and k, of v with those of ones."""
        return max(32, self.rest) if self.rest else 0, triton.next_power_of_2(self.rest + 8)

    @classmethod
    def of(cls, config: Config, tokens: int, head_dim: int) -> "_HopperAttention | None":
        """None where the kernel cannot have these sizes."""
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


def _hopper_attention(
    qkv: torch.Tensor, batch: int, tokens: int, count: int, head_dim: int, operands: tuple[Operand, ...],
    config: Config, trace: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `attention`. `InputError` where the kernel cannot run."""
    sizes = _HopperAttention.of(config, tokens, head_dim)
    if sizes is None or not processors(qkv.device):
        raise InputError(
            f"{config} cannot run here: the Hopper kernel needs a GPU of compute capability 9.0, Triton with Gluon, "
            f"and {tokens} tokens of {head_dim} channels a head that fill its tiles and its shared memory"
        )
    kernels = hopper_kernels()
    assert kernels
    hopper = kernels.attention
    query, key, value, softmax, target = operands
    out = torch.empty(batch, tokens, pitch(count * head_dim), dtype=torch.int8, device=qkv.device)
    bm, bk = config.block_m, config.block_k
    first, (k_rest, v_pad) = sizes.first, sizes.padded
    rows, head_pitch, token_pitch = batch * count * tokens, pitch(head_dim), pitch(tokens)
    q, k, v = qkv.split([rows * head_pitch, rows * head_pitch, batch * count * head_dim * token_pitch])

    def by_token(part: torch.Tensor, block: int, width: int) -> Any:
        return hopper.blocks_of(part, (rows, head_dim), head_pitch, (block, width)) if width else None

    def by_channel(width: int) -> Any:
        return hopper.blocks_of(v, (batch * count * head_dim, tokens), token_pitch, (width, bk)) if width else None

    groups = groups_of(*operands)
    programs = min(processors(qkv.device) * sizes.programs, batch * count * sizes.parts)
    hopper.hopper_attention_kernel[(programs,)](
        by_token(q, bm, first), by_token(q, bm, k_rest), by_token(k, bk, first), by_token(k, bk, k_rest),
        by_channel(first), by_channel(sizes.rest), out, out if trace is None else trace, groups.tensor,
        query.table, key.table, value.table, softmax.table, target.table, batch * count, count, out.stride(1),
        head_dim**-0.5,
        groups.stride, (query.stride, key.stride, value.stride, softmax.stride, target.stride),
        tokens, sizes.parts, head_dim, first, k_rest, sizes.rest, v_pad, softmax.mode, softmax.bits, target.bits,
        sizes.slots, sizes.q_slots, bk, config.blocks, trace is not None, sizes.warps, hopper.COPY_REGISTERS,
        num_warps=sizes.warps, maxnreg=128 if sizes.programs == 2 else None, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def float_input(x: torch.Tensor, weight: Weight, config: Config) -> torch.Tensor:
    """x (M, K) fp32 -> (M, N). `block_m` of 0: without tensor cores, for up to FEW_ROWS rows."""
    m, n = len(x), len(weight.codes)
    assert x.stride(1) == 1
    out = torch.empty(m, n, device=x.device)
    high = weight.codes if weight.high is None else weight.high
    if config.block_m == 0:
        few_rows_kernel[(triton.cdiv(n, config.block_n),)](
            x, weight.codes, high, weight.scale, weight.bias, out, m, n, weight.depth, x.stride(0),
            weight.codes.stride(0), high.stride(0), weight.bits, NATIVE, triton.next_power_of_2(m),
            config.block_n, config.block_k, num_warps=config.warps,
        )  # fmt: skip
        return out
    turned = config.block_m < min(config.block_n, 64)
    float_input_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m))](
        x, weight.codes, high, weight.scale, weight.bias, out, m, n, weight.depth, x.stride(0),
        weight.codes.stride(0), high.stride(0), weight.bits, NATIVE, turned, config.block_m, config.block_n,
        config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
