"""Class names of a model: read them, check them, and look class numbers up by them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdit.architectures.registry import conditions
from tqdit.errors import InputError, suggestion
from tqdit.sources.source import ModelSource
from tqdit.system.files import is_there, read_json

LABELS = "id2label.json"
MOST_DIGITS = 9  # of a class number; a text of more digits is no class


def find_labels(root: Path, index: Mapping[str, Any] | None) -> dict[int, str]:
    """Return the class names of a folder by number; empty where it names none.

    They are `id2label` of the pipeline's model_index.json (`index`), else the file `LABELS` of an artifact. Raises
    `InputError` as `class_names` does.
    """
    own = root / LABELS
    table = (index or {}).get("id2label") or (read_json(own) if is_there(own) else {})
    return class_names(table, f"{root}: id2label")


def class_indices(source: ModelSource, classes: Sequence[str | int], count: int | None = None) -> list[int]:
    """Return the class numbers of names or numbers; a number must be below `count`.

    `count`: by default the number of the model's own classes. Raises `InputError` that names the unknown class.
    """
    by_name = {label.strip().lower(): i for i, text in source.labels.items() for label in text.split(",")}
    count = conditions(source.config).count if count is None else count
    found = []
    for given in classes:
        key = str(given).strip().lower()
        index = given if isinstance(given, int) else by_name.get(key, _number(key))
        if isinstance(given, bool) or not 0 <= index < count:
            known = ", ".join(list(by_name)[:20]) or "none named"
            meant = suggestion(key[:40], by_name)
            raise InputError(
                f"unknown class '{str(given)[:40]}'; known: {known}, or a number from 0 to {count - 1}{meant}"
            )
        found.append(index)
    return found


def class_names(table: Any, where: str, count: int | None = None) -> dict[int, str]:
    """Return class names by number from the table of a JSON file.

    `where`: the place of the table, for messages. Raises `InputError` for a value that is no such table, and for a
    number that is not below `count`.
    """
    if not isinstance(table, dict):
        raise InputError(f"{where} is not a table of class numbers to names")
    if wrong := [number for number in table if _number(number) < 0]:
        raise InputError(f"{where} has the key '{wrong[0]}', keys are class numbers")
    if odd := [number for number, label in table.items() if not isinstance(label, str)]:
        raise InputError(f"{where} has a {type(table[odd[0]]).__name__} for class {odd[0]}, names are strings")
    names = {int(number): label for number, label in table.items()}
    if len(names) != len(table):
        raise InputError(f"{where} has a class number twice, with and without leading zeros")
    if count is not None and (beyond := [number for number in names if number >= count]):
        raise InputError(f"{where} names class {beyond[0]}, the model has classes 0 to {count - 1}")
    return names


def checked_labels(labels: Any, config: Mapping[str, Any]) -> dict[int, str]:
    """Return the class names that a user gives by number; empty for None.

    Raises `InputError` for what is no such mapping, for a number that is no class of a config's model, and for a model
    of prompts.
    """
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        raise InputError(f"labels are class names by number, such as {{0: 'shirt'}}, got {type(labels).__name__}")
    if wrong := [number for number in labels if type(number) is not int or number < 0]:
        raise InputError(f"labels have the key {wrong[0]!r:.80}, keys are class numbers")
    count = conditions(config).count if labels else 0
    return class_names({str(number): name for number, name in labels.items()}, "labels", count)


def _number(text: str) -> int:
    """Return the class number that a text says, or -1 for a text that says none.

    More digits than `MOST_DIGITS` are refused, since Python reads at most 4300.
    """
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else -1
