"""Percentiles and interleaving, on a clock of our own."""

from itertools import pairwise

import pytest

from tqdit.speed.timing import Percentiles, interleaved, spread_timesteps


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], (7.0, 7.0, 7.0)),
        ([1.0, 2.0], (1.2, 1.5, 1.8)),
        ([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], (2.0, 3.5, 5.0)),
        ([float(i) for i in range(101)], (20.0, 50.0, 80.0)),
    ],
)
def test_percentiles(values: list[float], expected: tuple[float, ...]) -> None:
    found = Percentiles.from_sample(values)
    assert (found.p20, found.p50, found.p80) == pytest.approx(expected)


class Machine:
    """Calls that take a known time on a clock that only they move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[tuple[str, int]] = []

    def call(self, name: str, seconds: float):
        def work(round_: int) -> None:
            self.log.append((name, round_))
            self.now += seconds * (round_ + 1)

        return work


def test_every_round_times_every_call_once_and_none_follows_itself() -> None:
    machine = Machine()
    calls = {name: machine.call(name, seconds) for name, seconds in (("a", 1.0), ("b", 0.5), ("c", 0.1))}
    fractions: list[float] = []
    times = interleaved(calls, 30, fractions.append, lambda: machine.now)
    rounds = [machine.log[i : i + 3] for i in range(0, 90, 3)]
    for number, entries in enumerate(rounds):
        assert sorted(entries) == [("a", number), ("b", number), ("c", number)]
    names = [name for name, _ in machine.log]
    assert all(one != following for one, following in pairwise(names))
    assert len({tuple(name for name, _ in entries) for entries in rounds}) > 3
    assert times["a"] == pytest.approx([1000 * (i + 1) for i in range(30)])
    assert times["c"] == pytest.approx([100 * (i + 1) for i in range(30)])
    assert fractions == pytest.approx([(i + 1) / 30 for i in range(30)])


def test_only_the_call_is_timed() -> None:
    machine = Machine()

    def slow_progress(_: float) -> None:
        machine.now += 100

    times = interleaved({"a": machine.call("a", 1.0)}, 2, slow_progress, lambda: machine.now)
    assert times == {"a": pytest.approx([1000, 2000])}


@pytest.mark.parametrize(("count", "total"), [(1, 1000), (2, 1000), (20, 1000), (1000, 1000), (7, 13)])
def test_timesteps_differ_and_cover_the_range(count: int, total: int) -> None:
    found = spread_timesteps(count, total)
    assert len(set(found)) == count
    assert found == sorted(found, reverse=True)
    assert all(0 <= t < total for t in found)
    assert found[0] >= total - total / count - 1
    assert found[-1] <= total / count


def test_more_calls_than_timesteps() -> None:
    assert set(spread_timesteps(10, 3)) == {0, 1, 2}
