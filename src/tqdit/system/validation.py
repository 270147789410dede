"""Check flags and whole numbers, and put pydantic's errors into the words of every other error."""

import os
from typing import Any

from tqdit.errors import InputError

LARGEST_SEED = 2**31 - 1


def legal(error: Any) -> str | None:
    """Say what a value must be, by one of the `errors()` of a `ValidationError`: "at least 1"; None for a rare kind."""
    limits = {key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in error.get("ctx", {}).items()}
    whole, number, truth = "a whole number", "a number", "true or false"
    return {
        "literal_error": str(limits.get("expected", "")).replace("'", ""),
        "greater_than_equal": f"at least {limits.get('ge')}",
        "greater_than": f"greater than {limits.get('gt')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "less_than": f"less than {limits.get('lt')}",
        "finite_number": "a finite number",
        "int_parsing": whole, "int_type": whole, "int_from_float": whole, "int_parsing_size": whole,
        "float_parsing": number, "float_type": number,
        "bool_parsing": truth, "bool_type": truth,
        "string_type": "a text",
    }.get(error["type"])  # fmt: skip


def reason(error: Any) -> str:
    """Return the first fault of a `ValidationError` and its place, such as "rows.0.name must be a text"."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "its content"
    expected = legal(first)
    return f"{place} must be {expected}" if expected else f"{place}: {first['msg']}"


def check_flags(**given: Any) -> None:
    """Raise `InputError` naming the first of the options that is neither True nor False."""
    for name, value in given.items():
        if type(value) is not bool:
            raise InputError(f"{name} must be True or False, got {value!r:.80}")


def check_report(report: Any) -> None:
    """Raise `InputError` for a report of progress that cannot be called."""
    if not callable(report):
        raise InputError(f"report must be a function of a stage and a fraction, got {report!r:.80}")


def check_paths(**given: Any) -> None:
    """Raise `InputError` naming the first of the options that is no path; None is an option that was not given."""
    for name, value in given.items():
        if not (value is None or isinstance(value, str | os.PathLike)):
            raise InputError(f"{name} must be a path, got {value!r:.80}")


def check_counts(**given: Any) -> None:
    """Raise `InputError` naming the first of the options that is no whole number of at least 1."""
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r:.80}")


def check_seed(seed: Any) -> None:
    """Raise `InputError` for a seed that is no whole number of 31 bits."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed must be a whole number from 0 to {LARGEST_SEED}, got {seed!r:.80}")
