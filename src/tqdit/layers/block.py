"""`IntBlock`: a DiT block in integers, seven backend calls; and the conditioning that all blocks of a model share."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.errors import InputError
from tqdit.layers.clock import thread
from tqdit.layers.linear import IntLinear
from tqdit.layers.params import ActivationParams
from tqdit.ops.schema import AttentionParams, Backend

ATTENTION_OPERANDS = ("query", "key", "value", "softmax")


class _Call(NamedTuple):
    """The distinct inputs of one denoiser call, the row each sample uses, and what embedders made of them."""

    timestep: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor | None
    embedded: dict[int, torch.Tensor]


class Conditioning(nn.Module):
    """SiLU(embedding of t and class), computed once for all blocks of a denoiser call.

    On the CPU equal (t, class) rows of the batch, such as the null class under guidance, are computed once; `rows`
    says which row each sample uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now: dict[int, _Call] = {}  # by thread: calls of one model may overlap

    def pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a transformer called as (hidden_states, timestep, class_labels, ...)."""
        given = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=False)) | kwargs
        labels = given.get("class_labels")
        if labels is None:
            raise InputError("a class-conditional model needs `class_labels`")
        batch = given["hidden_states"].shape[0]
        if labels.shape != (batch,):
            raise InputError(f"class_labels have shape {tuple(labels.shape)}, the batch needs ({batch},)")
        timestep = torch.as_tensor(given["timestep"], device=labels.device).reshape(-1).expand(batch)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            pairs = torch.stack([timestep.double(), labels.double()])
            distinct, rows = torch.unique(pairs, dim=1, return_inverse=True)
            call = _Call(distinct[0].to(timestep.dtype), distinct[1].to(labels.dtype), rows, {})
        else:
            call = _Call(timestep, labels, None, {})
        self._now[thread()] = self._now[0] = call

    def modulation(self, norm: Any) -> tuple[torch.Tensor, ...]:
        """shift, scale, gate of attention, then of the feed-forward, each (B, C) fp32, from a block's adaLN layer."""
        assert thread() in self._now, "the conditioning is set by the model's forward"
        call, embedder = self._now[thread()], norm.emb
        if id(embedder) not in call.embedded:
            embedded = embedder(call.timestep, call.labels, hidden_dtype=torch.float32)
            call.embedded[id(embedder)] = F.silu(embedded).float()
        out = norm.linear(call.embedded[id(embedder)])
        out = out if call.rows is None else out.index_select(0, call.rows)
        return out.chunk(6, dim=1)


class IntBlock(nn.Module):
    """A DiT block on integer codes, (B, N, C) -> (B, N, C); the residual stream, LayerNorm, softmax and GELU are fp32.

    `norm1` holds the block's embedder and adaLN layer, where diffusers' own forward looks for the embedder. q, k and v
    are one stacked layer. `operands`: parameters of ATTENTION_OPERANDS, all per head but the last.
    """

    def __init__(
        self,
        norm1: nn.Module,
        linears: dict[str, IntLinear],
        operands: dict[str, ActivationParams],
        heads: int,
        eps: tuple[float, float],
        backend: Backend,
        conditioning: Conditioning,
    ) -> None:
        """`linears`: "qkv", "out", "fc1", "fc2". `eps` of the two LayerNorms."""
        super().__init__()
        self.norm1 = norm1
        self.qkv, self.out, self.fc1, self.fc2 = (linears[name] for name in ("qkv", "out", "fc1", "fc2"))
        self.operands: Any = nn.ModuleDict(operands)
        self.heads = heads
        self.eps = eps
        self.backend = backend
        self._conditioning = [conditioning]  # in a list: the model owns it, a block only reads it

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Raises `ValueError` for cross-attention and masks, which no supported DiT has."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("IntBlock is self-attention without a mask")
        run = self.backend
        x = hidden_states.float()
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self._conditioning[0].modulation(self.norm1)
        query, key, value, softmax = (self.operands[name].select() for name in ATTENTION_OPERANDS)
        attention = AttentionParams(query, key, value, softmax, self.heads)
        source, layer = self.qkv.select()
        codes = run.norm_quantize(x, shift_1, scale_1, self.eps[0], source)
        codes = run.qkv(codes, source, layer, attention)
        source, layer = self.out.select()
        codes = run.attention(codes, attention, source)
        x = run.linear_residual(codes, source, layer, gate_1, x)

        source, layer = self.fc1.select()
        codes = run.norm_quantize(x, shift_2, scale_2, self.eps[1], source)
        target, second = self.fc2.select()
        codes = run.linear_gelu(codes, source, layer, target)
        return run.linear_residual(codes, target, second, gate_2, x).to(hidden_states.dtype)
