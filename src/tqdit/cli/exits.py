"""Define how a command ends early: exit codes, and the message of an interrupt."""

WRONG, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes; typer returns 130 for Ctrl-C inside a command
INTERRUPT_MESSAGE = "interrupted; nothing is half written"


class StoppedError(Exception):
    """A command was interrupted. The message says what is left of its work; `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Terminated(BaseException):
    """The process was sent SIGTERM.

    This class is no `Exception`: clean-up runs as for Ctrl-C, and no other handler catches it.
    """
