"""The schedule of a sampling run, chosen by the class of the model's own scheduler."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tqdit.errors import InputError
from tqdit.sampling import diffusion, flow
from tqdit.sampling.guidance import AUTO, Sample, Sampling


class Schedule(Protocol):
    """The steps of one sampling run, to be taken in order.

    Noise becomes an image by `step(output, i, x, generators)` for i = 0, 1, ... Every timestep is in the units of the
    model's own `timestep` argument.
    """

    timesteps: torch.Tensor  # (steps,) on the CPU, int64 or fp32, decreasing
    time_range: tuple[float, float, bool]  # low, high, and whether high is a timestep; ints where all are whole

    def step(self, output: torch.Tensor, i: int, x: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Return the state after `x`, given the model's output at timestep i. x: (B, C, H, W).

        `output` has C channels, or 2C with a learned variance. Each image's noise is from its own generator.
        """

    def clean(self, output: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """Return the x_0 that the model's output at timestep i predicts from the state x: (B, C, H, W)."""

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """Return how much an error of the output at the timesteps t moves the next state, squared: fp32, shaped as t.

        The largest weight of all timesteps is 1. The weights do not depend on the number of steps.
        """


@dataclass(frozen=True)
class Family:
    """The scheduler classes of one process, and the samplers that serve all of them."""

    classes: tuple[str, ...]
    samplers: tuple[str, ...]
    drawing: str  # the sampler of images where none is named
    calibration: str  # the sampler of calibration states where none is named
    closed: bool  # whether the number of training timesteps is a timestep too
    check: Callable[[Mapping[str, Any]], None]  # raises `InputError` for settings that are not served
    make: Callable[[Mapping[str, Any], Sampling, Sample], Schedule]


FAMILIES = (
    Family(diffusion.SERVED, ("ddim", "ddpm"), "ddim", "ddpm", False, diffusion.check, diffusion.Diffusion.for_model),
    Family(flow.SERVED, ("flow",), "flow", "flow", True, flow.check, flow.FlowMatching.for_model),
)


def family(config: Mapping[str, Any] | None) -> Family:
    """Return the family of a scheduler config; one without a class is a `DDIMScheduler`.

    Raises `InputError` naming the class that none serves.
    """
    name = (config or {}).get("_class_name", diffusion.SERVED[0])
    for found in FAMILIES:
        if name in found.classes:
            return found
    served = ", ".join(served for found in FAMILIES for served in found.classes)
    raise InputError(f"scheduler class {name!r} is not supported; supported are {served}")


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise `InputError` unless a scheduler config is of a class and of settings that a sampler serves."""
    family(config).check(config)


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return the config of a diffusers scheduler, or a config itself, as JSON values.

    The scheduler's own `config` may lack its class. Raises `InputError` for what is neither, and for a scheduler that
    no sampler serves.
    """
    if hasattr(scheduler, "to_json_string"):
        config = json.loads(scheduler.to_json_string())
    elif isinstance(scheduler, Mapping):
        config = dict(scheduler)
    else:
        raise InputError(f"a scheduler is one of diffusers or its config, got {type(scheduler).__name__}")
    check_scheduler(config)
    return config


def resolved(sampling: Sampling, config: Mapping[str, Any] | None, calibration: bool = False) -> Sampling:
    """Return the sampling with the sampler that "auto" means for a scheduler config.

    Raises `InputError` for a sampler that does not sample the process of the model's scheduler.
    """
    found = family(config)
    if sampling.sampler == AUTO:
        return replace(sampling, sampler=found.calibration if calibration else found.drawing)
    if sampling.sampler not in found.samplers:
        name = (config or {}).get("_class_name", diffusion.SERVED[0])
        legal = ", ".join((AUTO, *found.samplers))
        raise InputError(f"sampler '{sampling.sampler}' does not suit the model's {name}; legal are {legal}")
    return sampling


def schedule(config: Mapping[str, Any] | None, sampling: Sampling, sample: Sample) -> Schedule:
    """Return the schedule of a sampling run of a model.

    `config`: the model's scheduler config; None is 1000 steps of linear betas. `sample` decides what the model's output
    holds and how far a schedule is shifted.
    Raises `InputError` naming the config for a class or settings that no sampler serves, and naming the sampler that
    does not suit the class.
    """
    settings = config or {}
    try:
        family(settings)
    except InputError as error:
        raise InputError(f"scheduler_config.json: {error}") from None
    return family(settings).make(settings, resolved(sampling, settings), sample)
