"""Launch a kernel again without asking Triton again how it is to be compiled.

Triton looks at every argument of every launch to find the kernel that was compiled for such arguments, which takes
longer than the launch. A `Plan` has all arguments but the tensors, so a second launch takes the kernel of the first.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
from triton import knobs

from tqdit.backends.triton.layouts import NATIVE
from tqdit.errors import InputError

PLANS = 4096  # of each kind that are kept
EARLY_ROWS = 4096


def starts_early(device: int, rows: int) -> bool:
    """Say whether a kernel on so many rows may start before its predecessor has ended; see `kernels.dependent`.

    Kernels on more than EARLY_ROWS rows take so long that nothing is gained. TQDIT_DEPENDENT_LAUNCH=0 in the
    environment has no kernel start early.
    """
    return rows <= EARLY_ROWS and _dependent_launch(device)


@functools.cache
def _dependent_launch(device: int) -> bool:
    """Say whether a GPU has programmatic dependent launch, and the environment does not forbid it."""
    if not NATIVE or os.environ.get("TQDIT_DEPENDENT_LAUNCH") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: int, rows: int) -> dict[str, bool]:
    """Return the options of Triton with which a kernel on so many rows may start early, none where it does not."""
    return {"launch_pdl": True} if starts_early(device, rows) else {}


class Blocks(NamedTuple):
    """A descriptor of blocks of a tensor, for a kernel that is compiled: Triton's own checks itself when it is made."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False


class Plan:
    """The launches of one kernel, of Triton or Gluon, that differ in nothing but their tensors.

    `grid`: programs. `others`: the arguments after the tensors. A plan is for one GPU, which has to be the current one,
    and for tensors of the same dtypes: those of tables and time groups are always the same.
    """

    __slots__ = ("_compiled", "_end", "_start", "grid", "kernel", "options", "others")

    def __init__(self, kernel: Any, grid: tuple[int, int], others: tuple[Any, ...], **options: Any) -> None:
        self.kernel, self.grid, self.others, self.options = kernel, grid, others, options
        self._compiled: Any = None

    @property
    def launched(self) -> bool:
        """Say whether the compiled kernel is known, so that descriptors can be `Blocks`."""
        return self._compiled is not None

    def launch(self, tensors: tuple[torch.Tensor, ...], blocks: tuple[Any, ...] = ()) -> None:
        """Launch the kernel with tensors, then descriptors of blocks, then the other arguments.

        Triton specializes a kernel for tensors that start at multiples of 16 bytes, so the tensors of every launch have
        to, unless the kernel is declared without that specialization. Others go through `launch_any`.
        """
        compiled = self._compiled
        if compiled is None:
            made = self.launch_any(tensors, blocks)
            if NATIVE:
                self._start, self._end = (*self.grid, 1), (made.function, made.packed_metadata, None, None, None)
                self._compiled = made  # last: another thread takes what stands above as soon as it sees this
        elif _observed():
            compiled[self._start](*tensors, *blocks, *self.others)
        else:
            stream = torch._C._cuda_getCurrentRawStream(tensors[0].get_device())
            addresses = map(torch.Tensor.data_ptr, tensors)  # Triton would ask each tensor, and the driver about it
            compiled.run(*self._start, stream, *self._end, *addresses, *blocks, *self.others)

    def launch_any(self, tensors: tuple[torch.Tensor, ...], blocks: tuple[Any, ...] = ()) -> Any:
        """Launch the kernel by Triton's own way, and return it compiled."""
        return self.kernel[self.grid](*tensors, *blocks, *self.others, **self.options)


def _observed() -> bool:
    """Say whether a profiler wants to be told of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def check_device(*tensors: torch.Tensor) -> None:
    """Raise `InputError` unless all tensors are on the device of the first: kernels read addresses alone."""
    device = tensors[0].get_device()
    for tensor in tensors:
        if tensor.get_device() != device:
            raise InputError(f"a layer or table on {tensor.device} cannot take an input on {tensors[0].device}")


def aligned(*tensors: torch.Tensor) -> bool:
    """Say whether tensors start at multiples of 16 bytes."""
    return not any(tensor.data_ptr() & 15 for tensor in tensors)
