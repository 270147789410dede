"""`TimestepClock`: tells the quantized layers of one model which time group each sample of the batch is in."""

import threading

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.timegroups import TimeGroups


def thread() -> int:
    """Which thread runs; one for all inside a compiled graph."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class TimestepClock(nn.Module):
    """Set once per denoiser call of the model that owns it; read by every grouped site.

    The lookup stays on the device: no host sync, no recompilation over timesteps. On the CPU a timestep outside
    [0, T) is an `InputError`; on a GPU the lookup itself asserts.
    """

    table: torch.Tensor

    def __init__(self, time_groups: TimeGroups) -> None:
        super().__init__()
        self.time_groups = time_groups
        self.register_buffer("table", time_groups.table(), persistent=False)
        self._now: dict[int, tuple[torch.Tensor, int | None]] = {}  # by thread: calls of one model may overlap

    @property
    def group(self) -> torch.Tensor | None:
        """Group indices of the call that this thread is in, (1,) or (B,)."""
        return self._now[thread()][0] if thread() in self._now else None

    @property
    def shared(self) -> int | None:
        """The group of the whole batch, where reading it costs nothing: on the CPU, not compiled."""
        return self._now[thread()][1] if thread() in self._now else None

    def set(self, timestep: torch.Tensor, batch: int) -> None:
        """timestep: () or (B,), any number type. Stores group indices, shape (1,) or (B,)."""
        t = torch.as_tensor(timestep, device=self.table.device).reshape(-1)
        if t.numel() not in (1, batch):
            raise InputError(f"timestep has {t.numel()} entries for a batch of {batch}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            group = self.time_groups.of(t)
            first, last = group.aminmax()
            shared = int(first) if first == last else None
        else:
            group, shared = torch.index_select(self.table, 0, t.long()), None
        self._now[thread()] = self._now[0] = group, shared

    def forget(self) -> None:
        """Drop what this thread has set; its next call sets it again."""
        self._now.pop(thread(), None)
        self._now.pop(0, None)
