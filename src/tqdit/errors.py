"""Define the messages to a user: the input is wrong, a default was taken, or something was put right."""

import difflib
from collections.abc import Iterable

LONGEST = 1000  # characters of a message; a file may hold a name of any length


class InputError(ValueError):
    """A file, name, shape or setting that the user gave cannot be used; the message says which and why.

    The message is one line that a terminal can show: names come from files, and may hold anything.
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST - 303]}...{text[-300:]}"
        super().__init__(text)


class PromptsNeededError(InputError):
    """A model of prompts is to be sampled without any."""


def printable(text: str) -> str:
    """Return the text with an escape such as \\x1b or \\n for every character that a terminal would not print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known name that is most like it; empty if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


class AssumptionWarning(UserWarning):
    """A model lacks information that is needed, and a default was taken; the message says which."""


class RepairWarning(UserWarning):
    """A rest of an interrupted or damaged run was put right; the message says what it was."""
