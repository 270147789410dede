"""What the user is told: the input is wrong, and here is what was legal; or something was put right."""


class InputError(ValueError):
    """A file, name, shape or setting that the user gave cannot be used; the message says which and why."""


class RepairWarning(UserWarning):
    """Something that an interrupted or damaged run left was put right; the message says what."""
