"""Attention in bf16 of codes: q, k and v are dequantized, and torch's attention does the rest.

No product is of integers here, and probabilities are not quantized. Queries, keys, values and the result are rounded to
bf16 before the result is quantized.
"""

import torch
import triton
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqdit.backends.triton.kernels.float_heads import dequantize_heads_kernel
from tqdit.backends.triton.layouts import NATIVE, Projected, groups_of, permutes, pitch, row_stride
from tqdit.ops.schema import OperandParams

ORDER = [  # the first of these that takes the sizes
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
TOKENS = 64 if NATIVE else 32  # of a program


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
    groups = operands[:3]
    q = _dequantized(q, projected, heads, query, groups)
    k = _dequantized(k, keys, heads, key, groups)
    v = _dequantized(v, keys, heads, value, groups, by_channel=True)
    with sdpa_kernel(ORDER, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def _dequantized(
    codes: torch.Tensor, of: Projected, heads: int, operand: OperandParams, operands: tuple[OperandParams, ...],
    by_channel: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return codes as values (B, H, N, head_dim), those of a token next to each other."""
    out = torch.empty(of.batch, of.tokens, heads, of.head_dim, dtype=torch.bfloat16, device=codes.device)
    groups = groups_of(*operands)
    dequantize_heads_kernel[(triton.cdiv(of.tokens, TOKENS), of.batch * heads)](
        codes, operand.table, groups.tensor, out, of.tokens, heads, of.head_dim, groups.stride, row_stride(operand),
        pitch(of.tokens if by_channel else of.head_dim), by_channel, by_channel and permutes(of.tokens), NATIVE,
        TOKENS, triton.next_power_of_2(of.head_dim), num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)
