"""Flow matching, sampled with Euler steps by diffusers' own scheduler.

A state is x = (1 - sigma) data + sigma noise, the model's output is the velocity v = noise - data, and its timestep is
sigma times the number of training timesteps: 1000 is noise, 0 is data.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tqdit.errors import InputError
from tqdit.sampling.guidance import Sample, Sampling
from tqdit.timegroups import MAX_TIMESTEPS

# Models of both classes were trained by the same process; a Heun config has no more than `shift`.
SERVED = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
PLAIN = {"invert_sigmas": False, "stochastic_sampling": False}  # settings that would change the process, as served
SHIFTS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
WEIGHT_STEPS = 50  # the run whose step sizes are the weights


def check(config: Mapping[str, Any]) -> None:
    """Raise `InputError` for settings of a scheduler config that change the process, and for wrong numbers of steps."""
    for key, served in PLAIN.items():
        if config.get(key, served) != served:
            raise InputError(f"{key} is {config[key]!r}; supported is {served!r}")
    total = config.get("num_train_timesteps", 1000)
    if type(total) is not int or not 2 <= total <= MAX_TIMESTEPS:
        raise InputError(f"num_train_timesteps is {total!r}; it must be a whole number from 2 to {MAX_TIMESTEPS}")


class FlowMatching:
    """A `Schedule` of Euler steps x + (sigma_next - sigma) v."""

    def __init__(self, scheduler: Any, weight_sigmas: torch.Tensor) -> None:
        """`scheduler`: diffusers', with its timesteps set; `weight_sigmas`: fp32, decreasing to 0, of another run."""
        self.scheduler = scheduler
        self.timesteps = scheduler.timesteps
        self.time_range = (0.0, float(scheduler.config.num_train_timesteps), True)
        self._sigmas = weight_sigmas
        scheduler.set_begin_index(0)  # steps are counted, not looked up by their timestep

    @classmethod
    def for_model(cls, config: Mapping[str, Any], sampling: Sampling, sample: Sample) -> "FlowMatching":
        """Return the schedule for a scheduler config. Raises `InputError` as `schedule` does."""
        total = config.get("num_train_timesteps", 1000)
        try:
            check(config)
            mu = _dynamic_shift(config, sample.tokens) if config.get("use_dynamic_shifting") else None
            weighing = _scheduler(config, min(WEIGHT_STEPS, total), mu)
            if sampling.steps <= total:
                return cls(_scheduler(config, sampling.steps, mu), weighing.sigmas)
        except InputError as error:
            raise InputError(f"scheduler_config.json: {error}") from None
        raise InputError(f"steps must be at most the {total} training timesteps, got {sampling.steps}")

    def step(self, output: torch.Tensor, i: int, x: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """As `Schedule.step`. The step has no noise; channels beyond those of x are left out."""
        return self.scheduler.step(output[:, : x.shape[1]], self.timesteps[i], x).prev_sample

    def clean(self, output: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """Return the clean image as `Schedule.clean` does: x - sigma output."""
        return x - float(self.scheduler.sigmas[i]) * output[:, : x.shape[1]]

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """As `Schedule.weights`: (sigma_next - sigma)^2 of a run of `WEIGHT_STEPS` steps.

        Between the timesteps of that run the step size is interpolated; at sigma = 0 it is 0.
        """
        sigmas = self._sigmas.double().flip(0).numpy()  # 0 first
        sizes = np.diff(sigmas, prepend=0.0)  # of the step that begins at each sigma
        at = t.double().numpy() / self.time_range[1]
        return torch.from_numpy(np.interp(at, sigmas, sizes / sizes.max()) ** 2).float()


def _scheduler(config: Mapping[str, Any], steps: int, mu: float | None) -> Any:
    """Return diffusers' Euler scheduler with `steps` timesteps set."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    settings = {key: value for key, value in config.items() if key != "_use_default_values"}
    try:
        with np.errstate(all="ignore"):  # sigmas that are no numbers are refused below
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings)
            scheduler.set_timesteps(steps, mu=mu)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"diffusers refuses it: {reason}") from None
    sigmas = scheduler.sigmas
    if not (bool((sigmas.diff() < 0).all()) and abs(float(sigmas[0]) - 1) < 1e-4):
        raise InputError(f"its {steps} sigmas do not fall from 1, which is noise, to 0")
    return scheduler


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift mu for the model's number of tokens: a line through (base tokens, base) and (max tokens, max).

    Source: the pipelines of diffusers that set timesteps with `mu`.
    """
    defaults = dict(zip(SHIFTS, (0.5, 1.15, 256, 4096), strict=True))
    values = {name: config.get(name, default) for name, default in defaults.items()}
    for name, value in values.items():
        if type(value) not in (int, float):
            raise InputError(f"{name} is {value!r}; use_dynamic_shifting needs a number")
    base, most, base_tokens, most_tokens = values.values()
    if base_tokens == most_tokens:
        raise InputError(f"base_image_seq_len and max_image_seq_len are both {base_tokens}; they must differ")
    return float(base + (most - base) * (tokens - base_tokens) / (most_tokens - base_tokens))
