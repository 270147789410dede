"""The diffusion process that DDIM and DDPM sample, by diffusers' own schedulers."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.sampling.guidance import Sample, Sampling
from tqdit.timegroups import MAX_TIMESTEPS

PREDICTIONS = ("epsilon", "sample", "v_prediction")
# diffusers' classes whose models were trained by the discrete diffusion process that DDIM and DDPM sample from: a
# config of any of them says the same betas, timesteps and kind of prediction.
SERVED = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
    "SASolverScheduler",
)  # fmt: skip
PROCESS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
DITS_BETAS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon",
}  # fmt: skip
# What the classes that need another package take for a setting that a config leaves out. Without the package (scipy,
# torchsde) diffusers has only a stand-in of such a class, which says no defaults.
OPTIONAL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LMSDiscreteScheduler": DITS_BETAS,
    "SASolverScheduler": DITS_BETAS,
    "DPMSolverSDEScheduler": DITS_BETAS | {"beta_start": 0.00085, "beta_end": 0.012},
}
DISCRETE = {"use_flow_sigmas": False, "timestep_type": "discrete"}  # settings that would change the process, as served
MOST_OVER_MEDIAN = 16  # how often the median a step weight of epsilon may be


def check(config: Mapping[str, Any]) -> None:
    """Raise `InputError` for settings of a scheduler config that DDIM and DDPM cannot serve."""
    for key, served in DISCRETE.items():
        if config.get(key, served) != served:
            raise InputError(f"{key} is {config[key]!r}; supported is {served!r}")
    if (kept := config.get("prediction_type", PREDICTIONS[0])) not in PREDICTIONS:
        raise InputError(f"prediction_type is {kept!r}; supported are {', '.join(PREDICTIONS)}")
    total = config.get("num_train_timesteps", 1000)
    if type(total) is not int or not 1 <= total <= MAX_TIMESTEPS:
        raise InputError(f"num_train_timesteps is {total!r}; it must be a whole number from 1 to {MAX_TIMESTEPS}")


class Diffusion:
    """A `Schedule` of DDIM or DDPM steps."""

    def __init__(self, scheduler: Any, learned_variance: bool) -> None:
        """`scheduler`: of `make_scheduler`, for a model whose output has a learned variance or not."""
        from diffusers import DDPMScheduler

        self.scheduler = scheduler
        self.timesteps = scheduler.timesteps
        self.time_range: tuple[float, float, bool] = (0, int(scheduler.config.num_train_timesteps), False)
        self._draws_noise = isinstance(scheduler, DDPMScheduler)
        self._learned_variance = learned_variance

    @classmethod
    def for_model(cls, config: Mapping[str, Any], sampling: Sampling, sample: Sample) -> "Diffusion":
        """Return the schedule for a scheduler config. Raises `InputError` as `schedule` does."""
        learned = sample.learned_variance
        return cls(make_scheduler(config, sampling, learned), learned)

    def step(self, output: torch.Tensor, i: int, x: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """As `Schedule.step`. DDIM has no noise and leaves a learned variance out."""
        t = int(self.timesteps[i])
        if not self._draws_noise:
            return self.scheduler.step(output[:, : x.shape[1]], t, x).prev_sample
        output = output if self._learned_variance else output[:, : x.shape[1]]
        return self.scheduler.step(output, t, x, generator=generators).prev_sample

    def clean(self, output: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """Return the clean image as `Schedule.clean` does, without a scheduler's clipping.

        With a the cumulative alpha at t:

        epsilon   (x - sqrt(1 - a) output) / sqrt(a)
        v         sqrt(a) x - sqrt(1 - a) output
        sample    output
        """
        output, alpha = output[:, : x.shape[1]], float(self.scheduler.alphas_cumprod[int(self.timesteps[i])])
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return output
        return signal * x - noise * output if kind == "v_prediction" else (x - noise * output) / signal

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """As `Schedule.weights`, of whole timesteps."""
        return step_weights(self.scheduler)[t]


def make_scheduler(config: Mapping[str, Any] | None, sampling: Sampling, learned_variance: bool) -> Any:
    """A diffusers DDIM or DDPM scheduler with its timesteps set.

    `config`: the model's scheduler config; None is DiT's 1000 linear steps. With DDPM a model that returns (eps, v)
    gets `variance_type="learned_range"`, so that v is used; one that does not gets a fixed variance.
    Raises `InputError` for more steps than timesteps, and naming the config for settings that `check` or diffusers
    refuses, and for betas that no process can have.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    kind = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampling.sampler]
    settings = _process_settings(config or {})
    settings.setdefault("clip_sample", False)
    if sampling.sampler == "ddpm":
        fixed = str(settings.get("variance_type") or "fixed_small")
        fixed = "fixed_small" if fixed.startswith("learned") else fixed
        settings["variance_type"] = "learned_range" if learned_variance else fixed
    try:
        scheduler = kind.from_config(settings)
        total = int(scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(min(sampling.steps, total))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"scheduler_config.json: diffusers refuses it: {reason}") from None
    if sampling.steps > total:
        raise InputError(f"steps must be at most the {total} training timesteps, got {sampling.steps}")
    first, last = int(scheduler.timesteps.max()), int(scheduler.timesteps.min())
    if first >= total or last < 0:
        raise InputError(
            f"scheduler_config.json: steps_offset {scheduler.config.steps_offset} puts {sampling.steps} steps at "
            f"timesteps {first} to {last}, the model has {total - 1} to 0; take fewer steps or another steps_offset"
        )
    _check_alphas(scheduler)
    return scheduler


