"""Judge a choice of scales by the weighted squared error of one matmul's output.

The weights are the Fisher diagonal (HO), with what an error at the timestep does to the image, or none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tqdit.calibration.fisher import normalized

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class MatmulObjective:
    """The error E = sum_j w_j (z_hat_j - z_j)^2 for z = combine(a, b).

    `weights` None: plain squared error (no HO).
    """

    combine: Combine
    target: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def weighted(
        cls, combine: Combine, a: torch.Tensor, b: torch.Tensor, fisher: torch.Tensor | None
    ) -> "MatmulObjective":
        """Return the objective of the float operands.

        Fisher weights that are None or all zero mean plain squared error.
        """
        return cls(combine, combine(a, b), None if fisher is None else normalized(fisher))

    def loss(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the elementwise loss, in the shape of the output."""
        error = self.combine(a, b).sub_(self.target).square_()
        return error if self.weights is None else error.mul_(self.weights)


def within_groups(fisher: torch.Tensor, group: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Return Fisher weights (R, ...) with the mean 1 inside each time group; a group of zeros gets ones.

    `group`: (R,). So weights say which errors inside a group count, and not which group does. `counts`: 0 where an
    error never counts, as at masked keys, and else 1; it broadcasts to `fisher`, and a group of zeros gets it.
    """
    per_row = fisher.flatten(1).double().mean(1)
    members = (torch.arange(int(group.max()) + 1, device=group.device)[:, None] == group).double()
    means = (members @ per_row) / members.sum(1).clamp(min=1)
    mean = means[group].reshape(-1, *(1,) * (fisher.ndim - 1)).float()
    sound = torch.isfinite(mean) & (mean > 0)
    alike = torch.ones_like(fisher) if counts is None else counts.to(fisher)
    return torch.where(sound, fisher / torch.where(sound, mean, 1), alike)


def row_weights(outputs: torch.Tensor) -> torch.Tensor:
    """Return weights (R,) with which errors of each row of outputs (R, out) count relative to the row itself.

    Some tokens of a transformer have outputs 10,000 times as large as others, and norms make them alike afterwards. A
    row that is smaller than a tenth of the median counts as one of that size.
    """
    power = outputs.square().mean(1)
    floor = 0.1 * power.median()
    return torch.where(floor > 0, 1 / (power + floor), torch.ones_like(power))


def sqnr_db(target: torch.Tensor, found: torch.Tensor) -> float:
    """Return 10 log10 of the power of `target` (R, out) over that of its error in dB; inf for equal tensors.

    Each row counts relative to its own power, as `row_weights` says.
    """
    weights = row_weights(target).double()
    signal, error = (x.square().sum(1).double() @ weights for x in (target, found - target))
    return float(10 * torch.log10(signal / error)) if error > 0 else math.inf


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return x W^T."""
    return x @ w.t()


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return Q K^T / sqrt(d)."""
    return (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)


def values(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return P V."""
    return p @ v
