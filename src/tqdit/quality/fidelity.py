"""Compare a quantized model's epsilon with the float model's, on held-out states of the float trajectories."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from tqdit.architectures.registry import conditions, config_of
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.quality.metrics import sqnr_db
from tqdit.system.distributed import batches, current
from tqdit.timegroups import TimeGroups


@dataclass(frozen=True)
class EpsilonFidelity:
    """The SQNR in dB: over all samples, per time group, and (t, SQNR) of every sample.

    A time group without a sample has NaN.
    """

    overall: float
    by_group: list[float]
    by_timestep: list[tuple[float, float]]


def predict_epsilon(model: nn.Module, data: CalibrationSet, batch: int = 16) -> torch.Tensor:
    """Return the conditional epsilon at every state of `data`, (S, C, H, W), fp32 on the CPU.

    Ranks share the batches.
    """
    world, members = current(), batches(len(data), batch)
    parts = [_predict(model, data, slice(share.start, share.stop)) for share in world.share(members)]
    return torch.cat(world.gather(parts, len(members)))


@torch.inference_mode()
def _predict(model: nn.Module, data: CalibrationSet, states: slice) -> torch.Tensor:
    device = next(iter(model.buffers())).device
    x, t, labels = (part[states].to(device) for part in (data.x, data.t, data.labels))
    inputs = (data.conditions or conditions(config_of(model))).rows(labels)
    return model(x, timestep=t, **inputs, return_dict=False)[0][:, : x.shape[1]].float().cpu()


def compare_epsilon(
    reference: torch.Tensor, actual: torch.Tensor, data: CalibrationSet, time_groups: TimeGroups | None = None
) -> EpsilonFidelity:
    """Compare two `predict_epsilon` results over the same `data`.

    The groups are `time_groups`, or by default those of `data`.
    """
    group = data.group if time_groups is None else time_groups.index(data.t)
    count = int(data.group.max()) + 1 if time_groups is None else time_groups.num_groups
    groups = [group == g for g in range(count)]
    singles = [(t, sqnr_db(r, a)) for t, r, a in zip(data.t.tolist(), reference, actual, strict=True)]
    return EpsilonFidelity(
        overall=sqnr_db(reference, actual),
        by_group=[sqnr_db(reference[m], actual[m]) if m.any() else math.nan for m in groups],
        by_timestep=sorted(singles),
    )
