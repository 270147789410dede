"""One pass of the float model over the calibration set: ranges, sampled activations and Fisher weights per matmul."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.calibration.fisher import probe_gradients
from tqdit.calibration.statistics import RangeStats
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.models.sampler import Progress, noise_generators, predict
from tqdit.models.sites import BlockLayout, LinearGroup, blocks, config_of
from tqdit.recipe import Recipe
from tqdit.spec import Role

QUERIES_PER_SAMPLE = 32
PROBE_STREAM = 500_000  # first noise stream of the probes, apart from those of images and of trajectories
MAXIMA_PER_HEAD = 16


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


@dataclass(frozen=True)
class Records:
    """Everything the search needs. `maxima`: largest post-softmax values, (S, blocks, heads * k), for the report."""

    linears: dict[str, LinearRecord]
    attentions: dict[str, AttentionRecord]
    ranges: dict[str, RangeStats]
    maxima: torch.Tensor
    t: torch.Tensor


class _Taps:
    """Tensors of one forward pass, by name; `outputs` are those whose Fisher weights are wanted."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def processor(self, block: BlockLayout) -> Any:
        """An attention processor that computes softmax(Q K^T / sqrt(d)) V in the open and keeps every operand."""

        def process(attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            def heads(x: torch.Tensor) -> torch.Tensor:
                return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

            q, k, v = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            probabilities = scores.softmax(-1)
            attended = probabilities @ v
            for role, x in zip((Role.QUERY, Role.KEY, Role.VALUE, Role.SOFTMAX), (q, k, v, probabilities), strict=True):
                self.values[block.operand(role)] = x.detach()
            self.outputs[f"{block.attention}.scores"] = scores
            self.outputs[f"{block.attention}.values"] = attended
            return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))

        return process

    @contextmanager
    def attached(self, model: nn.Module, layout: tuple[BlockLayout, ...]) -> Iterator[None]:
        """Watch a float model; its processors and hooks are restored on exit."""
        handles, originals = [], []
        for block in layout:
            attn = model.get_submodule(block.attention)
            originals.append((attn, attn.processor))
            attn.processor = self.processor(block)
            for group in block.linears:
                first = model.get_submodule(group.modules[0])
                handles.append(first.register_forward_pre_hook(self._input_hook(group)))
                for name in group.modules:
                    handles.append(model.get_submodule(name).register_forward_hook(self._output_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for attn, processor in originals:
                attn.processor = processor

    def _input_hook(self, group: LinearGroup) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.values[group.source] = args[0].detach()

        return hook

    def _output_hook(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            self.outputs[name] = output

        return hook


class _Picker:
    """Seeded choice of tokens of every (sample, guidance half), made once, so that batching changes nothing."""

    def __init__(self, recipe: Recipe, samples: int, halves: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(recipe.seed + 2)
        self.halves = halves
        rows = min(tokens, math.ceil(recipe.rows / (samples * halves)))
        self.rows = torch.rand(samples, halves, tokens, generator=generator).argsort(-1)[..., :rows]
        queries = min(tokens, QUERIES_PER_SAMPLE)
        self.queries = torch.rand(samples, halves, tokens, generator=generator).argsort(-1)[..., :queries]
        # Attention keeps whole K and V, so only every `stride`-th sample is kept; samples are ordered by group, halves
        # alternate. An odd stride of at most the samples of a group meets both halves of every group.
        wanted = math.ceil(recipe.queries / queries)
        stride = max(1, min(samples * halves // wanted, recipe.samples))
        stride -= 1 - stride % 2
        order = torch.arange(samples * halves).reshape(samples, halves)
        self.attention = order % stride == 0

    def flat(self, table: torch.Tensor, members: slice) -> torch.Tensor:
        """The table's rows of a batch, conditional halves first as in the forward pass."""
        return table[members].transpose(0, 1).flatten(0, 1)


def record(
    model: nn.Module,
    data: CalibrationSet,
    recipe: Recipe,
    progress: Progress = lambda _: None,
    batch: int = 8,
) -> Records:
    """Run the float model with guidance over `data`, forward and backward. The model is left as it was."""
    config = config_of(model)
    layout = blocks(config)
    halves = 1 if recipe.guidance == 1.0 else 2
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    picker = _Picker(recipe, len(data), halves, tokens)
    collector = _Collector(layout, data, recipe, picker)
    device = next(model.parameters()).device
    taps = _Taps()
    with taps.attached(model, layout), torch.set_grad_enabled(recipe.hessian):
        for start in range(0, len(data), batch):
            members = slice(start, min(start + batch, len(data)))
            x = data.x[members].to(device).requires_grad_(recipe.hessian)
            eps = predict(model, x, data.t[members].to(device), data.labels[members].to(device), recipe.guidance)
            eps = eps[:, : x.shape[1]]
            names = list(taps.outputs)
            if recipe.hessian:
                gradients = _per_sample_probes(eps, taps, names, recipe, range(members.start, members.stop))
            else:
                gradients = [torch.ones_like(taps.outputs[name]) for name in names]
            fisher = dict(zip(names, gradients, strict=True))
            collector.add(taps.values, fisher, members)
            taps.values.clear()
            taps.outputs.clear()
            progress(members.stop / len(data))
    return collector.finish(data.t)


def _per_sample_probes(
    eps: torch.Tensor, taps: _Taps, names: list[str], recipe: Recipe, samples: range
) -> list[torch.Tensor]:
    """Probes whose noise depends on (seed, sample) alone, so that the batch size changes nothing."""
    shape = (recipe.probes, *eps.shape[1:])
    streams = noise_generators(recipe.seed, range(PROBE_STREAM + samples.start, PROBE_STREAM + samples.stop))
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams], 1)
    return probe_gradients(eps, [taps.outputs[name] for name in names], noise.to(eps.device))


class _Lead(NamedTuple):
    """What the search must know of every sample and half of a batch, each (b * halves,)."""

    group: torch.Tensor
    step_weight: torch.Tensor


class _Collector:
    """Accumulates what `Records` holds over the batches."""

    def __init__(self, layout: tuple[BlockLayout, ...], data: CalibrationSet, recipe: Recipe, picker: _Picker) -> None:
        self.layout = layout
        self.groups = recipe.groups
        self.data = data
        self.picker = picker
        self.ranges: dict[str, RangeStats] = {}
        self.parts: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        self.maxima: list[torch.Tensor] = []

    def add(
        self,
        values: dict[str, torch.Tensor],
        fisher: dict[str, torch.Tensor],
        members: slice,
    ) -> None:
        """Take in one batch of b samples; values and fisher lead with b * halves."""
        lead = _Lead(*(x[members].repeat(self.picker.halves) for x in (self.data.group, self.data.step_weight)))
        for name, x in values.items():
            units = x.shape[1] if x.ndim == 4 else 1
            stats = self.ranges.get(name) or RangeStats.empty(self.groups, units)
            self.ranges[name] = stats.update(x, lead.group)
        for block in self.layout:
            for linear in block.linears:
                self._add_linear(linear, values[linear.source], [fisher[m] for m in linear.modules], lead, members)
            self._add_attention(block, values, fisher, lead, members)
        self.maxima.append(self._maxima(values, members.stop - members.start))

    def _add_linear(
        self,
        linear: LinearGroup,
        x: torch.Tensor,
        fisher: list[torch.Tensor],
        lead: _Lead,
        members: slice,
    ) -> None:
        rows = self.picker.flat(self.picker.rows, members).to(x.device)
        first = torch.arange(len(x), device=x.device)[:, None]
        weights = torch.cat([f[first, rows] for f in fisher], dim=-1).flatten(0, 1)
        picked = x[first, rows].flatten(0, 1)
        part = (picked.cpu(), *(label.repeat_interleave(rows.shape[1]) for label in lead), weights.cpu())
        self.parts.setdefault(linear.source, []).append(part)

    def _add_attention(
        self,
        block: BlockLayout,
        values: dict[str, torch.Tensor],
        fisher: dict[str, torch.Tensor],
        lead: _Lead,
        members: slice,
    ) -> None:
        kept = self.picker.flat(self.picker.attention, members).nonzero()[:, 0]
        if not len(kept):
            return
        queries = self.picker.flat(self.picker.queries, members)[kept][:, None, :, None]

        def at_queries(x: torch.Tensor) -> torch.Tensor:
            x = x.cpu()[kept]
            return x.gather(2, queries.expand(-1, x.shape[1], -1, x.shape[3]))

        k, v = (values[block.operand(role)].cpu()[kept] for role in (Role.KEY, Role.VALUE))
        scores, attended = (at_queries(fisher[f"{block.attention}.{name}"]) for name in ("scores", "values"))
        part = (at_queries(values[block.operand(Role.QUERY)]), k, v, *(label[kept] for label in lead), scores, attended)
        self.parts.setdefault(block.attention, []).append(part)

    def _maxima(self, values: dict[str, torch.Tensor], samples: int) -> torch.Tensor:
        """Per-channel maxima of the conditional halves, the values of the paper's Fig. 3: (b, blocks, heads * k)."""
        found = []
        for block in self.layout:
            channels = values[block.operand(Role.SOFTMAX)][:samples].amax(2)  # over queries: (b, H, N)
            stride = max(1, channels.shape[-1] // MAXIMA_PER_HEAD)
            found.append(channels[..., ::stride][..., :MAXIMA_PER_HEAD].flatten(1).cpu())
        return torch.stack(found, 1)

    def finish(self, t: torch.Tensor) -> Records:
        def joined(name: str) -> list[torch.Tensor]:
            return [torch.cat(tensors) for tensors in zip(*self.parts[name], strict=True)]

        linears = {g.source: LinearRecord(*joined(g.source)) for block in self.layout for g in block.linears}
        attentions = {block.attention: AttentionRecord(*joined(block.attention)) for block in self.layout}
        return Records(linears, attentions, self.ranges, torch.cat(self.maxima), t)
