"""`IntBlock`: a DiT block in integers, seven backend calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tqdit.layers.adapters import Adapted, Slots
from tqdit.layers.conditioning import Conditioning
from tqdit.layers.linear import IntLinear
from tqdit.layers.params import ActivationParams
from tqdit.ops.holders import FixedDtype
from tqdit.ops.modules import Closed, Untrainable, offloaded, present
from tqdit.ops.schema import AttentionParams, Backend, OperandParams

ATTENTION_OPERANDS = ("query", "key", "value", "softmax")
ADAPTED = Adapted()


class IntBlock(Closed, Untrainable):
    """A DiT block on integer codes, (B, N, C) -> (B, N, C); LayerNorm, softmax and GELU are fp32.

    The residual stream is fp32 or bf16, as it comes in: bf16 rounds it after each of the two additions.

    q, k and v are one stacked layer. `operands`: parameters of ATTENTION_OPERANDS, all per head but the last. Its
    modulation is in `conditioning`, from `join` on.
    """

    def __init__(
        self,
        linears: dict[str, IntLinear],
        operands: dict[str, ActivationParams],
        heads: int,
        eps: tuple[float, float],
        backend: Backend,
        conditioning: Conditioning,
    ) -> None:
        """`linears`: "qkv", "out", "fc1", "fc2". `eps` of the two LayerNorms."""
        super().__init__()
        self.qkv, self.out, self.fc1, self.fc2 = (linears[name] for name in ("qkv", "out", "fc1", "fc2"))
        self.operands: Any = nn.ModuleDict(operands)
        self.heads = heads
        self.eps = eps
        self.backend = backend
        self._conditioning = [conditioning]  # in a list: the model owns it, a block only reads it
        self._place: tuple[int, int] | None = None
        self._parts = [module for module in self.modules() if isinstance(module, FixedDtype)]  # that a call reads
        self.slots: Slots | None = None

    def join(self, group: int, place: int) -> None:
        """This block is block `place` of a group of the conditioning."""
        self._place = group, place

    def add_slots(
        self, names: Mapping[str, Sequence[str]], shapes: Mapping[str, torch.Size], closed: Sequence[str] = ()
    ) -> None:
        """Make places for adapters; see `Slots`."""
        self.slots = Slots(self, names, shapes, closed)

    @property
    def adapted(self) -> bool:
        """Whether there are adapters: the block then runs as the reference does."""
        return self.slots is not None and self.slots.used

    @property
    def offloaded(self) -> bool:
        """Whether accelerate has sent tensors of this block away, to bring them when they are used."""
        return any(map(offloaded, self._parts))

    def modulation(self) -> tuple[torch.Tensor, ...]:
        """Its part of the conditioning of the call that this thread is in."""
        assert self._place is not None, "a block has to join the conditioning"
        return self._conditioning[0].modulation(*self._place)

    def forward(self, hidden_states: torch.Tensor, modulation: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        """`modulation`: the block's own, given so that blocks compiled one by one are the same for the compiler."""
        if torch.compiler.is_compiling() or not self.offloaded:
            return self._run(hidden_states, modulation)
        with present(self._parts):
            return self._run(hidden_states, modulation)

    def _run(self, hidden_states: torch.Tensor, modulation: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        adapted = self.adapted
        run = ADAPTED if adapted else self.backend
        x = hidden_states
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation() if modulation is None else modulation
        query, key, value, softmax = (self.operands[name].select(adapted) for name in ATTENTION_OPERANDS)
        attention = AttentionParams(query, key, value, softmax, self.heads)
        source, layer = self._layer("qkv", adapted)
        codes = run.norm_quantize(x, shift_1, scale_1, self.eps[0], source)
        codes = run.qkv(codes, source, layer, attention)
        source, layer = self._layer("out", adapted)
        codes = run.attention(codes, attention, source)
        x = run.linear_residual(codes, source, layer, gate_1, x)

        source, layer = self._layer("fc1", adapted)
        codes = run.norm_quantize(x, shift_2, scale_2, self.eps[1], source)
        target, second = self._layer("fc2", adapted)
        codes = run.linear_gelu(codes, source, layer, target)
        return run.linear_residual(codes, target, second, gate_2, x)

    def _layer(self, name: str, adapted: bool) -> tuple[OperandParams, Any]:
        """A layer's input parameters, and the layer as the backend takes it."""
        source, layer = getattr(self, name).select(adapted)
        if not adapted:
            return source, layer
        assert self.slots is not None
        return source, self.slots.adapted(name, layer)
