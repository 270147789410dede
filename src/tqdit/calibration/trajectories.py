"""Calibration data from the model's own sampling: n samples (x_t, t, condition) per time group (TGQ)."""

import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.architectures.registry import config_of
from tqdit.calibration.batches import Batches
from tqdit.calibration.records import join
from tqdit.calibration.sensitivity import Sensitivity, image_sampling, measure, work
from tqdit.calibration.states import CalibrationSet, groups_over
from tqdit.calibration.store import Forgetful, Store
from tqdit.errors import InputError
from tqdit.plan import Objective, objective
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.sampling.schedules import Schedule, resolved, schedule
from tqdit.sampling.trajectory import Progress, noise_generators, trajectory
from tqdit.system import distributed, trees
from tqdit.system.capture import CudaGraphed
from tqdit.timegroups import TimeGroups

# Trajectories at once, at most. What several processes share are batches: on GPUs the 32 trajectories of the published
# settings are two. A core of a CPU is no slower with few.
BATCH = {"cuda": 16, "cpu": 5}
CALIBRATION_STREAM = 250_000  # noise streams start here: images i < 250,000 of the same seed have other noise


def collect(
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    recipe: Recipe,
    progress: Progress = lambda _: None,
    batch: int | None = None,
    store: Store | None = None,
    conditions: Conditions | None = None,
) -> CalibrationSet:
    """Run `trajectories` guided samplings and keep `samples` states per time group, at random visited timesteps.

    Each trajectory has one of `conditions`, which are the model's classes if not given. Seeded by the recipe: each
    trajectory has a generator of its own, so `batch` changes speed and float rounding alone. Each batch is one piece of
    `store`. The model computes in bf16 where `draws_in_bf16` says so, and on a GPU as a CUDA graph: few samples would
    wait for launches. Inside `distributed.joined` the ranks share the batches, and each returns all samples. Where the
    recipe weighs errors by the image, the sensitivity of the image is measured, too, for `image_weight`. Raises
    `InputError` if the sampler visits too few timesteps of a group, and as `schedule` and `measure` do.
    """
    config = config_of(model)
    conditions, sample = conditions or registry.conditions(config), registry.sample(config)
    sampling = calibration_sampling(recipe, scheduler_config)
    steps = schedule(scheduler_config, sampling, sample)
    groups, visited = time_groups(steps, recipe), steps.timesteps
    count = _num_trajectories(recipe, groups, visited, conditions.count)
    picks = _pick_timesteps(recipe, groups, visited, count)
    progress(0.0)  # all is checked
    order = torch.randperm(conditions.count, generator=torch.Generator().manual_seed(recipe.seed))
    device = next(model.parameters()).device
    labels = order.repeat(math.ceil(count / len(order)))[:count]
    most = batch or BATCH.get(device.type, BATCH["cpu"])
    size = math.ceil(count / math.ceil(count / most))  # as even as they get, for even shares
    division, world = distributed.batches(count, size), distributed.current()
    share = world.share(division)
    part = _drawing_share(recipe, scheduler_config, count)
    place = {i: n for n, i in enumerate(i for members in share for i in members)}  # among this process's own

    def run(members: range) -> dict[str, torch.Tensor]:
        first = CALIBRATION_STREAM + members.start
        generators = noise_generators(recipe.seed, range(first, first + len(members)))
        chosen = labels[members.start : members.stop].to(device)
        found: list[tuple[float, int, torch.Tensor]] = []  # (t, trajectory, x_t)
        # Of this batch alone: where memory runs out, nothing of a larger one is left when a smaller one is tried.
        states = trajectory(_drawing(model), scheduler_config, sampling, chosen, generators, conditions, sample)
        for step, (t, x) in enumerate(states):
            if t is not None:  # the last state is an image, which no timestep sees
                found += [(t, i, x[i - members.start].cpu()) for i in members if t in picks[i]]
                progress(part * (place[members.start] + len(members) * (step + 1) / recipe.steps) / len(place))
        ts, indices, kept = zip(*found, strict=True)
        return {"t": torch.tensor(ts), "trajectory": torch.tensor(indices), "x": torch.stack(kept)}

    batches, keep = Batches(size), store or Forgetful()

    def make(members: range) -> dict[str, torch.Tensor]:
        found = batches.over(members, run)
        return {key: join(key, found) for key in found[0]}

    def finished() -> Iterator[Mapping[str, torch.Tensor]]:
        for members in share:
            yield keep.once(f"trajectories-{members.start:06d}-{members.stop:06d}", partial(make, members)).read()

    pieces = world.gather_named(finished(), len(division))
    states = {key: join(key, pieces) for key in pieces[0]}
    _check_finite(states["x"], states["t"])
    if not _weighs_the_image(recipe):
        return _ordered(states, labels, groups, steps, conditions)
    sampling = image_sampling(scheduler_config, recipe.guidance)
    told = lambda fraction: progress(part + (1 - part) * fraction)  # noqa: E731
    given = (model, scheduler_config, sampling, conditions)
    measured = measure(*given, seed=recipe.seed, progress=told, drawing=_drawing(model), store=keep)
    return _ordered(states, labels, groups, steps, conditions, measured)


def _weighs_the_image(recipe: Recipe) -> bool:
    return objective(recipe) is Objective.IMAGE


