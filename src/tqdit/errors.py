"""What the user is told: an exception for input that cannot be used, a warning for a default that was taken."""


class InputError(ValueError):
    """A file, name, shape or setting that the user gave cannot be used; the message says which and why."""


class AssumptionWarning(UserWarning):
    """A model does not say what is needed, and a default was taken; the message says which."""
