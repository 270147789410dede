"""The records of a model that the search needs: sampled operands, ranges and Fisher weights of every matmul."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

import torch

from tqdit.architectures.interface import Block
from tqdit.calibration.statistics import RangeStats
from tqdit.calibration.store import Tensors
from tqdit.recipe import Recipe
from tqdit.spec import Role
from tqdit.timegroups import TimeGroups

MAXIMA = "maxima"
STREAM_HIGH = "stream/high"  # the largest magnitude of the residual stream, fp32 ()


@dataclass(frozen=True)
class LinearRecord:
    """The sampled rows of one linear input.

    x (R, in), group, step_weight and image_weight (R,), fisher (R, out) of its layers. Masked tokens are rows of zeros.
    x and fisher are fp32; of a traced model they are in its own dtype, and fisher is None if it was not probed.
    """

    x: torch.Tensor
    group: torch.Tensor
    step_weight: torch.Tensor
    image_weight: torch.Tensor
    fisher: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionRecord:
    """The sampled queries of one attention.

    q (S, H, Q, d); k, v (S, H, M, d); group, step_weight, image_weight (S,). Fisher weights at the scaled scores
    (S, H, Q, M) and at the attended values (S, H, Q, d). `bias` (S, M) is added to the scaled scores before the
    softmax, if some keys are masked: nothing is weighed at those.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    group: torch.Tensor
    step_weight: torch.Tensor
    image_weight: torch.Tensor
    fisher_scores: torch.Tensor
    fisher_values: torch.Tensor
    bias: torch.Tensor | None = None


Kind = TypeVar("Kind", LinearRecord, AttentionRecord)


class Joined(Mapping[str, Kind], Generic[Kind]):
    """Records by name, each joined from the batches' parts when it is asked for: memory for one record, not for all.

    The parts are joined on `device`: to join them on the host would be one more copy of everything.
    """

    def __init__(self, kind: type[Kind], names: Iterable[str], parts: Sequence[Tensors], device: torch.device) -> None:
        self._kind: type[Kind] = kind
        self._names, self._parts, self._device = tuple(names), parts, device

    def __getitem__(self, name: str) -> Kind:
        if name not in self._names:
            raise KeyError(name)
        keys = {entry.name: f"{name}/{entry.name}" for entry in fields(self._kind)}
        found = [part.read(keys.values()) for part in self._parts]
        held = {field: [part[key].to(self._device) for part in found if key in part] for field, key in keys.items()}
        # A field that no part has keeps its default.
        return self._kind(**{field: torch.cat(tensors) for field, tensors in held.items() if tensors})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Records:
    """All records of the blocks that this process solves, which are all blocks if it is alone.

    `ranges` has every activation site, and the channels of values after GELU (`channels_of`).
    `linears` and `attentions` come on the device of the model they were recorded of, all else on the CPU. `maxima`:
    largest post-softmax values of all blocks, (S, blocks, heads * k), for the report. `recipe`, `time_groups`,
    `states_sha256` and `source_sha256`, of the model's weights, say which calibration they are of, where a search is to
    check it. `stream_max`: the largest magnitude of the residual stream before and after blocks, over all states.

    Of a traced model, `linears` are on the CPU, and there are no attentions and no maxima. `tokens`: the mean number of
    rows of each site in a call. `notes`: sentences for the report, on what was not recorded.
    """

    linears: Mapping[str, LinearRecord]
    attentions: Mapping[str, AttentionRecord]
    ranges: dict[str, RangeStats]
    maxima: torch.Tensor
    t: torch.Tensor
    recipe: Recipe | None = None
    time_groups: TimeGroups | None = None
    states_sha256: str = ""
    source_sha256: str = ""
    conditions_sha256: str | None = None  # None for the model's own classes
    stream_max: float | None = None
    tokens: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> "Records":
        """Return the records of no calibration, for recipes that need none."""
        return cls({}, {}, {}, torch.zeros(0), torch.zeros(0))

    @classmethod
    def from_parts(
        cls, blocks: Sequence[Block], parts: Sequence[Tensors], t: torch.Tensor, device: torch.device
    ) -> "Records":
        """Join the records of `blocks` from the parts of all batches, in order."""
        ranged = [operand.name for block in blocks for operand in block.operands]
        ranged += [channels_of(o.name) for block in blocks for o in block.operands if o.role is Role.GELU]
        keys = [f"{site}/{end}" for site in ranged for end in ("low", "high")]
        small = [part.read([*keys, MAXIMA, STREAM_HIGH]) for part in parts]
        ranges = {site: RangeStats(*(join(f"{site}/{end}", small) for end in ("low", "high"))) for site in ranged}
        return cls(
            Joined(LinearRecord, [linear.source.name for block in blocks for linear in block.linears], parts, device),
            Joined(AttentionRecord, [found.module for block in blocks for found in block.attentions], parts, device),
            ranges, join(MAXIMA, small), t, stream_max=join(STREAM_HIGH, small).item(),
        )  # fmt: skip


def channels_of(site: str) -> str:
    """Return the name under which the ranges of a site's channels are recorded."""
    return f"{site}/channels"


def recorded(block: Block) -> tuple[str, ...]:
    """Return the name in front of the "/" in the names of a record's tensors."""
    return (*(found.module for found in block.attentions), *(operand.name for operand in block.operands))


def join(key: str, parts: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Return one tensor of all parts that have it.

    Ranges become the range that contains them all; other tensors are put one after the other by rows.
    """
    tensors = [part[key] for part in parts if key in part]
    if key.endswith("/low"):
        return torch.stack(tensors).amin(0)
    return torch.stack(tensors).amax(0) if key.endswith("/high") else torch.cat(tensors)
