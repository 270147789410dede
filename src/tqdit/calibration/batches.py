"""A loop over samples that takes smaller batches when the device has no memory for larger ones."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from tqdit.errors import InputError

Result = TypeVar("Result")


class Batches:
    """A loop that runs ranges of at most `size` samples at once.

    The size is halved when memory runs out, and stays halved.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def over(self, members: range, run: Callable[[range], Result]) -> list[Result]:
        """Return the results of `run` over consecutive parts of `members`.

        `run` must give the same results for any division. Raises `InputError` if there is not memory enough for one
        sample.
        """
        results: list[Result] = []
        start = members.start
        while start < members.stop:
            part = range(start, min(start + self.size, members.stop))
            try:
                results.append(run(part))
                start = part.stop
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise InputError("the device has too little memory to calibrate with a single sample") from None
            # The error's frames held tensors, which are free only here.
            gc.collect()
            torch.cuda.empty_cache()
            self.size = len(part) // 2
        return results
