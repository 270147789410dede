"""Compute what all blocks share in a denoiser call: timestep and class embeddings, and their adaLN modulation."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, LabelEmbedding, TimestepEmbedding
from torch import nn
from torch.nn import functional as F

from tqdit.layers.linear import at_an_end
from tqdit.ops.ends import Lookup
from tqdit.ops.modules import plain

FEW = 32767  # numbers up to which an operation of torch on a CPU begins no threads


class TimestepTable(nn.Module):
    """A table of the sinusoids of whole timesteps, (B,) -> (B, 256): one kernel instead of ten."""

    table: torch.Tensor

    def __init__(self, projection: nn.Module, num_timesteps: int) -> None:
        """Compute the table with `projection`, which is diffusers' `Timesteps`."""
        super().__init__()
        self.projection = projection
        self.register_buffer("table", projection(torch.arange(num_timesteps)), persistent=False)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        if timestep.is_floating_point():
            return self.projection(timestep)
        return self.table.index_select(0, timestep.long())


@dataclass(frozen=True)
class Modulation:
    """The modulation of all blocks in one call, for the distinct inputs of the batch.

    `rows`: which of them each sample uses; None if there is one for each sample. `embedded`: (R, C) fp32 of each group
    of blocks with one embedder; `stacked`: (R, blocks 6 C) fp32 of each group. `active`: the embedded have passed the
    SiLU that everything which reads them begins with.
    """

    rows: torch.Tensor | None
    embedded: tuple[torch.Tensor, ...]
    stacked: tuple[torch.Tensor, ...]
    active: bool = False

    def activated(self) -> torch.Tensor:
        """Return SiLU of the first embedder's output, (B, C) fp32."""
        values = self._expanded(self.embedded[0])
        return values if self.active else F.silu(values)

    def block(self, group: int, place: int) -> tuple[torch.Tensor, ...]:
        """Return shift, scale, gate of attention, then of the feed-forward, each (B, C) fp32, of one block."""
        width = 6 * self.embedded[group].shape[1]
        return self._expanded(self.stacked[group][:, place * width : (place + 1) * width]).chunk(6, dim=1)

    def _expanded(self, values: torch.Tensor) -> torch.Tensor:
        """Return the row of each sample, (B, C).

        There are `rows` on a CPU only. Between two blocks threads of torch's would be in the way of a backend's own, so
        that a few rows are copied at a time.
        """
        if self.rows is None:
            return values
        few = max(1, FEW // values.shape[1])
        if len(self.rows) <= few:
            return values.index_select(0, self.rows)
        out = values.new_empty(len(self.rows), values.shape[1])
        for part, rows in zip(out.split(few), self.rows.split(few), strict=True):
            part.copy_(values.index_select(0, rows))
        return out


class Conditioning(nn.Module):
    """A module that computes the adaLN modulation of all blocks at the start of a call.

    The modulation depends on timestep and class alone. Blocks with the same embedder are a group, whose adaLN layers
    are one. On the CPU equal (t, class) rows of the batch, such as the null class under guidance, are computed once.
    """

    classes = 0  # rows of the class embedding, the null class among them

    def __init__(self) -> None:
        super().__init__()
        self.embedders = nn.ModuleList()
        self.linears = nn.ModuleList()
        self.places: list[tuple[int, int]] = []  # for block i: its group, and its place in the group

    def add(self, embedder: nn.Module, linear: nn.Module) -> int:
        """Add a group of blocks and return its number.

        The group has one embedder and its stacked adaLN layers, (blocks 6 C).
        """
        self.embedders.append(embedder)
        self.linears.append(linear)
        return len(self.linears) - 1

    def forward(self, timestep: torch.Tensor, labels: torch.Tensor) -> Modulation:
        """Return the modulation of a timestep (1,) or (B,), any number type, and labels (B,), on one device."""
        timestep, rows = timestep.expand(labels.shape), None
        if labels.is_cpu and not torch.compiler.is_compiling():
            pairs = torch.stack([timestep.double(), labels.double()])
            distinct, rows = torch.unique(pairs, dim=1, return_inverse=True)
            timestep, labels = distinct[0].to(timestep.dtype), distinct[1].to(labels.dtype)
        found = [_activated(embed, timestep, labels) for embed in self.embedders]
        active = tuple(values for values in found if values is not None)
        if len(active) == len(found):
            stacked = tuple(linear(values) for linear, values in zip(self.linears, active, strict=True))
            return Modulation(rows, active, stacked, active=True)
        embedded = tuple(embed(timestep, labels, hidden_dtype=torch.float32).float() for embed in self.embedders)
        stacked = tuple(linear(F.silu(x)) for linear, x in zip(self.linears, embedded, strict=True))
        return Modulation(rows, embedded, stacked)


def _activated(embed: Any, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
    """Return SiLU of an embedder's output, (B, C) fp32, by kernels of its backend, or None where these cannot run.

    They look up the rows of whole timesteps and of classes themselves.
    """
    if torch.compiler.is_compiling() or not plain(embed, CombinedTimestepLabelEmbeddings):
        return None
    time, classes = embed.timestep_embedder, embed.class_embedder
    kinds = {time: TimestepEmbedding, time.act: nn.SiLU, classes: LabelEmbedding, classes.embedding_table: nn.Embedding}
    if not all(plain(*part) for part in kinds.items()) or classes.training or time.post_act is not None:
        return None
    first, second = at_an_end(time.linear_1), at_an_end(time.linear_2)
    if first is None or second is None or first[1].codes is None or second[1].codes is None:
        return None
    whole = plain(embed.time_proj, TimestepTable) and not timestep.is_floating_point()
    x = Lookup(embed.time_proj.table, timestep) if whole else embed.time_proj(timestep).float()
    hidden = first[0].activated(x, first[1].codes)
    if hidden is None:
        return None
    return second[0].activated(hidden, second[1].codes, Lookup(classes.embedding_table.weight, labels))
