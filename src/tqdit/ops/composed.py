"""The operations of a DiT block out of four primitive ones: what a backend must equal, and what it may fall back to."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.ops.holders import LinearCodes
from tqdit.ops.quantizer import quantize
from tqdit.ops.schema import AttentionParams, OperandParams, WeightParams


class Composed:
    """A `Backend` out of `linear`, `scores`, `values` and `float_input_linear`, which a subclass provides.

    Codes are int8: (B, N, C), and (B, N, 3 C) for q, k and v.
    """

    NAME: str
    INTEGER: bool
    TABLES = False
    GRAPHS = False

    def linear(self, codes: torch.Tensor, source: OperandParams, layer: Any) -> torch.Tensor:
        """x W^T + bias in fp32: (B, N, in) -> (B, N, out)."""
        raise NotImplementedError

    def scores(
        self, q: torch.Tensor, q_params: OperandParams, k: torch.Tensor, k_params: OperandParams, factor: float
    ) -> torch.Tensor:
        """factor * Q K^T in fp32: (B, H, N, N)."""
        raise NotImplementedError

    def values(
        self, p: torch.Tensor, p_params: OperandParams, v: torch.Tensor, v_params: OperandParams
    ) -> torch.Tensor:
        """P V in fp32: (B, H, N, head_dim)."""
        raise NotImplementedError

    def float_input_linear(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        raise NotImplementedError

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return LinearCodes(weight, bias)

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return LinearCodes(weight, bias)

    def norm_quantize(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, target: OperandParams
    ) -> torch.Tensor:
        normal = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
        return quantize(normal * (1 + scale[:, None]) + shift[:, None], target)

    def qkv(self, codes: torch.Tensor, source: OperandParams, layer: Any, params: AttentionParams) -> torch.Tensor:
        parts = _split_heads(self.linear(codes, source, layer), params.heads)
        return _join_heads([quantize(y, target) for y, target in zip(parts, params.projections, strict=True)])

    def attention(self, qkv: torch.Tensor, params: AttentionParams, target: OperandParams) -> torch.Tensor:
        q, k, v = _split_heads(qkv, params.heads)
        scores = self.scores(q, params.query, k, params.key, q.shape[-1] ** -0.5)
        p = quantize(scores.softmax(dim=-1), params.softmax)
        return quantize(self.values(p, params.softmax, v, params.value).transpose(1, 2).flatten(2), target)

    def linear_gelu(
        self, codes: torch.Tensor, source: OperandParams, layer: Any, target: OperandParams
    ) -> torch.Tensor:
        return quantize(F.gelu(self.linear(codes, source, layer), approximate="tanh"), target)

    def linear_residual(
        self, codes: torch.Tensor, source: OperandParams, layer: Any, gate: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return (x.float() + gate[:, None] * self.linear(codes, source, layer)).to(x.dtype)


def _split_heads(x: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """(B, N, 3 C) -> three of (B, H, N, head_dim)."""
    return x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _join_heads(parts: list[torch.Tensor]) -> torch.Tensor:
    """The inverse."""
    return torch.stack(parts).permute(1, 3, 0, 2, 4).flatten(2)
