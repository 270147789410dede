"""`Request`: what a user of the page asks for, out of the values of a form."""

import math
from dataclasses import dataclass
from typing import Any

from tqdit.errors import InputError
from tqdit.sampling.guidance import Sampling
from tqdit.system.validation import check_seed


@dataclass(frozen=True)
class Request:
    """One image of each model: of a class, of a prompt by its number, or of a prompt's text, from one seed.

    `condition`: the name or number of a class, the number of a prompt, or a text. Raises `InputError` for a seed that
    is not legal.
    """

    condition: str | int
    seed: int
    sampling: Sampling

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @classmethod
    def read(cls, condition: Any, seed: Any, steps: Any, guidance: Any, sampler: Any) -> "Request":
        """Return the request of a form, whose numbers may be texts, floats or None.

        Raises `InputError` that names the field, what it has and what it must be.
        """
        if not isinstance(condition, str | int) or condition == "":
            raise InputError("say what to draw first")
        sampling = Sampling(str(sampler), whole("steps", steps), number("guidance", guidance))
        return cls(condition, whole("seed", seed), sampling)


def whole(name: str, value: Any) -> int:
    """Return the whole number of a form's field. Raises `InputError` naming the field."""
    found = number(name, value, "a whole number")
    if not (math.isfinite(found) and found == int(found)):
        raise InputError(f"{name} must be a whole number, got {value!r:.80}")
    return int(found)


def number(name: str, value: Any, kind: str = "a number") -> float:
    """Return the number of a form's field. Raises `InputError` naming the field."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        shown = "nothing" if value in (None, "") else f"{value!r:.80}"
        raise InputError(f"{name} must be {kind}, got {shown}") from None
