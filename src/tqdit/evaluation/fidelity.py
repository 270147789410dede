"""Error of a quantized model's epsilon against the float model's, on held-out states of the float trajectories."""

from dataclasses import dataclass

import torch
from torch import nn

from tqdit.calibration.trajectories import CalibrationSet
from tqdit.evaluation.metrics import sqnr_db


@dataclass(frozen=True)
class EpsilonFidelity:
    """SQNR in dB: over all samples, per time group, and (t, SQNR) of every sample."""

    overall: float
    by_group: list[float]
    by_timestep: list[tuple[int, float]]


@torch.inference_mode()
def predict_epsilon(model: nn.Module, data: CalibrationSet, batch: int = 16) -> torch.Tensor:
    """Conditional epsilon at every state of `data`: (S, C, H, W), fp32 on the CPU."""
    device = next(iter(model.buffers())).device
    channels = data.x.shape[1]
    parts = []
    for start in range(0, len(data), batch):
        x, t, labels = (part[start : start + batch].to(device) for part in (data.x, data.t, data.labels))
        parts.append(model(x, timestep=t, class_labels=labels, return_dict=False)[0][:, :channels].float().cpu())
    return torch.cat(parts)


def compare_epsilon(reference: torch.Tensor, actual: torch.Tensor, data: CalibrationSet) -> EpsilonFidelity:
    """Compare two `predict_epsilon` results over the same `data`."""
    groups = [data.group == g for g in range(int(data.group.max()) + 1)]
    singles = [(int(t), sqnr_db(r, a)) for t, r, a in zip(data.t, reference, actual, strict=True)]
    return EpsilonFidelity(
        overall=sqnr_db(reference, actual),
        by_group=[sqnr_db(reference[members], actual[members]) for members in groups],
        by_timestep=sorted(singles),
    )
