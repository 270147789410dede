"""The timestep clock: one per model, set by every call."""

import pytest
import torch
from tqdit.layers.clock import TimestepClock

from tqdit.errors import InputError
from tqdit.timegroups import TimeGroups


@pytest.mark.parametrize(
    ("timestep", "group"),
    [
        (torch.tensor([0, 250, 999]), [0, 1, 3]),
        (torch.tensor(700), [2]),
        (torch.tensor([700]), [2]),
        (700, [2]),
        (torch.tensor([249.9, 250.0, 250.1]), [0, 1, 1]),
        (torch.tensor([0, 250, 999], dtype=torch.int32), [0, 1, 3]),
    ],
)
def test_groups_of_the_batch(clock: TimestepClock, timestep, group: list[int]) -> None:
    clock.set(timestep)
    assert clock.group.tolist() == group


@pytest.mark.parametrize("timestep", [-1, 1000, torch.tensor([0, 1, 5000])])
def test_timestep_outside_is_an_error(clock: TimestepClock, timestep) -> None:
    with pytest.raises(InputError, match="outside"):
        clock.set(timestep)


def test_clocks_are_independent() -> None:
    coarse, fine = TimestepClock(TimeGroups.uniform(0, 1000, 2)), TimestepClock(TimeGroups.uniform(0, 1000, 10))
    coarse.set(999)
    fine.set(0)
    assert (coarse.group.item(), fine.group.item()) == (1, 0)


def test_table_is_not_part_of_the_checkpoint(clock: TimestepClock) -> None:
    assert not clock.state_dict()
