"""`IntAttention`: multi-head self-attention whose four projections and two matmuls run on integer codes."""

import torch
from torch import nn

from tqdit.layers.linear import IntLinear
from tqdit.layers.params import ActivationParams
from tqdit.ops.schema import Backend


class IntAttention(nn.Module):
    """Self-attention of a DiT block, (B, N, C) -> (B, N, C). Softmax is fp32; its output is coded again.

    `to_q`, `to_k`, `to_v` share one activation site (same codes), quantized once.
    """

    def __init__(
        self,
        projections: tuple[IntLinear, IntLinear, IntLinear],
        to_out: IntLinear,
        operands: dict[str, ActivationParams],
        heads: int,
        backend: Backend,
    ) -> None:
        """`operands`: parameters of "query", "key", "value" (per head) and "softmax"."""
        super().__init__()
        self.to_q, self.to_k, self.to_v = projections
        self.to_out = to_out
        self.query, self.key = operands["query"], operands["key"]
        self.value, self.softmax = operands["value"], operands["softmax"]
        self.heads = heads
        self.backend = backend

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Raises `ValueError` for cross-attention and masks, which no supported DiT has."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("IntAttention is self-attention without a mask")
        run = self.backend
        x_params = self.to_q.source.select()
        x = run.quantize(hidden_states, x_params)
        q_params, k_params, v_params = self.query.select(), self.key.select(), self.value.select()
        codes = []
        projections = ((self.to_q, q_params), (self.to_k, k_params), (self.to_v, v_params))
        for projection, params in projections:
            y = run.linear(x, x_params, projection.weight.operand(), projection.bias)
            codes.append(run.quantize(self._split_heads(y), params))
        q, k, v = codes

        factor = q.shape[-1] ** -0.5
        probabilities = run.scores(q, q_params, k, k_params, factor).softmax(dim=-1)
        p_params = self.softmax.select()
        p = run.quantize(probabilities, p_params)
        attended = run.values(p, p_params, v, v_params).transpose(1, 2).flatten(2)
        return self.to_out(attended).to(hidden_states.dtype)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, H, N, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
