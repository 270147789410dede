"""The one exception that means: the user's input is wrong, and here is what was legal."""


class InputError(ValueError):
    """A file, name, shape or setting that the user gave cannot be used; the message says which and why."""
