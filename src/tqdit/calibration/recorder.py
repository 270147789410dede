"""One pass of the float model over the calibration set: ranges, sampled activations and Fisher weights per matmul."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tqdit.architectures.sites import BlockLayout, LinearGroup, blocks, config_of
from tqdit.calibration.batches import Batches
from tqdit.calibration.fisher import Pick, Probes
from tqdit.calibration.picker import Picker
from tqdit.calibration.records import ATTENTION_ROLES, MAXIMA, Records, join, recorded
from tqdit.calibration.statistics import RangeStats, extremes
from tqdit.calibration.store import Forgetful, Store, Tensors
from tqdit.calibration.taps import Taps
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import arguments, predict
from tqdit.sampling.trajectory import Progress, noise_generators
from tqdit.system import distributed
from tqdit.system.parcels import copied

PROBE_STREAM = 500_000  # first noise stream of the probes, apart from those of images and of trajectories
MAXIMA_PER_HEAD = 16
LARGEST_BATCH = 8
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
    layout = blocks(config)
    halves = 1 if recipe.guidance == 1.0 else 2
    picker = Picker(recipe, len(data), halves, _tokens(config))
    device = next(model.parameters()).device
    size = batch or batch_size(config, picker, device)
    batches, taps, keep, world = Batches(size), Taps(), store or Forgetful(), distributed.current()
    division = distributed.batches(len(data), size)
    names = [f"records-{members.start:06d}-{members.stop:06d}" for members in division]

    def run(members: range) -> dict[str, torch.Tensor]:
        return _Pass(data, recipe, picker, members, device).run(model, taps)

    def make(members: range) -> dict[str, torch.Tensor]:
        found = batches.over(members, run)
        return found[0] if len(found) == 1 else {key: join(key, found) for part in found for key in part}

    def finished() -> Iterator[Tensors]:
        share = world.share(list(zip(names, division, strict=True)))
        for done, (name, members) in enumerate(share):
            piece = keep.once(name, partial(make, members))
            progress((done + 1) / len(share))
            yield piece

    solvers = {name: world.owner(block.index) for block in layout for name in recorded(block)}
    with taps.attached(model, layout), torch.set_grad_enabled(recipe.hessian):
        parts = keep.together(finished(), names, lambda key: solvers.get(key.rpartition("/")[0]))
    return Records.of(world.share(layout), parts, data.t, device)


def batch_size(config: Mapping[str, Any], picker: Picker, device: torch.device) -> int:
    """Samples of one forward and backward pass on a kind of device, never by what a machine has: all take the same."""
    most = PASS_BYTES.get(device.type, PASS_BYTES["cpu"])
    return max(1, min(LARGEST_BATCH, most // (graph_bytes(config, picker) + picked_bytes(config, picker))))


def graph_bytes(config: Mapping[str, Any], picker: Picker) -> int:
    """Of one sample's activations that the backward pass needs, fp32.

    Of every token and block: the inputs of both norms, q, k, v and the input of GELU, 9 widths, and the probabilities.
    """
    heads, tokens = int(config["num_attention_heads"]), _tokens(config)
    kept = 9 * heads * int(config["attention_head_dim"]) + heads * tokens
    return 4 * kept * tokens * picker.halves * int(config["num_layers"])


def picked_bytes(config: Mapping[str, Any], picker: Picker) -> int:
    """Of one sample's share of all records, fp32: inputs, and weights of outputs, of rows; operands of attention."""
    heads, tokens = int(config["num_attention_heads"]), _tokens(config)
    width, queries = heads * int(config["attention_head_dim"]), picker.queries.shape[-1]
    of_attention = 2 * queries * width + 2 * tokens * width + queries * heads * tokens
    whole = picker.rows.numel() * 16 * width + int(picker.attention.sum()) * of_attention
    return 4 * int(config["num_layers"]) * math.ceil(whole / len(picker.rows))


