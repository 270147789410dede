"""Attention in one pass over the keys, on the grid of softmax rows: what `kernels.hopper_flash` computes.

Keys come in blocks. The codes of a block are round(L exp(s - m)), L = 2^bits - 1, where m is the highest score of the
row in this block and those before. Where m has grown, the sums so far are multiplied by exp(m before - m). After the
last block the sums of codes times values are divided by the sum of the codes.

So a code is rounded by at most half a step, as in `ops.reference`, and that step then shrinks with the sums: the error
of a key counts exp(m - last m) / 2 of a step of the reference's grid at most, never more than 1/2. Where the highest
score of a row is in its first block, codes and sums are those of the reference.
"""

import torch

from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import parameters

BLOCK = 128  # keys of a block of `kernels.hopper_flash`


def attend(
    scores: torch.Tensor, softmax: OperandParams, v: torch.Tensor, value: OperandParams, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P V of scores (B, H, N, M) and codes v (B, H, M, head_dim), and a bound of its error, both fp64.

    The bound is that of the distance from softmax(scores) V, (B, H, N, head_dim): what rounding the codes can do.
    """
    of_v = parameters(value, v.ndim)
    values = (v.double() - of_v.zero_point) * of_v.scale
    scores = scores.double()
    levels = float(2**softmax.bits - 1)
    highest = torch.full_like(scores[..., :1], -torch.inf)
    sums, total = torch.zeros(*scores.shape[:3], v.shape[-1], dtype=torch.float64), torch.zeros_like(highest)
    sums, step = sums.to(v.device), torch.zeros_like(scores)
    for first in range(0, scores.shape[-1], block):
        part = slice(first, first + block)
        higher = torch.maximum(highest, scores[..., part].amax(-1, keepdim=True))
        shrink = (highest - higher).exp()
        codes = (levels * (scores[..., part] - higher).exp()).round()
        sums = sums * shrink + codes @ values[..., part, :]
        total = total * shrink + codes.sum(-1, keepdim=True)
        step[..., :first] *= shrink
        step[..., part] = 0.5
        highest = higher
    found = sums / total
    return found, (step @ values.abs() + found.abs() * step.sum(-1, keepdim=True)) / _real_total(scores, levels)


def _real_total(scores: torch.Tensor, levels: float) -> torch.Tensor:
    """Return the sum of codes that are not rounded, (B, H, N, 1)."""
    return levels * (scores - scores.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
