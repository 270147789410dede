"""Read bytes and JSON that others wrote: regular files of bounded size, plain values, one clear `InputError`."""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdit.errors import InputError

MAX_BYTES = 64 * 2**20  # the limit of a JSON file; those of the largest models have some 100 KiB
MAX_DEPTH = 64  # the limit of objects and arrays in each other
MAX_INTEGER = 2**63 - 1


def check_regular(path: Path, why: str = "") -> os.stat_result:
    """Return the `stat` of a regular file, or of one that a symbolic link leads to.

    Raises `InputError` for everything else before it is opened: a pipe would wait for ever, a device might never end.
    `why` says what the file is needed for, or what it should be; it is the end of the message.
    """
    end = f"; {why}" if why else ""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} is missing{end}") from None
    except (OSError, ValueError) as error:  # a circle of links, a file as a part of the path, or a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}{end}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a regular file{end}")
    return found


def read_bytes(path: Path, most: int = MAX_BYTES, why: str = "") -> bytes:
    """Return all bytes of a regular file of at most `most` bytes. Raises `InputError` that names the file."""
    size = check_regular(path, why).st_size
    if size > most:
        raise InputError(f"{path} has {size} bytes; a file of its kind has at most {most}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(data: bytes, infinite: bool = True) -> dict[str, Any]:
    """Return a JSON object.

    Raises `InputError` with the reason alone: the caller knows whose bytes these are. It refuses JSON about which
    readers disagree, or which would fail later: a key that is there twice, integers beyond 64 bits, NaN, strings that
    are no Unicode text, more than `MAX_DEPTH` levels. Infinity is diffusers' spelling in some schedulers; `infinite`
    says whether it is allowed.
    """

    def constant(text: str) -> float:
        if text == "NaN" or not infinite:
            raise InputError(f"{text} is not a legal number")
        return float(text)

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=constant,
        )
    except RecursionError:
        _too_deep()
    except InputError:
        raise
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(str(error)) from None
    if not isinstance(value, dict):
        raise InputError("it does not hold a JSON object")
    _check_values(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"it has the key '{next(name for name in names if names.count(name) > 1)}' twice")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -MAX_INTEGER - 1 <= int(text) <= MAX_INTEGER:
        raise InputError(f"it has an integer of {len(text)} digits; integers have at most 64 bits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InputError(f"it has the number {text}, which is too large")
    return value


def _check_values(value: Any) -> None:
    """Check depth and strings of a parsed value, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        _too_deep()


def _inside(value: Any) -> Iterator[Any]:
    """Return the values inside an object or array, keys too.

    A string holds none, and must be one that can be written.
    """
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"it has the string {value!a}, which is no Unicode text") from None


def _too_deep() -> NoReturn:
    raise InputError(f"it has more than {MAX_DEPTH} levels of objects and arrays in each other")
