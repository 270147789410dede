"""The timestep -> group formula (trap 2): one, exact, for every sampler, step count and unit of time."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tqdit.errors import InputError
from tqdit.layers.call import GroupLookup
from tqdit.timegroups import MAX_EDGES, TimeGroups


def group_by_definition(t: int, T: int, G: int) -> int:
    """The i - 1 of the set G_i = {t : (i-1) T/G <= t < i T/G} that holds t, in whole numbers."""
    return next(i - 1 for i in range(1, G + 1) if (i - 1) * T <= t * G < i * T)


# Whole timesteps -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 1200), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_formula_is_the_set_definition(T: int, G: int) -> None:
    assume(G <= T)
    table = TimeGroups.uniform(0, T, G).index(torch.arange(T)).tolist()
    assert table == [group_by_definition(t, T, G) for t in range(T)]


@pytest.mark.parametrize("T", [1, 2, 7, 10, 999, 1000, 1001, 4000])
def test_every_timestep_and_its_fractions_are_those_of_the_former_formula(T: int) -> None:
    """floor(floor(t) G / T), for every t and a few numbers above it."""
    t = torch.arange(T)
    above = torch.cat([t.double(), t + 0.5, torch.nextafter(t.double() + 1, t.double())])
    for G in {1, 2, 3, 4, 7, 10, 25, T // 3, T - 1, T} & set(range(1, T + 1)):
        groups = TimeGroups.uniform(0, T, G)
        assert torch.equal(groups.index(t), t * G // T)
        assert torch.equal(groups.index(above), torch.floor(above).long() * G // T)


@given(st.integers(1, 1200), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_bounds_are_where_the_index_changes(T: int, G: int) -> None:
    assume(G <= T)
    groups = TimeGroups.uniform(0, T, G)
    table = groups.index(torch.arange(T)).tolist()
    for g in range(G):
        first, end = groups.bounds(g)
        assert [t for t in range(T) if table[t] == g] == list(range(int(first), int(end)))


def test_published_setting() -> None:
    groups = TimeGroups.uniform(0, 1000, 10)
    t = torch.tensor([[0, 99], [100, 999]])
    assert groups.index(t).tolist() == [[0, 0], [1, 9]]
    assert groups == TimeGroups(tuple(range(100, 1000, 100)), 0, 1000)
    assert (groups.num_groups, groups.num_timesteps) == (10, 1000)
    assert groups.summary == "10 of 1000 training timesteps"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_any_shape_and_type(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = TimeGroups.uniform(0, 1000, 10).index(torch.full(shape, 128, dtype=dtype))
    assert found.shape == shape
    assert found.dtype is torch.int64
    assert (found == 1).all()


def test_fractional_timesteps_are_floored() -> None:
    """The last timestep below 1000 is legal; -0.5 is in no group, so it must not be taken for 0."""
    groups = TimeGroups.uniform(0, 1000, 10)
    found = groups.index(torch.tensor([99.9, 100.0, 0.5, 999.99]))
    assert found.tolist() == [0, 1, 0, 9]
    for outside in (-0.5, 1000.0, math.nan, math.inf):
        with pytest.raises(InputError, match=rf"timestep {outside} is outside \[0, 1000\)"):
            groups.index(torch.tensor([5.0, outside]))


@pytest.mark.parametrize("t", [-1, 1000, 10**6, 2**62])
def test_timestep_outside_the_range_is_an_error(t: int) -> None:
    with pytest.raises(InputError, match=rf"timestep {t} is outside \[0, 1000\)"):
        TimeGroups.uniform(0, 1000, 10).index(torch.tensor([5, t]))


@pytest.mark.parametrize(
    ("T", "G", "message"),
    [
        (10, 11, "groups must be between 1 and 10, the number of timesteps in"),
        (10, 0, "groups must"), (10, 2.0, "groups must"), (10, True, "groups must"),
        (10**6, MAX_EDGES + 2, "groups must be between 1 and 10001, got 10002"),
        (0, 1, "low must be less than high"), (10**7, 1, "high must be between -1000000 and 1000000"),
    ],
)  # fmt: skip
def test_impossible_groups_are_an_error(T: int, G: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TimeGroups.uniform(0, T, G)


# Any units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "closed"), [(0.0, 1.0, True), (0, 1000, True), (-1.0, 2.5, False)])
def test_uniform_groups_of_real_timesteps_are_equally_long(low: float, high: float, closed: bool) -> None:
    groups = TimeGroups.uniform(low, high, 4, closed)
    assert groups.num_groups == 4
    assert groups.num_timesteps is None
    lengths = [end - first for first, end in map(groups.bounds, range(4))]
    assert lengths == pytest.approx([(high - low) / 4] * 4)
    assert groups.index(torch.tensor([low, *groups.edges], dtype=torch.float64)).tolist() == [0, 1, 2, 3]


def test_only_a_closed_range_has_its_end() -> None:
    end = torch.tensor(1.0)
    assert int(TimeGroups.uniform(0.0, 1.0, 10, closed=True).index(end)) == 9
    assert TimeGroups.uniform(0.0, 1.0, 10, closed=True).summary == "10 in [0, 1]"
    with pytest.raises(InputError, match=r"timestep 1.0 is outside \[0, 1\)"):
        TimeGroups.uniform(0.0, 1.0, 10).index(end)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_no_group_of_visited_timesteps_is_empty(timesteps: list[float], G: int) -> None:
    groups = TimeGroups.visited(timesteps, G, 0.0, 1.0, closed=True)
    distinct = sorted(set(timesteps))
    assert groups.num_groups == min(G, len(distinct))
    counts = torch.bincount(groups.index(torch.tensor(distinct, dtype=torch.float64)), minlength=groups.num_groups)
    assert len(counts) == groups.num_groups
    assert counts.max() - counts.min() <= 1
    assert counts.min() >= 1


def test_visited_groups_are_cut_at_midpoints_whatever_the_order() -> None:
    t = [900.0, 100.0, 600.0, 200.0, 900.0]
    assert TimeGroups.visited(t, 2, 0, 1000).edges == (400.0,)
    assert TimeGroups.visited(torch.tensor(t), 9, 0, 1000).edges == (150.0, 400.0, 750.0)


def test_neighbouring_numbers_are_separated() -> None:
    """Nothing is between them: the edge is the larger one, which then is in the second group."""
    first = 0.3
    second = math.nextafter(first, 1)
    groups = TimeGroups.visited([first, second], 2, 0.0, 1.0)
    assert groups.index(torch.tensor([first, second], dtype=torch.float64)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("timesteps", "G", "message"),
    [([], 2, "at least one timestep"), ([1.5], 2, r"1.5 is outside \[0, 1\)"), ([math.nan], 2, "nan is outside"),
     ([0.5], 0, "groups must be at least 1, got 0")],
)  # fmt: skip
def test_impossible_visits_are_an_error(timesteps: list[float], G: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TimeGroups.visited(timesteps, G, 0.0, 1.0)


@pytest.mark.parametrize(
    ("edges", "low", "high", "closed", "message"),
    [
        ((0.5, 0.5), 0, 1, False, "edges must increase strictly inside"),
        ((0.0,), 0, 1, False, "got 0.0 after 0.0"),
        ((1.0,), 0, 1, False, "got 1.0 after 0.0"),
        ((1.5,), 0, 1, True, "got 1.5 after 0.0"),
        ((math.nan,), 0, 1, False, "an edge must be a finite number, got nan"),
        ((True,), 0, 2, False, "an edge must be a finite number, got True"),
        ((), 0, math.inf, False, "high must be a finite number"),
        ((), "0", 1, False, "low must be a finite number, got '0'"),
        ((), 1, 0, False, "low must be less than high"),
        ((), 0, 1, 1, "closed must be true or false, got 1"),
        (tuple(range(1, MAX_EDGES + 2)), 0, 10**6, False, "10000 edges"),
    ],
)
def test_impossible_edges_are_an_error(edges: tuple, low: float, high: float, closed: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TimeGroups(edges, low, high, closed)


# Everywhere the same -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [20, 50, 250, 1000])
def test_calibration_and_inference_agree_on_every_visited_timestep(scheduler, spacing: str, steps: int) -> None:
    groups = TimeGroups.uniform(0, 1000, 10)
    schedule = scheduler(timestep_spacing=spacing)
    schedule.set_timesteps(steps)
    expected = [group_by_definition(int(t), 1000, 10) for t in schedule.timesteps]
    assert (
        GroupLookup(groups)(schedule.timesteps).group.tolist() == groups.index(schedule.timesteps).tolist() == expected
    )
    on_device = torch.bucketize(schedule.timesteps.double(), groups.edges_tensor(), right=True)
    assert on_device.tolist() == expected
