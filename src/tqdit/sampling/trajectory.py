"""One sampling run, state by state. Calibration reads the states on the way, generation keeps the last."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from tqdit.sampling.guidance import Conditions, Sampling, arguments, default_conditions, predict
from tqdit.sampling.schedules import schedule

Progress = Callable[[float], None]  # called with the finished fraction of a stage


def noise_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per image, seeded by (seed, index) alone: sharding and batch size change nothing."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63) for index in indices]


@torch.inference_mode()
def trajectory(
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    sampling: Sampling,
    labels: torch.Tensor,
    generators: list[torch.Generator],
    conditions: Conditions | None = None,
) -> Iterator[tuple[float | None, torch.Tensor]]:
    """Yield (t, x_t) before every step of a sampling run, then (None, x_0). x: (B, C, H, W), fp32.

    `labels`: int64 (B,), indices into `conditions`, which are the model's classes if not given. The initial state and
    the noise of each image come from that image's own generator. t is in the units of the model's `timestep`.
    """
    config = cast(Mapping[str, Any], model.config)
    steps = schedule(scheduler_config, sampling, config)
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    x = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(labels.device)
    condition, null = arguments(conditions or default_conditions(config), labels, sampling.guidance)
    for i, t in enumerate(steps.timesteps.tolist()):
        yield t, x
        time = torch.full((len(x),), t, device=x.device)
        x = steps.step(predict(model, x, time, condition, null, sampling.guidance), i, x, generators)
    yield None, x
