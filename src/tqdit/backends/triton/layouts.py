"""What kernels are given: operands, weights, configurations, and the layouts of codes between them."""

from typing import NamedTuple

import torch
import triton

from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.layer import ALIGN

NATIVE = not triton.knobs.runtime.interpret  # compiled for a GPU


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
    stages: int = 3  # norm: blocks of rows on their way, while registers hold shift and scale; 1: neither
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
