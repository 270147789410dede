"""`TimestepClock`: tells the quantized layers of one model which time group each sample of the batch is in."""

import threading
from typing import Any

import torch
from torch import nn

from tqdit.timegroups import TimeGroups


class PerThread(threading.local):
    """What the call of one thread has set: calls of one model may overlap. It goes when the thread ends.

    A copy of it, or a pickle, is empty.
    """

    group: torch.Tensor | None = None
    shared: int | None = None
    call: Any = None

    def __reduce__(self) -> tuple[type["PerThread"], tuple[()]]:
        return PerThread, ()


class TimestepClock(nn.Module):
    """Set once per denoiser call of the model that owns it; read by every grouped site.

    The lookup stays on the device: no host sync, no recompilation over timesteps. On the CPU a timestep outside
    [0, T) is an `InputError`; on a GPU the lookup itself asserts. Under torch.compile no value is read on the host, so
    such a timestep ends in the `RuntimeError` of the compiled lookup.
    """

    table: torch.Tensor

    def __init__(self, time_groups: TimeGroups) -> None:
        super().__init__()
        self.time_groups = time_groups
        self.register_buffer("table", time_groups.index(torch.arange(int(time_groups.high))), persistent=False)
        self._now = PerThread()

    @property
    def group(self) -> torch.Tensor | None:
        """Group indices of the call that this thread is in, (1,) or (B,)."""
        return self._now.group

    @property
    def shared(self) -> int | None:
        """The group of the whole batch, where reading it costs nothing: on the CPU, not compiled."""
        return self._now.shared

    def set(self, timestep: torch.Tensor) -> None:
        """Store the group indices, (1,) or (B,), of a timestep () or (B,); `Inputs` has checked its shape."""
        t = torch.as_tensor(timestep, device=self.table.device).reshape(-1)
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            group = self.time_groups.index(t)
            first, last = group.aminmax()
            shared = int(first) if first == last else None
        else:
            group, shared = torch.index_select(self.table, 0, t.long()), None
        self._now.group, self._now.shared = group, shared

    def forget(self) -> None:
        """Drop what this thread has set; its next call sets it again."""
        self._now.group = self._now.shared = None
