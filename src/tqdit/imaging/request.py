"""Find the classes, or the prompts, that a user asks images of."""

from collections.abc import Sequence

from tqdit.errors import InputError
from tqdit.sampling.guidance import Conditions
from tqdit.sources.labels import class_indices
from tqdit.sources.source import ModelSource


def chosen_classes(source: ModelSource, conditions: Conditions, classes: Sequence[str | int] = ()) -> Sequence[int]:
    """Return the indices into `conditions` of the named or numbered classes, or of all conditions.

    The classes of a model of prompts are the prompts' numbers. Raises `InputError` for what is no list of classes.
    """
    if isinstance(classes, str):
        raise InputError(f"classes must be a list of names or numbers, got the string '{classes}'")
    if isinstance(classes, int):
        raise InputError(f"classes must be a list, got the number {classes}; give [{classes}]")
    try:
        wanted = [] if classes is None else list(classes)
    except TypeError:
        kind = type(classes).__name__
        raise InputError(f"classes must be a list of names or numbers, got a value of the type {kind}") from None
    return class_indices(source, wanted, conditions.count) if wanted else range(conditions.count)