def _drawing_share(recipe: Recipe, scheduler_config: Mapping[str, Any] | None, count: int) -> float:
    """Return the share of the work that `count` trajectories are; the sensitivity of the image is the rest."""
    if not _weighs_the_image(recipe):
        return 1.0
    drawn = count * recipe.steps
    return drawn / (drawn + work(image_sampling(scheduler_config, recipe.guidance)))


def _drawing(model: nn.Module) -> nn.Module:
    """Return the model as it draws states: in bf16 where that is faster, and on a GPU as a CUDA graph."""
    device = next(model.parameters()).device
    denoiser = InBfloat16(model) if draws_in_bf16(device) else model
    return CudaGraphed(denoiser) if device.type == "cuda" else denoiser


def calibration_sampling(recipe: Recipe, scheduler_config: Mapping[str, Any] | None) -> Sampling:
    """Return how a recipe samples a model with this scheduler config, with the name of a sampler."""
    sampling = Sampling(recipe.sampler, recipe.steps, recipe.guidance)
    return resolved(sampling, scheduler_config, calibration=True)


def time_groups(steps: Schedule, recipe: Recipe) -> TimeGroups:
    """Return the time groups of a recipe for a calibration that samples with `steps`."""
    return groups_over(steps.time_range, steps.timesteps, recipe.groups, recipe.time_edges)


def _check_finite(x: torch.Tensor, t: torch.Tensor) -> None:
    """Raise `InputError` naming the first timestep, in the order of sampling, whose state has NaN or Inf."""
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        raise InputError(
            f"the float model's own sampling has NaN or Inf values in the state at timestep {t[bad].max().item():g}; "
            "it cannot be calibrated with this scheduler and these settings"
        )


def draws_in_bf16(device: torch.device) -> bool:
    """On GPUs, and on CPUs with AVX-512 BF16; others would be slower than in fp32."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


class InBfloat16(nn.Module):
    """A model as it would run if loaded in bf16, its output in fp32: to draw states, nothing more.

    Rounding moves the states a little; what is measured at them, the operands and their Fisher weights, stays fp32.
    With published settings most of the arithmetic is here. Under autocast the residual stream and the norms would stay
    fp32, twice the bytes.
    """

    def __init__(self, module: nn.Module) -> None:
        """`module`: a plain model on one device, which stays as it is."""
        super().__init__()
        in_bf16 = {id(p): nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in module.parameters()}
        self.module = copy.deepcopy(module, in_bf16)  # takes these for copies already made: none is made in fp32

    @property
    def config(self) -> Any:
        return self.module.config

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False, **condition: Any
    ) -> tuple[torch.Tensor]:
        """As diffusers' model with `return_dict=False`. The timestep stays as it is: the model embeds it in fp32."""
        inputs = trees.mapped(lambda x: x.bfloat16() if x.is_floating_point() else x, condition)
        output = self.module(hidden_states.bfloat16(), timestep=timestep, **inputs, return_dict=False)[0]
        return (output.float(),)


def _ordered(
    found: dict[str, torch.Tensor],
    labels: torch.Tensor,
    groups: TimeGroups,
    steps: Schedule,
    conditions: Conditions,
    measured: Sensitivity | None = None,
) -> CalibrationSet:
    """The states of all trajectories by (timestep, trajectory)."""
    pairs = list(zip(found["t"].tolist(), found["trajectory"].tolist(), strict=True))
    order = torch.tensor(sorted(range(len(pairs)), key=pairs.__getitem__))
    t = found["t"][order]
    chosen = labels[found["trajectory"][order]]
    image = None if measured is None else measured.weights(t, groups)
    return CalibrationSet(
        found["x"][order], t, chosen, groups.index(t), steps.weights(t), conditions,
        time_groups=groups, image_weight=image,
    )  # fmt: skip


def _num_trajectories(recipe: Recipe, groups: TimeGroups, visited: torch.Tensor, conditions: int) -> int:
    """How many samplings to run: every group needs `samples` distinct (trajectory, timestep) pairs.

    Unless the recipe says, as few as cover the conditions as far as `samples` go, but no fewer than a quarter of them.
    """
    counts = torch.bincount(groups.index(visited), minlength=groups.num_groups)
    fewest = int(counts.min())
    if fewest == 0:
        raise InputError(
            f"{recipe.steps} steps visit no timestep of time group {int(counts.argmin())} of {groups.num_groups}; "
            "use more steps or fewer groups"
        )
    needed = math.ceil(recipe.samples / fewest)
    if recipe.trajectories is None:
        return max(needed, math.ceil(recipe.samples / 4), min(conditions, recipe.samples))
    if not needed <= recipe.trajectories <= recipe.samples:
        raise InputError(
            f"trajectories must be between {needed} and {recipe.samples} for {recipe.samples} samples per group "
            f"and {recipe.steps} steps, got {recipe.trajectories}"
        )
    return recipe.trajectories


def _pick_timesteps(recipe: Recipe, groups: TimeGroups, visited: torch.Tensor, count: int) -> list[set[float]]:
    """For every trajectory, the timesteps to keep: samples/count of each group, drawn without replacement."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    group = groups.index(visited)
    picks: list[set[float]] = [set() for _ in range(count)]
    for g in range(groups.num_groups):
        members = visited[group == g]
        for i, chosen in enumerate(picks):
            share = recipe.samples // count + (i < recipe.samples % count)
            order = torch.randperm(len(members), generator=generator)[:share]
            chosen.update(members[order].tolist())
    return picks
