"""`Call`: the data that one denoiser call shares among its blocks.

Nothing about a call is kept in modules or by thread.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tqdit.ops.holders import FixedDtype
from tqdit.timegroups import TimeGroups


@dataclass(frozen=True)
class Call:
    """The part of a call that every architecture has; an architecture's own subclass adds its conditioning.

    `group`: int64 (1,) or (B,), the time group of each sample. `shared`: the group of the whole batch, where reading it
    costs nothing: on the CPU, not compiled.
    """

    group: torch.Tensor
    shared: int | None


class Group(NamedTuple):
    """The time groups of a batch; its fields are those of `Call`."""

    group: torch.Tensor
    shared: int | None


class GroupLookup(FixedDtype):
    """A module that looks up the time groups of a call, on the device of the timesteps.

    There is no host synchronisation and no recompilation over timesteps. On the CPU a timestep outside the range of the
    time groups is an `InputError`. On a GPU and under torch.compile no value is read, and such a timestep is in the
    first or the last group. In a model with a table of whole timesteps the sample then is NaN, or under torch.compile
    and with torch's own operations the look-up fails.
    """

    edges: torch.Tensor  # fp64

    def __init__(self, time_groups: TimeGroups) -> None:
        super().__init__()
        self.time_groups = time_groups
        self.keep("edges", time_groups.edges_tensor(), persistent=False)

    def forward(self, timestep: torch.Tensor) -> Group:
        """Return the groups of a timestep (1,) or (B,)."""
        if timestep.is_cpu and not torch.compiler.is_compiling():
            group = self.time_groups.index(timestep)
            first, last = group.aminmax()
            return Group(group, int(first) if first == last else None)
        return Group(torch.bucketize(timestep.double(), self.edges, right=True), None)
