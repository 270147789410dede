"""Streaming ranges against the ranges of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqdit.calibration.statistics import RangeStats


def direct(x: torch.Tensor, group: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value per (group, unit) of (B, H, N, C)."""
    low = torch.stack([x[group == g].amin((0, 2, 3)) for g in range(groups)])
    high = torch.stack([x[group == g].amax((0, 2, 3)) for g in range(groups)])
    return low, high


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_update_and_merge_equal_the_whole(parts: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(12) % groups
    x = torch.randn(12, 2, 5, 3, generator=generator)
    order = torch.randperm(12, generator=generator).chunk(parts)
    streamed, halves = RangeStats.empty(groups, 2), [RangeStats.empty(groups, 2), RangeStats.empty(groups, 2)]
    for i, members in enumerate(order):
        streamed = streamed.update(x[members], group[members])
        halves[i % 2] = halves[i % 2].update(x[members], group[members])
    low, high = direct(x, group, groups)
    for stats in (streamed, halves[0].merge(halves[1])):
        assert torch.equal(stats.low, low)
        assert torch.equal(stats.high, high)


def test_rows_have_one_unit() -> None:
    x = torch.randn(4, 5, 3)
    stats = RangeStats.empty(2, 1).update(x, torch.tensor([0, 1, 1, 0]))
    assert stats.low.tolist() == [[x[[0, 3]].min()], [x[[1, 2]].min()]]
    assert stats.high.tolist() == [[x[[0, 3]].max()], [x[[1, 2]].max()]]


def test_pooling_groups_and_units() -> None:
    stats = RangeStats(torch.tensor([[-1.0, -5.0], [-3.0, -2.0]]), torch.tensor([[1.0, 2.0], [4.0, 0.5]]))
    assert stats.pooled(1).low.tolist() == [[-3.0, -5.0]]
    assert stats.pooled(1).high.tolist() == [[4.0, 2.0]]
    assert stats.pooled(2) is stats
    assert stats.over_units().low.tolist() == [[-5.0], [-3.0]]
    assert stats.over_units().high.tolist() == [[2.0], [4.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_lost(bad: float) -> None:
    x = torch.randn(4, 5, 3)
    x[1, 2, 2] = bad
    stats = RangeStats.empty(2, 1).update(x, torch.tensor([0, 1, 1, 0]))
    assert not torch.isfinite(stats.high[1])
    assert torch.isfinite(stats.high[0])
