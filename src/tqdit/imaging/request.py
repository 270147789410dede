"""Which classes a user asks images of."""

from collections.abc import Sequence

from tqdit.errors import InputError
from tqdit.sources.resolve import ModelSource, class_indices


def chosen_classes(source: ModelSource, classes: Sequence[str | int] = ()) -> Sequence[int]:
    """The numbers of the named or numbered classes, or of all. Raises `InputError` for what is no list of classes."""
    if isinstance(classes, str):
        raise InputError(f"classes must be a list of names or numbers, got the string '{classes}'")
    if isinstance(classes, int):
        raise InputError(f"classes must be a list, got the number {classes}; give [{classes}]")
    return class_indices(source, classes) if classes else range(int(source.config["num_embeds_ada_norm"]))
