"""Keep the time groups of the call that a model is in, for layers that diffusers calls with their inputs alone."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from tqdit.layers.call import Call, GroupLookup
from tqdit.timegroups import TimeGroups


class Clock(nn.Module):
    """The time groups of the call that a model is in.

    diffusers' own code calls its layers with their inputs alone, so the groups cannot travel as an argument. A model
    with time groups therefore runs one call at a time: other threads wait. A model on the grid of rows alone has none,
    and reads no clock.
    """

    def __init__(self, groups: TimeGroups) -> None:
        super().__init__()
        self.lookup = GroupLookup(groups)
        self._forget_call()

    def _forget_call(self) -> None:
        self.call: Call | None = None  # not a part of the module, but of the call it is in
        self.lock = threading.RLock()  # held by that call

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("call", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_call()

    def during(self, timestep: Any) -> AbstractContextManager[Any]:
        """Set the groups of a call; return a context that keeps other threads' calls out until it ends.

        A graph of torch.compile has the groups as data of its own, so no call waits there.
        """
        if torch.compiler.is_compiling():
            self.set(timestep)
            return nullcontext()
        return self._alone(timestep)

    @contextmanager
    def _alone(self, timestep: Any) -> Iterator[None]:
        with self.lock:
            self.set(timestep)
            yield

    def set(self, timestep: Any) -> None:
        """Look up the groups of a call's timestep: a number, (), (B,) or, with a time for each token, (B, N).

        The largest time of a sample decides its group.
        """
        t = torch.as_tensor(timestep)
        t = t.reshape(1) if t.ndim == 0 else t.flatten(1).amax(1) if t.ndim > 1 else t
        self.call = Call(*self.lookup(t))
