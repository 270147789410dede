"""Compute tails and quantiles of Student's t distribution, and Holm's correction for several tests at a time.

Only the standard library is needed: a tail of the distribution is a regularized incomplete beta function.
"""

import functools
import math
from collections.abc import Sequence

from tqdit.errors import InputError


def upper_tail(t: float, df: int) -> float:
    """Return P(T > t) of Student's t distribution with `df` degrees of freedom.

    The tail for t >= 0 is I_x(df / 2, 1 / 2) / 2 with x = df / (df + t^2) (DLMF 8.17, Abramowitz and Stegun 26.7.1).
    A small tail keeps its relative accuracy, of about 1e-11 up to a million degrees of freedom.
    """
    if df < 1:
        raise InputError(f"Student's t needs at least 1 degree of freedom, got {df}")
    if math.isnan(t):
        raise InputError("Student's t has no tail beyond NaN")
    if t < 0:
        return 1 - upper_tail(-t, df)
    if math.isinf(t):
        return 0.0
    square = t * t
    return _incomplete_beta(df / 2, 0.5, df / (df + square), square / (df + square)) / 2


@functools.cache
def quantile(p: float, df: int) -> float:
    """Return the t whose lower tail P(T <= t) is `p`, which lies between 0 and 1, both excluded."""
    if not 0 < p < 1:
        raise InputError(f"a quantile needs a probability between 0 and 1, got {p}")
    if p < 0.5:
        return -quantile(1 - p, df)
    low, high = 0.0, 1.0
    while upper_tail(high, df) > 1 - p:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if upper_tail(middle, df) > 1 - p else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for their number by the step-down method of Holm (1979), in the given order.

    A hypothesis is rejected at level alpha if its adjusted p value is at most alpha. The chance of any wrong rejection
    among all is then at most alpha, however the tests depend on each other.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise InputError(f"p values must lie between 0 and 1, got {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Return the regularized I_x(a, b) with y = 1 - x, by its continued fraction (DLMF 8.17.22).

    The fraction converges fast for x below (a + 1) / (a + b + 2); beyond, I_x(a, b) = 1 - I_y(b, a) is used.
    """
    if x == 0 or y == 0:
        return 0.0 if x == 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, y, x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    fraction = 1.0
    for m in range(200 + 4 * math.isqrt(int(max(a, b))), 0, -1):  # from the innermost term outwards
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + even / (1 + odd / fraction)
    fraction = 1 - (a + b) * x / (a + 1) / fraction
    return math.exp(a * math.log(x) + b * math.log(y) - log_beta) / (a * fraction)
