"""The integer half of DiT: its blocks, and what a call of them shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tqdit.layers.block import IntBlock
from tqdit.layers.call import Call
from tqdit.ops.schema import Norm, Residual


@dataclass(frozen=True)
class DiTCall(Call):
    """A call of DiT for one block: shift, scale, gate of attention, then of the feed-forward, each (B, C) fp32."""

    modulation: Sequence[torch.Tensor]


class DiTBlock(IntBlock):
    """A DiT block in integers. q, k and v are one stacked layer."""

    heads: int
    eps: tuple[float, float]  # of the two LayerNorms

    def run(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = call.modulation
        verbs, attention = self.verbs, self.attention("", self.heads, call)
        source, target = self.source("qkv", call), self.source("out", call)
        codes = verbs.quantize(x, source, Norm(shift_1, scale_1, self.eps[0]))
        projected = verbs.project(codes, source, self.layer("qkv"), attention.projections, self.heads)
        codes = verbs.attend(projected, attention, target)
        x = verbs.linear(codes, target, self.layer("out"), Residual(x, gate_1))
        source = self.source("fc1", call)
        codes = verbs.quantize(x, source, Norm(shift_2, scale_2, self.eps[1]))
        return self.feed_forward(codes, source, x, gate_2, call)
