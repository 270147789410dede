"""Time several functions fairly: interleaved rounds, percentiles. There is no model and no torch here."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Percentiles:
    """The 20th, 50th and 80th percentile of a sample, in the unit of the sample."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def from_sample(cls, values: Sequence[float]) -> "Percentiles":
        """Return the percentiles of at least one value, linear between order statistics."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(deciles[1], statistics.median(values), deciles[7])


def interleaved(
    calls: Mapping[str, Callable[[int], object]],
    repeats: int,
    progress: Callable[[float], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the milliseconds of every call in each of `repeats` rounds.

    Each round times every call once, so that a machine that slows down slows all of them; the order is shuffled
    (seeded) from one round to the next, and none follows itself, which would leave its data in the caches. A call
    receives the round's number and returns when its work is done (on a GPU: synchronised).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for round_ in range(repeats):
        for name in order:
            start = clock()
            calls[name](round_)
            times[name].append((clock() - start) * 1e3)
        last = order[-1]
        shuffle(order)
        if order[0] == last:
            order.append(order.pop(0))
        progress((round_ + 1) / repeats)
    return times


def spread_timesteps(count: int, total: int) -> list[int]:
    """Return `count` training timesteps over [0, `total`), evenly and from high to low.

    They are different while `count` <= `total`.
    """
    return [(2 * i + 1) * total // (2 * count) for i in reversed(range(count))]
