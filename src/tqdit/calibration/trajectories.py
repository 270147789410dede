"""Calibration data from the model's own sampling: n samples (x_t, t, class) per time group (TGQ)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.models.sampler import (
    Progress,
    Sampling,
    make_scheduler,
    noise_generators,
    num_classes,
    step_weights,
    trajectory,
)
from tqdit.recipe import Recipe
from tqdit.timegroups import TimeGroups

CALIBRATION_STREAM = 250_000  # noise streams start here: images i < 250,000 of the same seed have other noise


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of the float model's trajectories, ordered by group. x: (S, C, H, W) fp32; t, labels, group: (S,).

    `step_weight` (S,): how much an error of epsilon at t moves the sampler's next state, see `sampler.step_weights`.
    """

    x: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    group: torch.Tensor
    step_weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.t)


def collect(
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    recipe: Recipe,
    progress: Progress = lambda _: None,
    batch: int = 16,
) -> CalibrationSet:
    """Run `trajectories` guided samplings and keep `samples` states per time group, at random visited timesteps.

    Seeded by the recipe: each trajectory has a generator of its own, so `batch` changes nothing but speed. Raises
    `InputError` if the sampler visits too few timesteps of a group.
    """
    sampling = Sampling(recipe.sampler, recipe.steps, recipe.guidance)
    scheduler = make_scheduler(scheduler_config, sampling, learned_variance=False)
    groups = TimeGroups(scheduler.config.num_train_timesteps, recipe.groups)
    visited = scheduler.timesteps
    count = _num_trajectories(recipe, groups, visited, num_classes(model))
    picks = _pick_timesteps(recipe, groups, visited, count)

    order = torch.randperm(num_classes(model), generator=torch.Generator().manual_seed(recipe.seed))
    labels = order.repeat(math.ceil(count / len(order)))[:count].to(next(model.parameters()).device)
    found: list[tuple[int, int, torch.Tensor]] = []  # (t, trajectory, x_t)
    for start in range(0, count, batch):
        members = range(start, min(start + batch, count))
        streams = range(CALIBRATION_STREAM + start, CALIBRATION_STREAM + members.stop)
        generators = noise_generators(recipe.seed, streams)
        states = trajectory(model, scheduler_config, sampling, labels[start : members.stop], generators)
        for step, (t, x) in enumerate(states):
            if t is not None:  # the last state is an image, which no timestep sees
                found += [(t, i, x[i - start].cpu()) for i in members if t in picks[i]]
                progress((start + len(members) * (step + 1) / recipe.steps) / count)
    found.sort(key=lambda item: item[:2])
    timesteps = torch.tensor([t for t, _, _ in found])
    return CalibrationSet(
        x=torch.stack([x for _, _, x in found]),
        t=timesteps,
        labels=labels.cpu()[torch.tensor([i for _, i, _ in found])],
        group=groups.of(timesteps),
        step_weight=step_weights(scheduler)[timesteps],
    )


def _num_trajectories(recipe: Recipe, groups: TimeGroups, visited: torch.Tensor, classes: int) -> int:
    """How many samplings to run: every group needs `samples` distinct (trajectory, timestep) pairs.

    Unless the recipe says, as few as cover the classes as far as `samples` go, but no fewer than a quarter of them.
    """
    counts = torch.bincount(groups.of(visited), minlength=groups.num_groups)
    fewest = int(counts.min())
    if fewest == 0:
        raise InputError(
            f"{recipe.steps} steps visit no timestep of time group {int(counts.argmin())} of {groups.num_groups}; "
            "use more steps or fewer groups"
        )
    needed = math.ceil(recipe.samples / fewest)
    if recipe.trajectories is None:
        return max(needed, math.ceil(recipe.samples / 4), min(classes, recipe.samples))
    if not needed <= recipe.trajectories <= recipe.samples:
        raise InputError(
            f"trajectories must be between {needed} and {recipe.samples} for {recipe.samples} samples per group "
            f"and {recipe.steps} steps, got {recipe.trajectories}"
        )
    return recipe.trajectories


def _pick_timesteps(recipe: Recipe, groups: TimeGroups, visited: torch.Tensor, count: int) -> list[set[int]]:
    """For every trajectory, the timesteps to keep: samples/count of each group, drawn without replacement."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    group = groups.of(visited)
    picks: list[set[int]] = [set() for _ in range(count)]
    for g in range(groups.num_groups):
        members = visited[group == g]
        for i, chosen in enumerate(picks):
            share = recipe.samples // count + (i < recipe.samples % count)
            order = torch.randperm(len(members), generator=generator)[:share]
            chosen.update(members[order].tolist())
    return picks
