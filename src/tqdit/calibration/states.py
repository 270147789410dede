"""`CalibrationSet`: the states that a model is calibrated on, of its own sampling or of a user's pipeline."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.errors import InputError
from tqdit.sampling.guidance import AUTO, ClassLabels, Conditions, Sample, Sampling, conditions_sha256
from tqdit.sampling.prompts import read_conditions
from tqdit.sampling.schedules import Schedule, schedule, scheduler_config
from tqdit.timegroups import TimeGroups

TIME_EDGES = ("uniform", "visited")


@dataclass(frozen=True, init=False)
class CalibrationSet:
    """States x_t of a denoiser's inputs, ordered by time group.

        CalibrationSet(latents, timesteps, classes, scheduler=pipe.scheduler, groups=recipe.groups)

    x: (S, C, H, W) fp32; t (S,): timesteps in the units of the model's `timestep`, int64 or fp32; labels (S,) int64:
    indices into `conditions`, which are the model's own classes if not given. What is not given is made:
    group (S,): the time group of each state, by `time_groups`. These are `groups` ranges of the timesteps of
    `scheduler` (one of diffusers, or its config), or of 1000 timesteps without one. The ranges are equal, or have about
    equally many of the timesteps in t where `time_edges` is "visited".
    step_weight (S,): how much an error of the output at t moves the sampler's next state (see `Schedule.weights`);
    without a scheduler all weigh the same. A scheduler whose shift depends on the size of the model's images needs the
    float `model`.
    image_weight (S,): how much an error of the output at t moves the image at the end of the sampling, fp32 (see
    `sensitivity.Sensitivity.weights`). It is measured for states that the package draws by a recipe whose `hessian` is
    "image" (`calibration_states`). A set that is made without it has `step_weight` in its place. Such a recipe then
    weighs errors by the sampler's steps instead of by the image.
    The tensors may be of other dtypes and on any device: they are copied to the CPU.
    Raises `InputError` for shapes that do not fit, for a timestep outside the range, for a `group` that is not that of
    the timestep, and for labels that are no conditions.
    """

    x: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    group: torch.Tensor
    step_weight: torch.Tensor
    image_weight: torch.Tensor
    conditions: Conditions | None
    time_groups: TimeGroups

    def __init__(  # noqa: PLR0913 - its fields, and what they are made of
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        group: torch.Tensor | None = None,
        step_weight: torch.Tensor | None = None,
        conditions: Conditions | str | Path | None = None,
        *,
        time_groups: TimeGroups | None = None,
        scheduler: Any = None,
        model: nn.Module | None = None,
        groups: int = 10,
        time_edges: str = "uniform",
        image_weight: torch.Tensor | None = None,
    ) -> None:
        _check_tensors(x=x, t=t, labels=labels, group=group, step_weight=step_weight, image_weight=image_weight)
        x, t, labels = x.detach().float().cpu(), t.detach().cpu(), labels.cpu().long()
        conditions = read_conditions(conditions)
        if conditions is not None:
            check_labels(labels, conditions)
        steps = None if scheduler is None else _one_step(scheduler_config(scheduler), model, x)
        if time_groups is None:
            time_groups = groups_over(steps.time_range if steps else (0, 1000, False), t, groups, time_edges)
        expected = time_groups.index(t)
        group = expected if group is None else group.detach().cpu().long()
        if bool((wrong := group != expected).any()):
            i = int(wrong.nonzero()[0])
            raise InputError(
                f"calibration states: state {i} is in time group {group[i].item()}, its timestep {t[i].item()} is in "
                f"group {expected[i].item()}"
            )
        if step_weight is None:
            step_weight = steps.weights(t) if steps else torch.ones(len(t))
        image_weight = step_weight.clone() if image_weight is None else image_weight.detach().float().cpu()
        weights = {"step_weight": step_weight, "image_weight": image_weight}
        tensors = {"x": x, "t": t, "labels": labels, "group": group, **weights}
        if bool((group.diff() < 0).any()):
            order = group.argsort(stable=True)
            tensors = {name: tensor[order] for name, tensor in tensors.items()}
        for name, value in {**tensors, "conditions": conditions, "time_groups": time_groups}.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def __len__(self) -> int:
        return len(self.t)


def groups_over(time_range: tuple[float, float, bool], visited: torch.Tensor, groups: int, edges: str) -> TimeGroups:
    """Return the time groups of a recipe's settings `groups` and `time_edges` for a sampling that visits timesteps.

    `time_range`: that of a `Schedule`.
    """
    low, high, closed = time_range
    if edges not in TIME_EDGES:
        raise InputError(f"time_edges must be one of {', '.join(TIME_EDGES)}, got {edges!r:.80}")
    if edges == "visited":
        return TimeGroups.visited(visited, groups, low, high, closed)
    return TimeGroups.uniform(low, high, groups, closed)


def check_labels(labels: torch.Tensor, conditions: Conditions) -> None:
    """Raise `InputError` naming a label that is the index of no condition; a class may be the null class."""
    count = conditions.count + isinstance(conditions, ClassLabels)
    wrong = labels[(labels < 0) | (labels >= count)]
    if len(wrong):
        raise InputError(f"label {wrong[0].item()} is none of the {conditions.count} conditions")


def states_sha256(states: CalibrationSet) -> str:
    """The hash of a calibration set in an artifact's provenance; classes are known by their labels alone."""
    digest = hashlib.sha256()
    for tensor in (states.x, states.t, states.labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    if not isinstance(states.conditions, ClassLabels | None):
        digest.update(conditions_sha256(states.conditions).encode())
    return digest.hexdigest()


def _check_tensors(x: Any, **others: Any) -> None:
    """Raise `InputError` naming the first tensor that is of another type or shape than `CalibrationSet` says."""
    given = {name: tensor for name, tensor in others.items() if tensor is not None or name in ("t", "labels")}
    for name, tensor in {"x": x, **given}.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"calibration states: {name} must be a tensor, got {type(tensor).__name__}")
    if x.ndim != 4 or not len(x):
        raise InputError(f"calibration states x must have the shape (S, C, H, W), got {tuple(x.shape)}")
    for name, tensor in given.items():
        if tuple(tensor.shape) != (len(x),):
            raise InputError(f"calibration states: {name} must have the shape ({len(x)},), got {tuple(tensor.shape)}")
    if given["labels"].is_floating_point():
        raise InputError(f"calibration states: labels must be integers, got {given['labels'].dtype}")


def _one_step(scheduler: Mapping[str, Any], model: nn.Module | None, x: torch.Tensor) -> Schedule:
    """Return a schedule of the scheduler's family, whose number of steps neither weights nor the range depend on."""
    if model is not None:
        return schedule(scheduler, Sampling(AUTO, 1), registry.sample(registry.config_of(model)))
    if scheduler.get("use_dynamic_shifting"):
        raise InputError("calibration states: the scheduler's use_dynamic_shifting needs the model")
    _, channels, height, width = x.shape
    return schedule(scheduler, Sampling(AUTO, 1), Sample((channels, height, width), channels, height * width))
