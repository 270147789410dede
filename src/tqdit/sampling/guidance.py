"""The conditions that a model is sampled under, classifier-free guidance, and the settings of a sampling run."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.system import trees

AUTO = "auto"  # the sampler that suits the model's own scheduler
SAMPLERS = (AUTO, "ddim", "ddpm", "flow")


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: `steps` sampler steps and classifier-free `guidance`, which 1 turns off.

    The sampler "auto" is DDIM for a diffusion model and Euler ("flow") for a flow-matching one.
    Raises `InputError` naming the setting that is not legal.
    """

    sampler: str = AUTO
    steps: int = 50
    guidance: float = 1.5

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise InputError(f"unknown sampler '{self.sampler}'; known: {', '.join(SAMPLERS)}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, Integral):
            raise InputError(f"steps must be a whole number of at least 1, got {self.steps!r:.80}")
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, Real):
            raise InputError(f"guidance must be a finite number from 0, got {self.guidance!r:.80}")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"guidance must be a finite number from 0, got {self.guidance}")


class Conditions(Protocol):
    """What a model can be asked for: `count` conditions, each known by its index, and the unconditional one.

    Both methods return keyword arguments of the model. Their leaves are tensors with a row for each sample, constants,
    or dictionaries of such. The two agree in everything but the number of rows.
    """

    @property
    def count(self) -> int:
        """The number of conditions."""

    def rows(self, indices: torch.Tensor) -> dict[str, Any]:
        """Return the arguments for these conditions, on the device of `indices`, which are int64 (B,)."""

    def null(self, count: int, device: torch.device) -> dict[str, Any]:
        """Return the arguments for `count` unconditional samples."""


@dataclass(frozen=True)
class ClassLabels:
    """The classes of a DiT. The number of classes is also the index of the null class in the label table."""

    num_classes: int

    @property
    def count(self) -> int:
        return self.num_classes

    def rows(self, indices: torch.Tensor) -> dict[str, Any]:
        return {"class_labels": indices}

    def null(self, count: int, device: torch.device) -> dict[str, Any]:
        return {"class_labels": torch.full((count,), self.num_classes, device=device)}


def conditions_sha256(conditions: Conditions) -> str:
    """Return the sha256 over the names and values of all conditions and the unconditional one."""
    digest = hashlib.sha256()
    cpu = torch.device("cpu")
    for inputs in (conditions.rows(torch.arange(conditions.count)), conditions.null(1, cpu)):
        for path, value in sorted(trees.flatten(inputs).items()):
            digest.update(repr((path, None if isinstance(value, torch.Tensor) else value)).encode())
            if isinstance(value, torch.Tensor):
                digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Sample:
    """What a sampling run has to know of a model beside its schedule.

    `shape`: (C, H, W) of one sample. `output_channels`: C, or 2 C with a learned variance. `tokens`: those of a sample,
    by which some schedules are shifted.
    """

    shape: tuple[int, int, int]
    output_channels: int
    tokens: int

    @property
    def learned_variance(self) -> bool:
        """Whether the model's output has a variance behind its prediction."""
        return self.output_channels == 2 * self.shape[0]


def arguments(
    conditions: Conditions, indices: torch.Tensor, guidance: float
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return `condition` and `null` of `predict` for the conditions `indices`, int64 (B,), on their device."""
    null = None if guidance == 1.0 else conditions.null(len(indices), indices.device)
    return conditions.rows(indices), null


def predict(
    model: nn.Module,
    x: torch.Tensor,
    t: torch.Tensor,
    condition: Mapping[str, Any],
    null: Mapping[str, Any] | None,
    guidance: float,
) -> torch.Tensor:
    """Return the output that the sampler uses, (B, C or 2C, H, W).

    Its first C channels are guided: uncond + guidance * (cond - uncond). The others, a learned variance, are those of
    the conditional half. x: (B, C, H, W); t: (B,). `condition` and `null`: keyword arguments of the model with B rows;
    a guidance of 1 needs no `null` and runs the conditional half alone.
    """
    return predict_joined(model, x, t, joined(condition, null, guidance), guidance)


def joined(condition: Mapping[str, Any], null: Mapping[str, Any] | None, guidance: float) -> Mapping[str, Any]:
    """Return the arguments of one call of a model: those of `condition`, then, with guidance, those of `null`."""
    if guidance == 1.0:
        return condition
    if null is None:
        raise ValueError(f"a guidance of {guidance} needs the unconditional arguments")
    both: Mapping[str, Any] = trees.mapped(lambda *halves: torch.cat(halves), condition, null)
    return both


def predict_joined(
    model: nn.Module, x: torch.Tensor, t: torch.Tensor, both: Mapping[str, Any], guidance: float
) -> torch.Tensor:
    """Return what `predict` does, for arguments that are `joined` once for all steps of a sampling run."""
    if guidance == 1.0:
        return model(x, timestep=t, **both, return_dict=False)[0]
    out = model(torch.cat([x, x]), timestep=torch.cat([t, t]), **both, return_dict=False)[0]
    cond, uncond = out.chunk(2)
    channels = x.shape[1]
    guided = torch.lerp(uncond[:, :channels], cond[:, :channels], guidance)
    return torch.cat([guided, cond[:, channels:]], dim=1)
