"""Run the float model once over the calibration set.

The pass records ranges, sampled activations and Fisher weights per matmul.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.architectures.attention import Computed
from tqdit.architectures.interface import Attention, Block, Graph, Linear, Operand
from tqdit.architectures.registry import architecture, config_of, graph
from tqdit.calibration.batches import Batches
from tqdit.calibration.fisher import Pick, Probes
from tqdit.calibration.picker import Picker, masked_last
from tqdit.calibration.records import MAXIMA, STREAM_HIGH, Records, channels_of, join, recorded
from tqdit.calibration.statistics import RangeStats, extremes, kept_keys
from tqdit.calibration.store import Forgetful, Store, Tensors
from tqdit.calibration.taps import Taps, watched_stream
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import arguments, predict
from tqdit.sampling.trajectory import Progress, noise_generators
from tqdit.spec import Role
from tqdit.system import distributed
from tqdit.system.parcels import copied

PROBE_STREAM = 500_000  # first noise stream of the probes, far from the streams of images and of trajectories
MAXIMA_PER_HEAD = 16
LARGEST_BATCH = 8
STREAM = "the residual stream"  # its name in messages
PER_STATE = ("group", "step_weight", "image_weight")  # what a record says of the state of each row
# What the activations that one backward pass needs, and what is picked of it, may take. On a GPU few samples wait for
# launches.
PASS_BYTES = {"cuda": 8 << 30, "cpu": 4 << 30}


def record(
    model: nn.Module,
    data: CalibrationSet,
    recipe: Recipe,
    progress: Progress = lambda _: None,
    batch: int | None = None,
    store: Store | None = None,
) -> Records:
    """Run the float model with guidance over `data`, forward and backward. The model is left as it was.

    `batch`: samples at once; by default as many as `PASS_BYTES` of the kind of device allow. Each batch is one piece of
    `store`. Inside `distributed.joined` the ranks share the batches, and each returns the records of its share of the
    blocks.
    """
    config = config_of(model)
    kind, structure = architecture(config), graph(config)
    halves = 1 if recipe.guidance == 1.0 else 2
    picker = Picker(recipe, len(data), halves, kind.tokens(config), kind.context_tokens(_condition(data)))
    device = next(model.parameters()).device
    size = batch or batch_size(structure, picker, device)
    batches, taps, keep, world = Batches(size), Taps(), store or Forgetful(), distributed.current()
    division = distributed.batches(len(data), size)
    names = [f"records-{members.start:06d}-{members.stop:06d}" for members in division]

    def run(members: range) -> dict[str, torch.Tensor]:
        found = _Pass(data, recipe, picker, members, device).run(model, taps, structure.blocks)
        # A GPU's are copied once each process has its own, unless memory is short: then none waits for the next pass.
        waits = batches.size == size and (device.type == "cuda" or world.size > 1)
        return found if waits else copied(found)

    def make(members: range) -> dict[str, torch.Tensor]:
        found = batches.over(members, run)
        return found[0] if len(found) == 1 else {key: join(key, found) for part in found for key in part}

    def finished() -> Iterator[Tensors]:
        share = world.share(list(zip(names, division, strict=True)))
        for done, (name, members) in enumerate(share):
            yield keep.once(name, partial(make, members))  # no name for it here: it is freed before the next pass
            progress((done + 1) / len(share))

    owners = enumerate(structure.blocks)
    solvers = {name: world.owner(index) for index, block in owners for name in recorded(block)}
    with taps.attached(model, structure.blocks), torch.set_grad_enabled(recipe.probed):
        parts = keep.together(finished(), names, lambda key: solvers.get(key.rpartition("/")[0]))
    return Records.from_parts(world.share(structure.blocks), parts, data.t, device)


def batch_size(structure: Graph, picker: Picker, device: torch.device) -> int:
    """Return the samples of one forward and backward pass on a kind of device.

    The memory of a particular machine does not decide: all machines take the same number.
    """
    most = PASS_BYTES.get(device.type, PASS_BYTES["cpu"])
    return max(1, min(LARGEST_BATCH, most // (graph_bytes(structure, picker) + picked_bytes(structure, picker))))


def graph_bytes(structure: Graph, picker: Picker) -> int:
    """Return the bytes of one sample's activations that the backward pass needs, fp32.

    Those are the outputs of all linear layers, which are what norms, attention and activations read, and the
    probabilities.
    """
    kept = 0
    for block in structure.blocks:
        for linear in block.linears:
            kept += structure.features(linear)[1] * _rows(linear, picker)
        kept += sum(attention.heads * picker.tokens * _keys(attention, picker) for attention in block.attentions)
    return 4 * kept * picker.halves


def picked_bytes(structure: Graph, picker: Picker) -> int:
    """Return the bytes of one sample's share of all records, fp32.

    Those are inputs, and weights of outputs, of the rows of linear layers; and of the attention that is kept, queries
    and attended values at some queries, all keys and values, and the scores between them.
    """
    total = 0
    for block in structure.blocks:
        whole = 0
        for linear in block.linears:
            whole += _table(linear, picker).numel() * sum(structure.features(linear))
        for attention in block.attentions:
            queries, keys = picker.queries.shape[-1], _keys(attention, picker)
            each = 2 * (queries + keys) * attention.width + queries * attention.heads * keys
            whole += int(picker.attention.sum()) * each
        total += math.ceil(whole / len(picker.rows))
    return 4 * total


def _rows(linear: Linear, picker: Picker) -> int:
    """Return the number of tokens that a linear layer sees.

    They are those of the context if the layer's input does not depend on the timestep.
    """
    return picker.tokens if linear.source.timed else picker.context


def _keys(attention: Attention, picker: Picker) -> int:
    return picker.context if attention.context else picker.tokens


def _table(linear: Linear, picker: Picker) -> torch.Tensor:
    """Return the rows of a linear layer that are kept."""
    return picker.rows if linear.source.timed else picker.context_rows


def _condition(data: CalibrationSet) -> dict[str, Any]:
    """Return the arguments that condition a call with the first sample.

    The size of the context is read from them.
    """
    conditions: Any = getattr(data, "conditions", None)
    return {} if conditions is None else dict(conditions.rows(data.labels[:1]))


class _Pass:
    """One forward and backward pass over `members`, b samples; it picks the values to keep while it runs.

    Tensors lead with b * halves, conditional halves first.
    """

    def __init__(
        self, data: CalibrationSet, recipe: Recipe, picker: Picker, members: range, device: torch.device
    ) -> None:
        self.data, self.recipe, self.members, self.device = data, recipe, members, device
        self.groups = data.time_groups.num_groups
        self.slice = slice(members.start, members.stop)
        self.per_state = {
            field: getattr(data, field)[self.slice].repeat(picker.halves).to(device) for field in PER_STATE
        }
        self.group = self.per_state["group"]
        tables = {True: picker.rows, False: picker.context_rows}
        self.rows = {timed: picker.flat(table, self.slice).to(device) for timed, table in tables.items()}
        self.context_order = picker.flat(picker.context_order, self.slice).to(device)
        self.first = torch.arange(len(self.group), device=device)[:, None]
        self.kept = picker.flat(picker.attention, self.slice).nonzero()[:, 0].to(device)
        self.queries = picker.flat(picker.queries, self.slice).to(device)[self.kept][:, None, :, None]
        self.probes = Probes(recipe.probes)
        self.found: dict[str, torch.Tensor] = {}
        self.maxima: list[torch.Tensor] = []
        self.streams: list[torch.Tensor] = []  # largest magnitude of each sample at one place, (b * halves,)
        self.finite: dict[str, torch.Tensor] = {}  # site -> which samples had only finite values
        self.outputs: dict[str, list[str]] = {}  # key of a Fisher tensor -> the watched outputs that the tensor joins

    def run(self, model: nn.Module, taps: Taps, blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
        """Return the values that `Records` joins, by "<site or attention>/<field>", on the device; and the maxima."""
        x = self.data.x[self.slice].to(self.device)
        x.requires_grad_(self.recipe.probed)
        with taps.sending_to(self), watched_stream(model, blocks, self._add_stream):
            conditions = self.data.conditions or registry.conditions(config_of(model))
            inputs = arguments(conditions, self.data.labels[self.slice].to(self.device), self.recipe.guidance)
            eps = predict(model, x, self.data.t[self.slice].to(self.device), *inputs, self.recipe.guidance)
            eps = eps[:, : x.shape[1]]
        largest = torch.stack(self.streams).amax(0)
        self.finite[STREAM] = largest.isfinite()  # looked at last: a site says where
        self.found[STREAM_HIGH] = largest.amax()
        self._check_finite()
        if self.recipe.probed:
            self.probes.run(eps, x, self._noise(eps))
        for key, names in self.outputs.items():
            self.found[key] = torch.cat([self.probes.means[name] for name in names], dim=-1)
        self.found[MAXIMA] = torch.stack(self.maxima, 1)
        return self.found

    def _noise(self, eps: torch.Tensor) -> torch.Tensor:
        """Return noise that depends on (seed, sample) alone, so that the batch size changes nothing."""
        shape = (self.recipe.probes, *eps.shape[1:])
        indices = range(PROBE_STREAM + self.members.start, PROBE_STREAM + self.members.stop)
        streams = noise_generators(self.recipe.seed, indices)
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams], 1).to(eps.device)

    def linear_input(self, linear: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        name, timed = linear.source.name, linear.source.timed
        kept = kept_keys(bias)
        group = self._add_range(linear.source, x, kept)
        if linear.source.role is Role.GELU:
            self._add_channel_range(name, x)
        if kept is not None:
            self.rows[False] = masked_last(self.context_order, kept)[:, : self.rows[False].shape[1]]
        each = self.rows[timed].shape[1]
        # A masked token of a prompt changes no output, but would count in a plain error and in a Hessian.
        counted = x if kept is None else x.where(kept[..., None], 0)
        self.found[f"{name}/x"] = self._at_rows(counted, self.rows[timed])
        for field, value in {**self.per_state, "group": group}.items():
            self.found[f"{name}/{field}"] = value.repeat_interleave(each)

    def linear_output(self, linear: Linear, module: str, z: torch.Tensor) -> None:
        pick = partial(self._at_rows, rows=self.rows[linear.source.timed])  # those of the layer's input just before
        self._watch(f"{linear.source.name}/fisher", module, z, pick)

    def attention(self, attention: Attention, computed: Computed) -> None:
        kept = kept_keys(computed.bias)
        for operand, x in zip(attention.operands, computed.operands, strict=True):
            of_keys = operand in (attention.key, attention.value)
            self._add_range(operand, x, kept if of_keys else None)
        if not attention.context:
            self.maxima.append(self._largest(computed.probabilities))
        if not len(self.kept):
            return
        name = attention.module
        self.found[f"{name}/q"] = self._at_queries(computed.query)
        fields = {"k": computed.key, "v": computed.value, **self.per_state}
        for field, x in (fields if computed.bias is None else {**fields, "bias": computed.bias}).items():
            self.found[f"{name}/{field}"] = x[self.kept]
        self._watch(f"{name}/fisher_scores", f"{name}.scores", computed.scores, self._at_queries)
        self._watch(f"{name}/fisher_values", f"{name}.values", computed.attended, self._at_queries)

    def _watch(self, key: str, name: str, z: torch.Tensor, pick: Pick) -> None:
        self.outputs.setdefault(key, []).append(name)
        if self.recipe.probed:
            self.probes.watch(name, z, pick)
        else:
            self.probes.means[name] = torch.ones_like(pick(z))

    def _add_range(self, operand: Operand, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Include the range of every sample, and return the samples' time groups.

        The groups are all 0 for an operand that is not timed.
        """
        low, high = extremes(x, kept)
        groups, group = (self.groups, self.group) if operand.timed else (1, torch.zeros_like(self.group))
        stats = RangeStats.empty(groups, low.shape[1], self.device).include(low, high, group)
        self.found[f"{operand.name}/low"], self.found[f"{operand.name}/high"] = stats.low, stats.high
        self.finite[operand.name] = (torch.isfinite(low) & torch.isfinite(high)).all(1)
        return group

    def _add_channel_range(self, name: str, x: torch.Tensor) -> None:
        """Include the range of every channel of x (B, N, C)."""
        stats = RangeStats.empty(self.groups, x.shape[2], self.device).include(x.amin(1), x.amax(1), self.group)
        self.found[f"{channels_of(name)}/low"], self.found[f"{channels_of(name)}/high"] = stats.low, stats.high

    def _add_stream(self, x: torch.Tensor) -> None:
        """Include the largest magnitude of every sample of the residual stream at one place."""
        low, high = extremes(x.float())
        self.streams.append(torch.maximum(-low, high).amax(1))

    def _check_finite(self) -> None:
        """Raise `InputError` naming the first site, in the order of the forward pass, that had NaN or Inf, and when.

        All sites are looked at together: to look at each would let a GPU wait as often.
        """
        finite = torch.stack(list(self.finite.values())).cpu()
        if finite.all():
            return
        site, sample = (int(index) for index in (~finite).nonzero()[0])
        names = [name if name == STREAM else f"site '{name}'" for name in self.finite]
        t = self.data.t[self.slice].repeat(len(finite[0]) // len(self.members))[sample]
        raise InputError(
            f"{names[site]}: the float model has NaN or Inf values at timestep {t.item():g} (time "
            f"group {int(self.group[sample])} of {self.groups}), no scale can represent them"
        )

    def _at_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[self.first, rows].flatten(0, 1)

    def _at_queries(self, x: torch.Tensor) -> torch.Tensor:
        x = x[self.kept]
        return x.gather(2, self.queries.expand(-1, x.shape[1], -1, x.shape[3]))

    def _largest(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the maxima per channel of the conditional halves, (b, heads * k): the values of the paper's Fig. 3."""
        channels = probabilities[: len(self.members)].amax(2)  # over queries: (b, H, N)
        stride = max(1, channels.shape[-1] // MAXIMA_PER_HEAD)
        return channels[..., ::stride][..., :MAXIMA_PER_HEAD].flatten(1)
