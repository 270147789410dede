"""Time groups of TGQ: the only place that maps a training timestep to a group."""

from dataclasses import dataclass

import torch

from tqdit.errors import InputError

MAX_TIMESTEPS = 10**6  # a model has a table of all of them


@dataclass(frozen=True)
class TimeGroups:
    """G equal groups of the training timesteps [0, T): G_i = {t : (i-1)T/G <= t < iT/G} (TQ-DiT, TGQ).

    Groups are numbered from 0. The mapping is on training timesteps, so it is the same for every sampler,
    step count and for batches whose samples are at different timesteps.
    """

    num_timesteps: int = 1000
    num_groups: int = 10

    def __post_init__(self) -> None:
        for name in ("num_timesteps", "num_groups"):
            if type(getattr(self, name)) is not int:
                raise InputError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not 1 <= self.num_timesteps <= MAX_TIMESTEPS:
            raise InputError(f"num_timesteps must be between 1 and {MAX_TIMESTEPS}, got {self.num_timesteps}")
        if not 1 <= self.num_groups <= self.num_timesteps:
            raise InputError(
                f"groups must be between 1 and the {self.num_timesteps} training timesteps, got {self.num_groups}"
            )

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """Group index of each training timestep; any shape, int64. Fractional timesteps are floored.

        Raises `InputError` for a timestep outside [0, T). Reads values, so it is for host code; modules use
        `table()`, which stays on the device.
        """
        t = t if t.is_floating_point() else t.long()
        outside = t[~((t >= 0) & (t < self.num_timesteps))]  # NaN among them
        if outside.numel():
            raise InputError(f"timestep {outside[0].item()} is outside [0, {self.num_timesteps})")
        t = torch.floor(t).long()
        return t * self.num_groups // self.num_timesteps

    def table(self) -> torch.Tensor:
        """Lookup table, shape (T,), int64: table[t] is the group of t."""
        return self.of(torch.arange(self.num_timesteps))

    def bounds(self, group: int) -> tuple[int, int]:
        """First and one-past-last timestep of a group."""
        first = -(-group * self.num_timesteps // self.num_groups)
        return first, -(-(group + 1) * self.num_timesteps // self.num_groups)
