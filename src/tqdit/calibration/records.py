"""What the search needs of a model: sampled operands, ranges and Fisher weights of every matmul."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch

from tqdit.architectures.sites import BlockLayout
from tqdit.calibration.statistics import RangeStats
from tqdit.calibration.store import Tensors
from tqdit.recipe import Recipe
from tqdit.spec import Role
from tqdit.timegroups import TimeGroups

ATTENTION_ROLES = (Role.QUERY, Role.KEY, Role.VALUE, Role.SOFTMAX)
MAXIMA = "maxima"


@dataclass(frozen=True)
class LinearRecord:
    """Sampled rows of one linear input: x (R, in), group and step_weight (R,), fisher (R, out) of its layers."""

    x: torch.Tensor
    group: torch.Tensor
    step_weight: torch.Tensor
    fisher: torch.Tensor


@dataclass(frozen=True)
class AttentionRecord:
    """Sampled queries of one attention: q (S, H, Q, d); k, v (S, H, N, d); group, step_weight (S,).

    Fisher weights at the scaled scores (S, H, Q, N) and at the attended values (S, H, Q, d).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    group: torch.Tensor
    step_weight: torch.Tensor
    fisher_scores: torch.Tensor
    fisher_values: torch.Tensor


Kind = TypeVar("Kind", LinearRecord, AttentionRecord)


class Joined(Mapping[str, Kind], Generic[Kind]):
    """Records by name, each put together from the batches' parts when it is asked for: memory for one, not for all.

    They are put together on `device`: on the host it would be a copy more, of everything.
    """

    def __init__(self, kind: type[Kind], names: Iterable[str], parts: Sequence[Tensors], device: torch.device) -> None:
        self._kind: type[Kind] = kind
        self._names, self._parts, self._device = tuple(names), parts, device

    def __getitem__(self, name: str) -> Kind:
        if name not in self._names:
            raise KeyError(name)
        keys = [f"{name}/{field.name}" for field in fields(self._kind)]
        found = [part.read(keys) for part in self._parts]
        return self._kind(
            *(join(key, [{key: part[key].to(self._device)} for part in found if key in part]) for key in keys)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Records:
    """Everything the search needs, of the blocks that this process solves: all of them if it is alone.

    `linears` and `attentions` come on the device of the model they were recorded of, all else on the CPU. `maxima`:
    largest post-softmax values of all blocks, (S, blocks, heads * k), for the report. `recipe`, `time_groups` and
    `states_sha256` say which calibration they are of, where a search is to check it.
    """

    linears: Mapping[str, LinearRecord]
    attentions: Mapping[str, AttentionRecord]
    ranges: dict[str, RangeStats]
    maxima: torch.Tensor
    t: torch.Tensor
    recipe: Recipe | None = None
    time_groups: TimeGroups | None = None
    states_sha256: str = ""

    @classmethod
    def of(
        cls, layout: tuple[BlockLayout, ...], parts: Sequence[Tensors], t: torch.Tensor, device: torch.device
    ) -> "Records":
        """Those of the blocks `layout`, from the parts of all batches, in order."""
        ranged = [name for block in layout for name in (*_sources(block), *_operands(block))]
        keys = [f"{site}/{end}" for site in ranged for end in ("low", "high")]
        small = [part.read([*keys, MAXIMA]) for part in parts]
        ranges = {site: RangeStats(*(join(f"{site}/{end}", small) for end in ("low", "high"))) for site in ranged}
        return cls(
            Joined(LinearRecord, [source for block in layout for source in _sources(block)], parts, device),
            Joined(AttentionRecord, [block.attention for block in layout], parts, device),
            ranges, join(MAXIMA, small), t,
        )  # fmt: skip


def recorded(block: BlockLayout) -> tuple[str, ...]:
    """What the tensors of a block's records are named after, in front of the "/"."""
    return (block.attention, *_sources(block), *_operands(block))


def _sources(block: BlockLayout) -> list[str]:
    return [group.source for group in block.linears]


def _operands(block: BlockLayout) -> list[str]:
    return [block.operand(role) for role in ATTENTION_ROLES]


def join(key: str, parts: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """One tensor of all parts that have it: the whole range of ranges, rows one after the other of anything else."""
    tensors = [part[key] for part in parts if key in part]
    if key.endswith("/low"):
        return torch.stack(tensors).amin(0)
    return torch.stack(tensors).amax(0) if key.endswith("/high") else torch.cat(tensors)
