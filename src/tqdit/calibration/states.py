"""`CalibrationSet`: the states that a model is calibrated on, of its own sampling or of a user's pipeline."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.sampling.sampler import Sampling, make_scheduler, step_weights
from tqdit.timegroups import TimeGroups


@dataclass(frozen=True, init=False)
class CalibrationSet:
    """States x_t of a denoiser's inputs, ordered by time group.

        CalibrationSet(latents, timesteps, classes, scheduler=pipe.scheduler.config, groups=10)

    x: (S, C, H, W) fp32; t, labels: (S,) int64, the timesteps and the classes. What is not given is made:
    group (S,): the time group of each state, by `time_groups`, which are `groups` equal ranges of the timesteps of
    `scheduler` (a diffusers config), or of 1000. step_weight (S,): how much an error of the prediction at t moves the
    sampler's next state (see `sampler.step_weights`); without a scheduler all weigh the same.
    All tensors are on the CPU. Raises `InputError` for shapes that do not fit, and for a timestep outside the range.
    """

    x: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    group: torch.Tensor
    step_weight: torch.Tensor
    time_groups: TimeGroups

    def __init__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        group: torch.Tensor | None = None,
        step_weight: torch.Tensor | None = None,
        *,
        time_groups: TimeGroups | None = None,
        scheduler: Mapping[str, Any] | None = None,
        groups: int = 10,
    ) -> None:
        _check_lengths(x, t, labels, group, step_weight)
        if time_groups is None:
            time_groups = TimeGroups.uniform(0, int((scheduler or {}).get("num_train_timesteps", 1000)), groups)
        group = time_groups.index(t) if group is None else group
        step_weight = _weights(scheduler, t) if step_weight is None else step_weight
        tensors = {"x": x, "t": t, "labels": labels, "group": group, "step_weight": step_weight}
        if bool((group.diff() < 0).any()):
            order = group.argsort(stable=True)
            tensors = {name: tensor[order] for name, tensor in tensors.items()}
        for name, value in {**tensors, "time_groups": time_groups}.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def __len__(self) -> int:
        return len(self.t)


def states_sha256(states: CalibrationSet) -> str:
    """The hash of a calibration set in an artifact's provenance."""
    digest = hashlib.sha256()
    for tensor in (states.x, states.t, states.labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_lengths(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    if x.ndim != 4 or not len(x):
        raise InputError(f"calibration states x must have the shape (S, C, H, W), got {tuple(x.shape)}")
    for name, tensor in zip(("t", "labels", "group", "step_weight"), others, strict=True):
        if tensor is not None and tuple(tensor.shape) != (len(x),):
            raise InputError(f"calibration states: {name} must have the shape ({len(x)},), got {tuple(tensor.shape)}")


def _weights(scheduler: Mapping[str, Any] | None, t: torch.Tensor) -> torch.Tensor:
    """The step weight of every timestep, (S,) fp32."""
    if scheduler is None:
        return torch.ones(len(t))
    return step_weights(make_scheduler(scheduler, Sampling("ddim", 1), learned_variance=False))[t.long()]
