"""Attention in bf16 of codes: q, k and v are dequantized, and torch's attention does the rest.

No product is of integers here, and probabilities are not quantized. Queries, keys, values, powers and the result are
rounded to bf16 before the result is quantized, so codes are not those of `ops.reference`. It is a candidate of tuning
only where somebody asks for it, and `TritonBackend.kernel` then names the sizes that it took.
"""

import os
import threading

import torch
import triton
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqdit.backends.triton.kernels.float_heads import dequantize_heads_kernel
from tqdit.backends.triton.layouts import (
    BF16,
    NATIVE,
    Config,
    Groups,
    Projected,
    groups_of,
    permutes,
    pitch,
    row_stride,
)
from tqdit.ops.schema import OperandParams

ORDER = [  # the first of these that takes the sizes
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
TOKENS = 64 if NATIVE else 32  # of a program
CONFIG = Config(4, 256, 0, warps=4, hopper=BF16)  # of the kernel that quantizes the result
_ORDERING = threading.Lock()  # torch has one order for all threads


def offered() -> bool:
    """Say whether tuning times it.

    TQDIT_BF16_ATTENTION=1 in the environment asks for that: results then depend on what is faster.
    """
    return os.environ.get("TQDIT_BF16_ATTENTION") == "1"


def attention(
    projected: Projected, context: Projected | None, heads: int, operands: tuple[OperandParams, ...]
) -> torch.Tensor:
    """Return softmax(Q K^T) V of dequantized codes, (B, N, C) in bf16. `operands`: at least query, key and value."""
    keys = projected if context is None else context
    if context is None:
        q, k, v = projected.split(3, heads)
    else:
        (q,), (k, v) = projected.split(1, heads), context.split(2, heads)
    query, key, value = operands[:3]
    groups = groups_of(query, key, value)
    q = _dequantized(q, projected, heads, query, groups)
    k = _dequantized(k, keys, heads, key, groups)
    v = _dequantized(v, keys, heads, value, groups, by_channel=True)
    with _ORDERING, sdpa_kernel(ORDER, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def _dequantized(
    codes: torch.Tensor, of: Projected, heads: int, operand: OperandParams, groups: Groups, by_channel: bool = False
) -> torch.Tensor:
    """Return codes as values (B, H, N, head_dim), those of a token next to each other."""
    out = torch.empty(of.batch, of.tokens, heads, of.head_dim, dtype=torch.bfloat16, device=codes.device)
    dequantize_heads_kernel[(triton.cdiv(of.tokens, TOKENS), of.batch * heads)](
        codes, operand.table, groups.tensor, out, of.tokens, heads, of.head_dim, groups.stride, row_stride(operand),
        pitch(of.tokens if by_channel else of.head_dim), by_channel, by_channel and permutes(of.tokens), NATIVE,
        TOKENS, triton.next_power_of_2(of.head_dim), num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)
