"""The pieces that integer blocks are made of: attention, feed-forward, and a base class with places for adapters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tqdit.layers.adapters import Adapted, Slots
from tqdit.layers.call import Call
from tqdit.layers.linear import IntLinear
from tqdit.layers.params import ActivationParams
from tqdit.ops.holders import FixedDtype
from tqdit.ops.modules import Closed, Untrainable, offloaded, present
from tqdit.ops.schema import Activation, AttentionParams, Backend, Norm, OperandParams, Residual

ATTENTION_OPERANDS = ("query", "key", "value", "softmax")
ADAPTED = Adapted()


class IntBlock(Closed, Untrainable):
    """The base of a transformer block on integer codes: (B, N, C) and a `Call` -> (B, N, C).

    The residual stream is fp32, fp16 or bf16, as it comes in: the latter two round it after each addition. LayerNorm,
    softmax and GELU are fp32. A subclass has `run`, which calls the steps below: each is a few verbs of the backend.
    Codes have one name in a step, so that nothing keeps those that have been read: a CUDA graph has memory for them.
    """

    def __init__(
        self,
        linears: Mapping[str, IntLinear],
        operands: Mapping[str, ActivationParams],
        heads: int,
        backend: Backend,
    ) -> None:
        """Hold the layers and operands of a block.

        `linears`: layers by name, such as "qkv", which become attributes. `operands`: of attention, by name.
        """
        super().__init__()
        self.heads = heads
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.operands: Any = nn.ModuleDict(dict(operands))
        self.backend = backend
        self._parts = [module for module in self.modules() if isinstance(module, FixedDtype)]  # those that a call reads
        self.slots: Slots | None = None

    def run(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        """Compute the block of hidden states (B, N, C)."""
        raise NotImplementedError

    def add_slots(
        self, names: Mapping[str, Sequence[str]], shapes: Mapping[str, torch.Size], closed: Sequence[str] = ()
    ) -> None:
        """Make places for adapters in the block; see `Slots`."""
        self.slots = Slots(self, names, shapes, closed)

    @property
    def adapted(self) -> bool:
        """Say whether the block has adapters; it then runs as the reference does."""
        return self.slots is not None and self.slots.used

    @property
    def offloaded(self) -> bool:
        """Say whether accelerate has sent tensors of this block away; it brings them back when the block runs."""
        return any(map(offloaded, self._parts))

    def forward(self, hidden_states: torch.Tensor, call: Call) -> torch.Tensor:
        """Compute the block. Tensors that accelerate has sent away are brought to their device first."""
        if torch.compiler.is_compiling() or not self.offloaded:
            return self.run(hidden_states, call)
        with present(self._parts):
            return self.run(hidden_states, call)

    @property
    def verbs(self) -> Backend:
        """Return the backend, or the reference with adapters where the block has some."""
        return ADAPTED if self.adapted else self.backend

    def source(self, name: str, call: Call | None) -> OperandParams:
        """Return the operand that a layer reads."""
        return getattr(self, name).source.operand(call)

    def layer(self, name: str) -> Any:
        """Return a layer in the form that the block's verbs take: with its adapters, where the block has some."""
        layer = getattr(self, name).layer
        if not self.adapted:
            return layer
        assert self.slots is not None
        return self.slots.adapted(name, layer)

    def attention(self, prefix: str, call: Call) -> AttentionParams:
        """Return the operands of an attention whose names begin with `prefix`."""
        query, key, value, softmax = (self.operands[prefix + name].operand(call) for name in ATTENTION_OPERANDS)
        return AttentionParams(query, key, value, softmax, self.heads)

    def self_attention(self, x: torch.Tensor, norm: Norm, gate: torch.Tensor, call: Call) -> torch.Tensor:
        """Return x + gate out(attention(qkv(norm(x)))).

        The layers are "qkv" (three stacked) and "out".
        """
        verbs, attention = self.verbs, self.attention("", call)
        source, target = self.source("qkv", call), self.source("out", call)
        codes = verbs.quantize(x, source, norm)
        codes = verbs.project(codes, source, self.layer("qkv"), attention.projections, self.heads)
        codes = verbs.attend(codes, attention, target)
        return verbs.linear(codes, target, self.layer("out"), Residual(x, gate))

    def cross_attention(self, x: torch.Tensor, context: Any, bias: torch.Tensor | None, call: Call) -> torch.Tensor:
        """Return x + out(attention(q(x), context)).

        The layers are "cross_q" and "cross_out"; the operands are "cross_query" and so on. `context`: the result of the
        method `context`. `bias`: fp32 (B, M), added to the scores, or None.
        """
        verbs, attention = self.verbs, self.attention("cross_", call)
        source, target = self.source("cross_q", call), self.source("cross_out", call)
        codes = verbs.quantize(x, source)
        codes = verbs.project(codes, source, self.layer("cross_q"), [attention.query], self.heads)
        codes = verbs.attend(codes, attention, target, context, bias)
        return verbs.linear(codes, target, self.layer("cross_out"), Residual(x))

    def context(self, states: torch.Tensor, call: Call | None = None) -> Any:
        """Return the codes of key and value of a prompt (B, M, C), which no timestep changes.

        The layer is "cross_kv". `call` is for an architecture whose operands of a prompt have time groups.
        """
        if torch.compiler.is_compiling() or not self.offloaded:
            return self._context(states, call)
        with present(self._parts):
            return self._context(states, call)

    def _context(self, states: torch.Tensor, call: Call | None) -> Any:
        source = self.source("cross_kv", call)
        targets = [self.operands[f"cross_{name}"].operand(call) for name in ("key", "value")]
        codes = self.verbs.quantize(states, source)
        return self.verbs.project(codes, source, self.layer("cross_kv"), targets, self.heads)

    def feed_forward(self, x: torch.Tensor, norm: Norm, gate: torch.Tensor, call: Call) -> torch.Tensor:
        """Return x + gate fc2(GELU(fc1(norm(x)))). The layers are "fc1" and "fc2"."""
        verbs, source, between = self.verbs, self.source("fc1", call), self.source("fc2", call)
        codes = verbs.quantize(x, source, norm)
        codes = verbs.linear(codes, source, self.layer("fc1"), Activation(between))
        return verbs.linear(codes, between, self.layer("fc2"), Residual(x, gate))
