"""One sampling run, state by state. Calibration reads the states on the way, generation keeps the last."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tqdit.sampling.guidance import Conditions, Sample, Sampling, arguments, joined, predict_joined
from tqdit.sampling.schedules import schedule

Progress = Callable[[float], None]  # called with the finished fraction of a stage
Watch = Callable[[int, torch.Tensor], None]  # called with a step's index and the image that the model sees there


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
    conditions: Conditions,
    sample: Sample,
    watch: Watch | None = None,
) -> Iterator[tuple[float | None, torch.Tensor]]:
    """Yield (t, x_t) before every step of a sampling run, then (None, x_0). x: (B, C, H, W), fp32.

    `labels`: int64 (B,), indices into `conditions`. The initial state and the noise of each image come from the
    image's own generator. t is in the units of the model's `timestep`. `watch` is told `Schedule.clean` of every
    model output; it changes no state.
    """
    steps = schedule(scheduler_config, sampling, sample)
    noise = [torch.randn((1, *sample.shape), generator=generator) for generator in generators]
    x = torch.cat(noise).to(labels.device)
    with torch.inference_mode(False), torch.no_grad():  # an integer model knows the same prompt by its version
        guidance = sampling.guidance
        inputs = joined(*arguments(conditions, labels.clone(), guidance), guidance)
    for i, t in enumerate(steps.timesteps.tolist()):
        yield t, x
        time = torch.full((len(x),), t, device=x.device)
        output = predict_joined(model, x, time, inputs, guidance)
        if watch is not None:
            watch(i, steps.clean(output, i, x))
        x = steps.step(output, i, x, generators)
    yield None, x
