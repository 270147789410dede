"""Many cases of one test: all in one test where each takes milliseconds, or half of them where each takes long."""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

Test = Callable[..., None]


def together(names: Sequence[str], cases: Sequence[Sequence[Any]]) -> Callable[[Test], Test]:
    """Return a decorator that runs a test once for each case, like `parametrize`, but as one test.

    Thousands of tests of a few milliseconds take pytest twice as long as they take themselves. A failure names its
    case; the cases after it do not run.
    """

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def every(**given: Any) -> None:
            for case in cases:
                own = dict(zip(names, case, strict=True))
                try:
                    test(**given, **own)
                except BaseException as error:
                    error.add_note(f"in the case {own}")
                    raise

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in names]
        every.__signature__ = signature.replace(parameters=left)  # what pytest gives it
        return every

    return decorate


def in_pairs(*factors: Sequence[Any]) -> list[tuple[bool, tuple[Any, ...]]]:
    """Return every combination of the factors' values, and whether it is in a half that has every pair of values.

    A combination is in the half if the sum of its places is even. So each pair of values of two factors is in it with
    some values of the others, as long as one of these has two values or more.
    """
    places = itertools.product(*(range(len(factor)) for factor in factors))
    evens = (sum(place) % 2 == 0 for place in places)
    return list(zip(evens, itertools.product(*factors), strict=True))
