"""The arguments of kernels: modes of operands, weights, configurations, and the layouts of codes between kernels."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.layer import ALIGN, TritonLinear
from tqdit.ops.schema import Codes, OperandParams, RowCodes
from tqdit.spec import Grid

NATIVE = not triton.knobs.runtime.interpret  # compiled for a GPU
KINDS = {  # constant of `kernels.rounding` -> grid, and whether its regions are merged
    rounding.UNIFORM.value: (Grid.UNIFORM, False),
    rounding.GELU.value: (Grid.MRQ_GELU, False),
    rounding.GELU_MERGED.value: (Grid.MRQ_GELU, True),
    rounding.SOFTMAX.value: (Grid.MRQ_SOFTMAX, False),
    rounding.SOFTMAX_MERGED.value: (Grid.MRQ_SOFTMAX, True),
    rounding.BY_ROW.value: (Grid.ROW, False),
    rounding.SOFTMAX_ROW.value: (Grid.SOFTMAX_ROW, False),
}
HEADS_OF = {3: "heads", 2: "context-heads", 1: "query-heads"}  # names in tuning of the epilogue that projects to parts
# `kernels.hopper` or `kernels.hopper_attention`; `kernels.hopper_float`; `kernels.hopper_flash`; `float_attention`
SPECIAL, FLOATS, FLASH, BF16 = 1, 2, 3, 4
ATTENTION_OPERANDS = 5  # query, key, value, softmax and target
MODES = {kind: mode for mode, kind in KINDS.items()}


def mode(operand: OperandParams) -> int:
    """Return how kernels read and write an operand: a constant of `kernels.rounding`."""
    return MODES[operand.grid, operand.merged]


def row_stride(operand: OperandParams) -> int:
    """Return the numbers between two rows of an operand's table; 0 where it has only one, for every time group."""
    return operand.table.stride(0) if operand.table.shape[0] > 1 else 0


def with_steps(codes: Codes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return codes and the steps of their rows, or None where they are on a static grid."""
    return (codes.codes, codes.scale) if isinstance(codes, RowCodes) else (codes, None)


class Weight(NamedTuple):
    """The tensors of a `TritonLinear`, and the depth and width of its codes."""

    codes: torch.Tensor
    high: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor
    sums: torch.Tensor
    depth: int
    bits: int


def weight_of(layer: TritonLinear) -> Weight:
    """Return a layer's weight; its tensors are read where they are held, since `Module.__getattr__` takes long."""
    held: Any = layer._parameters
    return Weight(held["codes"], held["high"], held["scale"], held["bias"], held["sums"], layer.shape[1], layer.bits)


class Config(NamedTuple):
    """The blocks and the schedule of one kernel."""

    block_m: int
    block_n: int
    block_k: int
    band: int = 8  # rows of tiles that run together
    warps: int = 4
    stages: int = 3  # norm: blocks of rows on their way while registers hold shift and scale; 1: neither is done
    piece: int = 0  # columns that the epilogue has in registers at a time: block_n (0), or a half or a quarter of it
    registers: int | None = None  # the most that a thread has
    # Blocks of rows that a program of the attention or norm kernel takes; Hopper's attention: AT_ONCE; FLOATS: SLOTS;
    # FLASH: groups of warps.
    blocks: int = 1
    # By a kernel for Hopper, with its own numbers of warps, registers: SPECIAL, FLOATS or FLASH. BF16: by torch's
    # attention of floats, on any GPU; the other numbers are then those of `quantize_kernel`.
    hopper: int = 0


class Projected(NamedTuple):
    """Codes of a layer's outputs as heads, in one buffer: q, k and v; or k and v; or q alone.

    q and k are (B, H, N, pitch(head_dim)), v is (B, H, head_dim, pitch(N)), its tokens in the order of `permutes`.
    """

    codes: torch.Tensor
    batch: int
    tokens: int
    head_dim: int

    def split(self, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
        """Return the parts of the buffer, each flat. Raises `RuntimeError` where it has another number of them."""
        return self.codes.split(part_sizes(parts, self.batch, self.tokens, heads, self.head_dim))


def part_sizes(parts: int, batch: int, tokens: int, heads: int, head_dim: int) -> list[int]:
    """Return the bytes of each part of projected codes: 3 for q, k and v, 2 for k and v, 1 for q."""
    by_token = batch * heads * tokens * pitch(head_dim)
    by_channel = batch * heads * head_dim * pitch(tokens)
    return [by_token, by_token, by_channel][3 - parts :] if parts > 1 else [by_token]


class Groups(NamedTuple):
    """The place where kernels read the time group of a sample."""

    tensor: torch.Tensor
    stride: int


def groups_of(*operands: OperandParams) -> Groups:
    """Return the groups of a call: all operands that have any share them."""
    for operand in operands:
        if operand.group is not None and operand.table.shape[0] > 1:
            return Groups(operand.group, 0 if operand.group.numel() == 1 else 1)
    return Groups(operands[0].table, 0)  # a tensor that is read, but multiplied by a stride of 0


def pitch(columns: int) -> int:
    """Return the bytes of a row of codes: bulk copies want multiples of 16."""
    return -(-columns // ALIGN) * ALIGN


def attended(operands: Sequence[object], width: int) -> tuple[int, torch.dtype]:
    """Return the columns and the dtype of what an attention writes: codes of its target, the fifth operand, or fp32."""
    return (pitch(width), torch.int8) if len(operands) == ATTENTION_OPERANDS else (width, torch.float32)


@functools.cache
def powers_of_two(width: int, least: int) -> tuple[int, int]:
    """Return two powers of two that together hold `width`; the second is 0 if the first, at least `least`, is enough.

    The first is the largest one that fits; the second is 0 if the first holds all.
    """
    whole = triton.next_power_of_2(width)
    if whole in (width, least) or whole < least:
        return max(whole, least), 0
    return whole // 2, triton.next_power_of_2(width - whole // 2)


def permutes(tokens: int) -> bool:
    """Say whether rows of v have their tokens in the order in which attention has its probabilities."""
    return tokens % 16 == 0
