"""Compose the verbs of a backend out of four primitive operations.

Another backend must equal the result, and may fall back to it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.ops.ends import Ends
from tqdit.ops.holders import LinearCodes
from tqdit.ops.quantizer import plain_codes, quantize
from tqdit.ops.schema import (
    Activation,
    AttentionParams,
    Codes,
    Float,
    Norm,
    OperandParams,
    Then,
    WeightParams,
)
from tqdit.spec import Grid

FUNCTIONS = {"gelu_tanh": partial(F.gelu, approximate="tanh")}


class Composed(Ends):
    """A `Backend` made of `product`, `scores`, `values` and `float_input_linear`, which a subclass provides.

    Codes are int8: (B, N, C), and projected ones (B, N, parts C).
    """

    NAME: str
    INTEGER: bool
    GRAPHS = False

    def product(self, codes: Codes, source: OperandParams, layer: Any) -> torch.Tensor:
        """Return x W^T + bias in fp32: (B, N, in) -> (B, N, out)."""
        raise NotImplementedError

    def scores(
        self, q: torch.Tensor, q_params: OperandParams, k: torch.Tensor, k_params: OperandParams, factor: float
    ) -> torch.Tensor:
        """Return factor * Q K^T in fp32: (B, H, N, M)."""
        raise NotImplementedError

    def values(
        self, p: torch.Tensor, p_params: OperandParams, v: torch.Tensor, v_params: OperandParams
    ) -> torch.Tensor:
        """Return P V in fp32: (B, H, N, head_dim)."""
        raise NotImplementedError

    def float_input_linear(self, x: torch.Tensor, layer: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return x W^T + bias for float x, in fp32 or rounded to `dtype`."""
        raise NotImplementedError

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return LinearCodes(weight, bias)

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return LinearCodes(weight, bias)

    def quantize(self, x: torch.Tensor, target: OperandParams, norm: Norm | None = None) -> Codes:
        if norm is None:
            return quantize(x, target)
        normal = F.layer_norm(x.float(), x.shape[-1:], eps=norm.eps)
        return quantize(normal * (1 + norm.scale[:, None]) + norm.shift[:, None], target)

    def project(
        self, codes: Codes, source: OperandParams, layer: Any, targets: Sequence[OperandParams], heads: int
    ) -> Any:
        parts = split_heads(self.product(codes, source, layer), len(targets), heads)
        return join_heads([plain_codes(y, target) for y, target in zip(parts, targets, strict=True)])

    def attend(
        self,
        projected: torch.Tensor,
        attention: AttentionParams,
        target: OperandParams,
        context: Any = None,
        bias: torch.Tensor | None = None,
    ) -> Codes:
        heads = attention.heads
        if context is None:
            q, k, v = split_heads(projected, 3, heads)
        else:
            (q,), (k, v) = split_heads(projected, 1, heads), split_heads(context, 2, heads)
        scores = self.scores(q, attention.query, k, attention.key, q.shape[-1] ** -0.5)
        if bias is not None:
            scores = scores + bias[:, None, None, :]
        p = plain_codes(probabilities(scores, attention.softmax), attention.softmax)
        return quantize(self.values(p, attention.softmax, v, attention.value).transpose(1, 2).flatten(2), target)

    def linear(self, codes: Codes, source: OperandParams, layer: Any, then: Then | None = None) -> Codes:
        y = self.product(codes, source, layer)
        if then is None:
            return y
        if isinstance(then, Float):
            return y.to(then.dtype)
        if isinstance(then, Activation):
            return quantize(FUNCTIONS[then.function](y), then.target)
        added = y if then.gate is None else then.gate[:, None] * y
        return (then.x.float() + added).to(then.x.dtype)


def probabilities(scores: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Return what the grid of the probabilities codes: exp(s - max s) on the grid of softmax rows, else the softmax."""
    if params.grid is Grid.SOFTMAX_ROW:
        return (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return scores.softmax(dim=-1)


def split_heads(x: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
    """Split (B, N, parts C) into `parts` tensors of (B, H, N, head_dim)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def join_heads(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join tensors (B, H, N, head_dim) into one (B, N, parts C): the inverse of `split_heads`."""
    return torch.stack(parts).permute(1, 3, 0, 2, 4).flatten(2)
