"""`IntBlock`: a DiT block in integers, seven backend calls; and the conditioning that all blocks of a model share."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.layers.adapters import Adapted, Slots
from tqdit.layers.clock import thread
from tqdit.layers.linear import IntLinear
from tqdit.layers.params import ActivationParams
from tqdit.ops.schema import AttentionParams, Backend, OperandParams

ATTENTION_OPERANDS = ("query", "key", "value", "softmax")
ADAPTED = Adapted()


class _Call(NamedTuple):
    """The distinct inputs of one denoiser call, the row each sample uses, and by group what was made of them."""

    timestep: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor | None
    embedded: dict[int, torch.Tensor]
    modulation: dict[int, torch.Tensor]


class Conditioning(nn.Module):
    """The adaLN modulation of all blocks, computed once in a denoiser call: it depends on timestep and class alone.

    Blocks with the same embedder are a group: their adaLN layers are one. On the CPU equal (t, class) rows of the
    batch, such as the null class under guidance, are computed once; `rows` says which row each sample uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedders = nn.ModuleList()
        self.linears = nn.ModuleList()
        self._now: dict[int, _Call] = {}  # by thread: calls of one model may overlap

    def add(self, embedder: nn.Module, linear: nn.Module) -> int:
        """A group of blocks: its embedder, and their adaLN layers stacked, C -> blocks * 6 C. Returns its number."""
        self.embedders.append(embedder)
        self.linears.append(linear)
        return len(self.linears) - 1

    def set(self, timestep: torch.Tensor, labels: torch.Tensor) -> None:
        """Begin a denoiser call. timestep: (1,) or (B,), any number type; labels: (B,), on the same device."""
        timestep = timestep.expand(len(labels))
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            pairs = torch.stack([timestep.double(), labels.double()])
            distinct, rows = torch.unique(pairs, dim=1, return_inverse=True)
            call = _Call(distinct[0].to(timestep.dtype), distinct[1].to(labels.dtype), rows, {}, {})
        else:
            call = _Call(timestep, labels, None, {}, {})
        self._now[thread()] = self._now[0] = call

    def forget(self) -> None:
        """Drop what this thread has set; its next call sets it again."""
        self._now.pop(thread(), None)
        self._now.pop(0, None)

    def embedding(self, group: int) -> torch.Tensor:
        """Embedding of timestep and class, (B, C) fp32."""
        call = self._call()
        out = self._embedded(call, group)
        return out if call.rows is None else out.index_select(0, call.rows)

    def modulation(self, group: int, place: int) -> tuple[torch.Tensor, ...]:
        """shift, scale, gate of attention, then of the feed-forward, each (B, C) fp32, of block `place` of a group."""
        call = self._call()
        if group not in call.modulation:
            embedded = self._embedded(call, group)
            call.modulation[group] = self.linears[group](F.silu(embedded))
        width = 6 * self._embedded(call, group).shape[1]
        out = call.modulation[group][:, place * width : (place + 1) * width]
        out = out if call.rows is None else out.index_select(0, call.rows)
        return out.chunk(6, dim=1)

    def _call(self) -> _Call:
        assert thread() in self._now, "the conditioning is set by the model's forward"
        return self._now[thread()]

    def _embedded(self, call: _Call, group: int) -> torch.Tensor:
        if group not in call.embedded:
            embedder = self.embedders[group]
            call.embedded[group] = embedder(call.timestep, call.labels, hidden_dtype=torch.float32).float()
        return call.embedded[group]


class IntBlock(nn.Module):
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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        adapted = self.adapted
        run = ADAPTED if adapted else self.backend
        x = hidden_states
        assert self._place is not None, "a block has to join the conditioning"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self._conditioning[0].modulation(*self._place)
        query, key, value, softmax = (self.operands[name].select(adapted) for name in ATTENTION_OPERANDS)
        attention = AttentionParams(query, key, value, softmax, self.heads)
        source, first = self._layer("qkv", adapted)
        target, second = self._layer("out", adapted)
        codes = run.norm_quantize(x, shift_1, scale_1, self.eps[0], source, (first, second))
        codes = run.qkv(codes, source, first, attention)
        codes = run.attention(codes, attention, target)
        x = run.linear_residual(codes, target, second, gate_1, x)

        source, first = self._layer("fc1", adapted)
        target, second = self._layer("fc2", adapted)
        codes = run.norm_quantize(x, shift_2, scale_2, self.eps[1], source, (first, second))
        codes = run.linear_gelu(codes, source, first, target)
        return run.linear_residual(codes, target, second, gate_2, x)

    def _layer(self, name: str, adapted: bool) -> tuple[OperandParams, Any]:
        """A layer's input parameters, and the layer as the backend takes it."""
        source, layer = getattr(self, name).select(adapted)
        if not adapted:
            return source, layer
        assert self.slots is not None
        return source, self.slots.adapted(name, layer)