def _process_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checked scheduler config that says every setting of its process: classes differ in their defaults.

    diffusers' note of what was a default is left out, by which another class would take its own instead.
    """
    try:
        check(config)
    except InputError as error:
        raise InputError(f"scheduler_config.json: {error}") from None
    defaults = _defaults(config.get("_class_name", SERVED[0]))
    return defaults | {key: value for key, value in config.items() if key != "_use_default_values"}


def _defaults(name: str) -> dict[str, Any]:
    """The settings of its process that a class of diffusers has where a config says none."""
    import diffusers

    if name in OPTIONAL_DEFAULTS:  # the same with and without the package
        return dict(OPTIONAL_DEFAULTS[name])
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {setting: parameters[setting].default for setting in PROCESS if setting in parameters}


def _check_alphas(scheduler: Any) -> None:
    """Raise `InputError` for betas of no process, or a cumulative alpha where the prediction would be divided by 0.

    Only the first beta may be 0: after it, noise is added at every timestep. Then t = 0 has nothing but image, and a
    prediction of the image says nothing of the noise there.
    """
    total = int(scheduler.config.num_train_timesteps)
    if scheduler.betas.shape != (total,):
        raise InputError(
            f"scheduler_config.json: it has {scheduler.betas.numel()} betas for {total} training timesteps"
        )
    if not bool(((scheduler.betas >= 0) & (scheduler.betas <= 1)).all()):
        raise InputError("scheduler_config.json: it has betas that are not between 0 and 1")
    if bool((scheduler.betas[min(1, total - 1) :] == 0).any()):
        raise InputError("scheduler_config.json: it has betas of 0 after the first timestep")
    if scheduler.config.prediction_type == "sample" and bool(scheduler.betas[0] == 0):
        raise InputError(
            "scheduler_config.json: its first beta is 0, where a prediction of the image says nothing of the noise; "
            "prediction_type must be epsilon or v_prediction"
        )
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    if scheduler.config.prediction_type == "epsilon" and bool((alphas == 0).any()):
        last = int(scheduler.timesteps.max())
        cause = " (rescale_betas_zero_snr makes it so)" if scheduler.config.rescale_betas_zero_snr else ""
        raise InputError(
            f"scheduler_config.json: nothing of the image is left at timestep {last}{cause}, "
            "where a prediction of epsilon says nothing; prediction_type must be v_prediction or sample"
        )


def step_weights(scheduler: Any, steps: int = 50) -> torch.Tensor:
    """How much an error of the prediction at t moves the next state of a `steps`-step DDIM run, squared: (T,).

    The largest weight is 1. The factor is the derivative of the next state by the prediction (DDIM, eta = 0), with a
    the cumulative alpha at t and a' that of the next timestep:

        epsilon   sqrt(1 - a') - sqrt(a' / a) sqrt(1 - a)
        v         sqrt(1 - a') sqrt(a) - sqrt(a') sqrt(1 - a)
        sample    sqrt(a') - sqrt(1 - a') sqrt(a / (1 - a))

    Only the factor of epsilon has no bound: it grows as 1 / sqrt(a) where almost nothing of the image is left. The
    image itself is bounded, so there a weight is at most `MOST_OVER_MEDIAN` times the median of all.
    """
    alpha = scheduler.alphas_cumprod.double()
    stride = max(1, len(alpha) // steps)
    last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    following = torch.cat([alpha.new_full((stride,), last), alpha[:-stride]])
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    next_signal, next_noise = following.sqrt(), (1 - following).sqrt()
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        factor = next_noise * signal - next_signal * noise
    elif kind == "sample":
        factor = next_signal - next_noise * signal / noise
    else:
        factor = next_noise - next_signal / signal * noise
    weights = factor.square()
    if kind == "epsilon":
        weights = weights.clamp(max=MOST_OVER_MEDIAN * weights.median())
    return (weights / weights.max()).float()