def _tokens(config: Mapping[str, Any]) -> int:
    return int((config["sample_size"] // config["patch_size"]) ** 2)


class _Pass:
    """One forward and backward pass over `members`, b samples: what is kept of it is picked while it runs.

    Tensors lead with b * halves, conditional halves first.
    """

    def __init__(
        self, data: CalibrationSet, recipe: Recipe, picker: Picker, members: range, device: torch.device
    ) -> None:
        self.data, self.recipe, self.members, self.device = data, recipe, members, device
        self.slice = slice(members.start, members.stop)
        self.group, self.step_weight = (
            x[self.slice].repeat(picker.halves).to(device) for x in (data.group, data.step_weight)
        )
        self.rows = picker.flat(picker.rows, self.slice).to(device)
        self.first = torch.arange(len(self.rows), device=device)[:, None]
        self.kept = picker.flat(picker.attention, self.slice).nonzero()[:, 0].to(device)
        self.queries = picker.flat(picker.queries, self.slice).to(device)[self.kept][:, None, :, None]
        self.probes = Probes(recipe.probes)
        self.found: dict[str, torch.Tensor] = {}
        self.maxima: list[torch.Tensor] = []
        self.finite: dict[str, torch.Tensor] = {}  # site -> which samples had finite values alone
        self.outputs: dict[str, list[str]] = {}  # key of a Fisher tensor -> the watched outputs it joins

    def run(self, model: nn.Module, taps: Taps) -> dict[str, torch.Tensor]:
        """What `Records` joins, on the CPU: "<site or attention>/<field>" -> tensor, and the maxima."""
        x, t, labels = (part[self.slice].to(self.device) for part in (self.data.x, self.data.t, self.data.labels))
        x.requires_grad_(self.recipe.hessian)
        with taps.telling(self):
            inputs = arguments(self.data.conditions, labels, self.recipe.guidance)
            eps = predict(model, x, t, *inputs, self.recipe.guidance)[:, : x.shape[1]]
        self._check_finite()
        if self.recipe.hessian:
            self.probes.run(eps, x, self._noise(eps))
        for key, names in self.outputs.items():
            self.found[key] = torch.cat([self.probes.means[name] for name in names], dim=-1)
        self.found[MAXIMA] = torch.stack(self.maxima, 1)
        return copied(self.found)

    def _noise(self, eps: torch.Tensor) -> torch.Tensor:
        """Noise that depends on (seed, sample) alone, so that the batch size changes nothing."""
        shape = (self.recipe.probes, *eps.shape[1:])
        indices = range(PROBE_STREAM + self.members.start, PROBE_STREAM + self.members.stop)
        streams = noise_generators(self.recipe.seed, indices)
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams], 1).to(eps.device)

    def linear_input(self, group: LinearGroup, x: torch.Tensor) -> None:
        self._add_range(group.source, x)
        each = self.rows.shape[1]
        self.found[f"{group.source}/x"] = self._at_rows(x)
        self.found[f"{group.source}/group"] = self.group.repeat_interleave(each)
        self.found[f"{group.source}/step_weight"] = self.step_weight.repeat_interleave(each)

    def linear_output(self, group: LinearGroup, module: str, z: torch.Tensor) -> None:
        self._watch(f"{group.source}/fisher", module, z, self._at_rows)

    def attention(
        self, block: BlockLayout, operands: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]
    ) -> None:
        for role, x in zip(ATTENTION_ROLES, operands, strict=True):
            self._add_range(block.operand(role), x)
        q, k, v, probabilities = operands
        self.maxima.append(self._largest(probabilities))
        if not len(self.kept):
            return
        name = block.attention
        self.found[f"{name}/q"] = self._at_queries(q)
        for field, x in (("k", k), ("v", v), ("group", self.group), ("step_weight", self.step_weight)):
            self.found[f"{name}/{field}"] = x[self.kept]
        for field, z in zip(("scores", "values"), outputs, strict=True):
            self._watch(f"{name}/fisher_{field}", f"{name}.{field}", z, self._at_queries)

    def _watch(self, key: str, name: str, z: torch.Tensor, pick: Pick) -> None:
        self.outputs.setdefault(key, []).append(name)
        if self.recipe.hessian:
            self.probes.watch(name, z, pick)
        else:
            self.probes.means[name] = torch.ones_like(pick(z))

    def _add_range(self, site: str, x: torch.Tensor) -> None:
        low, high = extremes(x)
        stats = RangeStats.empty(self.recipe.groups, low.shape[1], self.device).include(low, high, self.group)
        self.found[f"{site}/low"], self.found[f"{site}/high"] = stats.low, stats.high
        self.finite[site] = (torch.isfinite(low) & torch.isfinite(high)).all(1)

    def _check_finite(self) -> None:
        """Raise `InputError` naming the first site, in the order of the forward pass, that had NaN or Inf, and when.

        All sites are looked at together: to look at each would let a GPU wait as often.
        """
        finite = torch.stack(list(self.finite.values())).cpu()
        if finite.all():
            return
        site, sample = (int(index) for index in (~finite).nonzero()[0])
        t = self.data.t[self.slice].repeat(len(finite[0]) // len(self.members))[sample]
        raise InputError(
            f"site '{list(self.finite)[site]}': the float model has NaN or Inf values at timestep {t.item():g} (time "
            f"group {int(self.group[sample])} of {self.recipe.groups}), no scale can represent them"
        )

    def _at_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.first, self.rows].flatten(0, 1)

    def _at_queries(self, x: torch.Tensor) -> torch.Tensor:
        x = x[self.kept]
        return x.gather(2, self.queries.expand(-1, x.shape[1], -1, x.shape[3]))

    def _largest(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Per-channel maxima of the conditional halves, the values of the paper's Fig. 3: (b, heads * k)."""
        channels = probabilities[: len(self.members)].amax(2)  # over queries: (b, H, N)
        stride = max(1, channels.shape[-1] // MAXIMA_PER_HEAD)
        return channels[..., ::stride][..., :MAXIMA_PER_HEAD].flatten(1)
