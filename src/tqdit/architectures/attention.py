"""Compute diffusers' `Attention` step by step, so that every operand and every product can be watched."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from tqdit.errors import InputError


class Computed(NamedTuple):
    """The tensors that one attention computed: B samples, H heads, N queries, M keys, d channels per head.

    `scores` are scaled, without the bias. `bias` (B, M) was added to them before the softmax, if there was a mask:
    0 for a key that counts, -10000 for one that does not.
    """

    query: torch.Tensor  # (B, H, N, d)
    key: torch.Tensor  # (B, H, M, d)
    value: torch.Tensor  # (B, H, M, d)
    probabilities: torch.Tensor  # (B, H, N, M)
    scores: torch.Tensor  # (B, H, N, M)
    attended: torch.Tensor  # (B, H, N, d)
    bias: torch.Tensor | None

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key, value and probabilities, in this order."""
        return self.query, self.key, self.value, self.probabilities

    def detached(self) -> "Computed":
        """Return the same with operands that are no part of the graph; scores and attended values still are."""
        q, k, v, p = (x.detach() for x in self.operands)
        return self._replace(query=q, key=k, value=v, probabilities=p)


class OpenAttention:
    """An attention processor of diffusers that computes softmax(Q K^T / sqrt(d) + bias) V step by step.

    It serves self-attention and cross-attention. `masked` is called with the bias before keys and values are projected,
    or with None, and `done` with everything afterwards. `coded` is given each operand by its place among
    `Computed.operands`, and returns what is computed with in its place.
    """

    def __init__(
        self,
        masked: Callable[[torch.Tensor | None], None],
        done: Callable[[Computed], None],
        coded: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, x: x,
    ) -> None:
        self.masked, self.done, self.coded = masked, done, coded

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        bias = None
        if attention_mask is not None:
            batch, tokens = context.shape[:2]
            prepared = attn.prepare_attention_mask(attention_mask, tokens, batch)  # (B heads, 1, M)
            bias = prepared.reshape(batch, attn.heads, -1, tokens)[:, 0, 0]
        q = self.coded(0, heads(attn.to_q(hidden_states)))
        self.masked(bias)
        k, v = (self.coded(i, heads(layer(context))) for i, layer in ((1, attn.to_k), (2, attn.to_v)))
        self.masked(None)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        probabilities = self.coded(3, (scores if bias is None else scores + bias[:, None, None]).softmax(-1))
        attended = probabilities @ v
        self.done(Computed(q, k, v, probabilities, scores, attended, bias))
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


@contextmanager
def opened() -> Iterator[Callable[[Any, OpenAttention], None]]:
    """Yield a function that gives an attention module another processor; at the end every one has its own again."""
    with ExitStack() as stack:

        def replace(attn: Any, processor: OpenAttention) -> None:
            stack.callback(setattr, attn, "processor", attn.processor)
            attn.processor = processor

        yield replace


def check_plain(attn: Any, name: str) -> None:
    """Raise `InputError` that names an attention which does more than `OpenAttention` computes."""
    for part in ("norm_q", "norm_k", "group_norm", "spatial_norm", "norm_cross"):
        if getattr(attn, part, None):
            raise InputError(f"attention '{name}' has {part}, which is not supported")
    if getattr(attn, "residual_connection", False) or getattr(attn, "rescale_output_factor", 1.0) != 1.0:
        raise InputError(f"attention '{name}' changes its output, which is not supported")
