"""What all blocks of a model share in a denoiser call: embeddings of timestep and class, and their adaLN modulation."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.layers.clock import PerThread


class TimestepTable(nn.Module):
    """Sinusoids of a timestep, (B,) -> (B, 256), looked up where it is a whole number: one kernel instead of ten."""

    table: torch.Tensor

    def __init__(self, projection: nn.Module, num_timesteps: int) -> None:
        """`projection`: diffusers' `Timesteps`, which computes them."""
        super().__init__()
        self.projection = projection
        self.register_buffer("table", projection(torch.arange(num_timesteps)), persistent=False)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        if timestep.is_floating_point():
            return self.projection(timestep)
        return self.table.index_select(0, timestep.long())


@dataclass
class _Call:
    """The distinct inputs of one denoiser call, the row each sample uses, and by group what was made of them."""

    timestep: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor | None
    embedded: dict[int, torch.Tensor] = field(default_factory=dict)
    modulation: dict[int, torch.Tensor] = field(default_factory=dict)


class Conditioning(nn.Module):
    """The adaLN modulation of all blocks, computed once in a denoiser call: it depends on timestep and class alone.

    Blocks with the same embedder are a group: their adaLN layers are one. On the CPU equal (t, class) rows of the
    batch, such as the null class under guidance, are computed once; `rows` says which row each sample uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedders = nn.ModuleList()
        self.linears = nn.ModuleList()
        self._now = PerThread()

    def add(self, embedder: nn.Module, linear: nn.Module) -> int:
        """A group of blocks: its embedder, and their adaLN layers stacked, C -> blocks * 6 C. Returns its number."""
        self.embedders.append(embedder)
        self.linears.append(linear)
        return len(self.linears) - 1

    @property
    def classes(self) -> int:
        """Of the class embedding, the null class among them."""
        embedder: Any = self.embedders[0]
        return int(embedder.class_embedder.embedding_table.num_embeddings)

    def set(self, timestep: torch.Tensor, labels: torch.Tensor) -> None:
        """Begin a denoiser call. timestep: (1,) or (B,), any number type; labels: (B,), on the same device."""
        timestep = timestep.expand(labels.shape)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            pairs = torch.stack([timestep.double(), labels.double()])
            distinct, rows = torch.unique(pairs, dim=1, return_inverse=True)
            call = _Call(distinct[0].to(timestep.dtype), distinct[1].to(labels.dtype), rows)
        else:
            call = _Call(timestep, labels, None)
        self._now.call = call

    def forget(self) -> None:
        """Drop what this thread has set; its next call sets it again."""
        self._now.call = None

    def embedding(self, group: int) -> torch.Tensor:
        """Embedding of timestep and class, (B, C) fp32."""
        call = self._call()
        out = self._embedded(call, group)
        return out if call.rows is None else out.index_select(0, call.rows)

    def modulation(self, group: int, place: int) -> tuple[torch.Tensor, ...]:
        """shift, scale, gate of attention, then of the feed-forward, each (B, C) fp32, of block `place` of a group."""
        call = self._call()
        if group not in call.modulation:
            call.modulation[group] = self.linears[group](F.silu(self._embedded(call, group)))
        width = 6 * self._embedded(call, group).shape[1]
        out = call.modulation[group][:, place * width : (place + 1) * width]
        out = out if call.rows is None else out.index_select(0, call.rows)
        return out.chunk(6, dim=1)

    def _call(self) -> _Call:
        call = self._now.call
        assert call is not None, "the conditioning is set by the model's forward"
        return call

    def _embedded(self, call: _Call, group: int) -> torch.Tensor:
        if group not in call.embedded:
            embedder = self.embedders[group]
            call.embedded[group] = embedder(call.timestep, call.labels, hidden_dtype=torch.float32).float()
        return call.embedded[group]
