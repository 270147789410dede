"""Measure the cost of running a model: time of a denoiser call and memory, next to eager float32."""

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tqdit.speed.baselines import DenoiserCall
from tqdit.speed.memory_probe import Footprint, footprint
from tqdit.speed.timing import interleaved, spread_timesteps

WARM_UP = 2  # calls: the first may compile, the second may record a CUDA graph
REPEATS = 7
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """Median milliseconds of a denoiser call, and bytes above the imports as in `memory_probe.Footprint`.

    `float32_ms`: the same of the float model in eager float32, in the same rounds. Bytes are None where they could not
    be measured.
    """

    ms_per_call: float
    float32_ms: float
    peak_bytes: int | None = None
    resident_bytes: int | None = None

    @property
    def speedup(self) -> float:
        """Return how many times as fast as eager float32 the model is."""
        return self.float32_ms / self.ms_per_call


def timed(
    float_model: nn.Module,
    models: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    batch: int,
    timesteps: int,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Cost]:
    """Time warm calls of the float model and of others with `batch` samples, in interleaved rounds; by name.

    All are on one device; memory is not measured. `timesteps`: the number of training timesteps, over which the calls
    are spread.
    """
    device = next(iter(float_model.buffers())).device
    calls = [DenoiserCall(module, config, batch, device) for module in (float_model, *models.values())]
    for call in calls:
        for t in spread_timesteps(WARM_UP, timesteps):
            call(t)
    rounds = spread_timesteps(REPEATS, timesteps)
    found = interleaved({str(i): _at(call, rounds) for i, call in enumerate(calls)}, REPEATS, progress)
    float32, *others = (statistics.median(times) for times in found.values())
    return {name: Cost(ms, float32) for name, ms in zip(models, others, strict=True)}


def memory(
    config: Mapping[str, Any], batch: int, device: torch.device, folder: str | None, dtype: str = "float32"
) -> Footprint | None:
    """Measure the memory of the artifact in `folder`, or of a float32 model of that config, in a process of its own.

    Returns None if that process fails, for too little memory for instance; the reason is logged.
    """
    what = {"baseline": "float32-eager"} if folder is None else {"artifact": folder, "backend": "auto", "dtype": dtype}
    request = {"config": dict(config), "batch": batch, "device": str(device), "threads": torch.get_num_threads()}
    try:
        return footprint({**request, **what})
    except RuntimeError as error:
        LOG.warning("memory of %s could not be measured: %s", folder or "the float model", error)
        return None


def _at(call: DenoiserCall, rounds: list[int]) -> Callable[[int], object]:
    return lambda number: call(rounds[number])
