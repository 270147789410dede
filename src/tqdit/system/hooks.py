"""Register hooks of modules for a piece of work, and remove them when it ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    Keep = Callable[[RemovableHandle], None]


@contextmanager
def hooks() -> Iterator["Keep"]:
    """Yield a function that is given the handle of each new hook; all of these hooks are removed at the end.

    They are also removed if registering another one fails.
    """
    with ExitStack() as stack:

        def keep(handle: "RemovableHandle") -> None:
            stack.callback(handle.remove)

        yield keep
