"""The timestep -> group formula (trap 2): one, exact, for every sampler and step count."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tqdit.errors import InputError
from tqdit.layers.clock import TimestepClock
from tqdit.timegroups import TimeGroups


def group_by_definition(t: int, T: int, G: int) -> int:
    """The i - 1 of the set G_i = {t : (i-1) T/G <= t < i T/G} that holds t, in whole numbers."""
    return next(i - 1 for i in range(1, G + 1) if (i - 1) * T <= t * G < i * T)


@given(st.integers(1, 1200), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_formula_is_the_set_definition(T: int, G: int) -> None:
    assume(G <= T)
    table = TimeGroups(T, G).table().tolist()
    assert table == [group_by_definition(t, T, G) for t in range(T)]


@given(st.integers(1, 1200), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_bounds_are_where_the_table_changes(T: int, G: int) -> None:
    assume(G <= T)
    groups = TimeGroups(T, G)
    table = groups.table().tolist()
    for g in range(G):
        first, end = groups.bounds(g)
        assert [t for t in range(T) if table[t] == g] == list(range(first, end))


def test_published_setting() -> None:
    groups = TimeGroups(1000, 10)
    t = torch.tensor([[0, 99], [100, 999]])
    assert groups.of(t).tolist() == [[0, 0], [1, 9]]
    assert TimeGroups() == groups


def test_fractional_timesteps_are_floored() -> None:
    """The last timestep below 1000 is legal; -0.5 is in no group, so it must not be taken for 0."""
    groups = TimeGroups(1000, 10)
    found = groups.of(torch.tensor([99.9, 100.0, 0.5, 999.99]))
    assert found.tolist() == [0, 1, 0, 9]
    assert found.dtype is torch.int64
    for outside in (-0.5, 1000.0):
        with pytest.raises(InputError, match="outside"):
            groups.of(torch.tensor([5.0, outside]))


@pytest.mark.parametrize("t", [-1, 1000, 10**6])
def test_timestep_outside_the_range_is_an_error(t: int) -> None:
    with pytest.raises(InputError, match=rf"{t} is outside \[0, 1000\)"):
        TimeGroups(1000, 10).of(torch.tensor([5, t]))


@pytest.mark.parametrize(("T", "G", "word"), [(10, 11, "groups"), (10, 0, "groups"), (0, 1, "num_timesteps")])
def test_impossible_groups_are_an_error(T: int, G: int, word: str) -> None:
    with pytest.raises(InputError, match=word):
        TimeGroups(T, G)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [20, 50, 250, 1000])
def test_calibration_and_inference_agree_on_every_visited_timestep(scheduler, spacing: str, steps: int) -> None:
    groups = TimeGroups(1000, 10)
    schedule = scheduler(timestep_spacing=spacing)
    schedule.set_timesteps(steps)
    clock = TimestepClock(groups)
    clock.set(schedule.timesteps)
    expected = [group_by_definition(int(t), 1000, 10) for t in schedule.timesteps]
    assert clock.group.tolist() == groups.of(schedule.timesteps).tolist() == expected
    assert torch.index_select(clock.table, 0, schedule.timesteps).tolist() == expected  # the lookup of a GPU
