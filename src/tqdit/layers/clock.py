"""`TimestepClock`: tells the quantized layers of one model which time group each sample of the batch is in."""

from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.timegroups import TimeGroups


class TimestepClock(nn.Module):
    """Set once per denoiser call by a hook on the model that owns it; read by every grouped site.

    The lookup stays on the device: no host sync, no recompilation over timesteps. On the CPU a timestep outside
    [0, T) is an `InputError`; on a GPU the lookup itself asserts.
    """

    table: torch.Tensor

    def __init__(self, time_groups: TimeGroups) -> None:
        super().__init__()
        self.time_groups = time_groups
        self.register_buffer("table", time_groups.table(), persistent=False)
        self.group: torch.Tensor | None = None
        self.shared: int | None = None  # the group of the whole batch, where reading it costs nothing (on the CPU)

    def set(self, timestep: torch.Tensor, batch: int) -> None:
        """timestep: () or (B,), any number type. Stores group indices, shape (1,) or (B,)."""
        t = torch.as_tensor(timestep, device=self.table.device).reshape(-1)
        if t.numel() not in (1, batch):
            raise InputError(f"timestep has {t.numel()} entries for a batch of {batch}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            self.group = self.time_groups.of(t)
            first, last = self.group.aminmax()
            self.shared = int(first) if first == last else None
        else:
            self.shared = None
            self.group = torch.index_select(self.table, 0, t.long())

    def pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a transformer called as (hidden_states, timestep, ...)."""
        hidden = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1] if len(args) > 1 else None
        if timestep is None:
            raise InputError("a time-grouped model needs `timestep`")
        self.set(timestep, hidden.shape[0])
