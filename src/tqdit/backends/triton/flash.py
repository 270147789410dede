"""Call `kernels.hopper_flash`, attention in one pass over the keys: where it runs, its sizes, its launch."""

import os
from typing import Any, NamedTuple

import torch
import triton

from tqdit.backends.triton import hopper
from tqdit.backends.triton.hopper import SHARED_MEMORY, processors
from tqdit.backends.triton.layouts import (
    Config,
    Projected,
    attended,
    groups_of,
    permutes,
    pitch,
    powers_of_two,
    row_stride,
)
from tqdit.errors import InputError
from tqdit.ops.one_pass import BLOCK
from tqdit.ops.schema import OperandParams
from tqdit.spec import Grid

MANY_KEYS = 2048  # more than fit shared memory for `kernels.hopper_attention` if head_dim is more than 32
Q_SLOTS = 2
ROWS, PARTS, WARPS = 64, 2, 4  # rows of queries and warps of a group that computes, and such groups


class FlashSizes(NamedTuple):
    """The sizes of `kernels.hopper_flash`: stages of keys and values, and two powers of two that are head_dim."""

    stages: int
    first: int
    rest: int

    @property
    def padded(self) -> tuple[int, int]:
        """Return the columns after the first of q and k, and those of v with its columns of ones."""
        return max(32, self.rest) if self.rest else 0, triton.next_power_of_2(self.rest + 8)

    @classmethod
    def fitting(cls, config: Config, keys: int, head_dim: int) -> "FlashSizes | None":
        """Return the sizes for a configuration, or None where the kernel cannot have them."""
        bm, bk, parts = ROWS, BLOCK, PARTS
        first, rest = powers_of_two(head_dim, 32)
        whole = (config.block_m, config.block_k, config.blocks) == (bm, bk, parts) and permutes(keys)
        if not whole or head_dim not in (first, first + rest) or head_dim > 128 or rest not in (0, 8, 16, 32):
            return None
        k_rest, v_pad = cls(0, first, rest).padded
        stage = bk * (2 * first + k_rest + v_pad) + 4 * (bk + 2 * (first + v_pad)) + 24
        others = Q_SLOTS * parts * (bm * (first + k_rest) + 16) + parts * bm * first + 2048
        most = (SHARED_MEMORY - 1024 - others) // stage
        stages = min(most, config.stages)
        return cls(stages, first, rest) if stages >= 2 else None


def offered(keys: int) -> bool:
    """Say whether tuning times the kernel for so many keys.

    It is the fastest in integers where a head's keys do not fit shared memory. TQDIT_ONE_PASS=1 in the environment
    offers it for any number of keys, and TQDIT_ONE_PASS=0 for none.
    """
    wanted = os.environ.get("TQDIT_ONE_PASS")
    return wanted == "1" or (wanted != "0" and keys >= MANY_KEYS)


def supports(config: Config, device: torch.device, keys: int, head_dim: int) -> bool:
    """Say whether `kernels.hopper_flash` takes heads of this size with a configuration."""
    return FlashSizes.fitting(config, keys, head_dim) is not None and processors(device) > 0


def attention(
    projected: Projected, context: Projected | None, heads: int, operands: tuple[OperandParams, ...], config: Config
) -> torch.Tensor:
    """Launch the kernel as `launch.attend` does. `InputError` where the kernel cannot run."""
    batch, tokens, head_dim = projected.batch, projected.tokens, projected.head_dim
    keys = tokens if context is None else context.tokens
    device = projected.codes.device
    query, key, value, softmax, *targets = operands
    sizes = FlashSizes.fitting(config, keys, head_dim)
    if sizes is None or not processors(device) or softmax.grid is not Grid.SOFTMAX_ROW:
        raise InputError(
            f"{config} cannot run here: attention in one pass needs a GPU of compute capability 9.0, Triton with "
            f"Gluon, softmax rows, and {keys} keys, a multiple of 16, of {head_dim} channels a head"
        )
    found = hopper.kernels()
    assert found
    flash, blocks_of = found.flash, found.scores.blocks_of
    if context is None:
        q, k, v = projected.split(3, heads)
    else:
        (q,), (k, v) = projected.split(1, heads), context.split(2, heads)
    target = targets[0] if targets else softmax  # a kernel without a target does not read it
    columns, dtype = attended(operands, heads * head_dim)
    out = torch.empty(batch, tokens, columns, dtype=dtype, device=device)
    bm, bk, sequences = ROWS, BLOCK, batch * heads
    first, (k_rest, v_pad) = sizes.first, sizes.padded

    def by_token(part: torch.Tensor, count: int, block: int, width: int) -> Any:
        shape = sequences * count, head_dim
        return blocks_of(part, shape, pitch(head_dim), (block, width)) if width else None

    def by_channel(width: int) -> Any:
        return blocks_of(v, (sequences * head_dim, keys), pitch(keys), (width, bk)) if width else None

    groups = groups_of(*operands)
    programs = processors(device)
    flash.hopper_flash_kernel[(min(programs, sequences * triton.cdiv(tokens, bm * PARTS)),)](
        by_token(q, tokens, bm, first), by_token(q, tokens, bm, k_rest), by_token(k, keys, bk, first),
        by_token(k, keys, bk, k_rest), by_channel(first), by_channel(sizes.rest), out, groups.tensor, query.table,
        key.table, value.table, target.table, sequences, heads, tokens, keys, out.stride(1), head_dim**-0.5,
        groups.stride, tuple(map(row_stride, (query, key, value, target))), head_dim, first, k_rest, sizes.rest,
        v_pad, softmax.bits, target.bits if targets else 0, sizes.stages, Q_SLOTS,
        bk, bool(config.piece), flash.REGISTERS, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
