"""Launch a kernel again without asking Triton again how it is to be compiled.

Triton looks at every argument of every launch to find the kernel that was compiled for such arguments, which takes
longer than the launch. A caller that knows what the arguments have in common with those of an earlier launch says so by
a key, and the compiled kernel is launched as it is.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from triton import knobs

from tqdit.backends.triton.layouts import NATIVE
from tqdit.errors import InputError


class Blocks(NamedTuple):
    """A descriptor of blocks of a tensor, for a kernel that is compiled: Triton's own checks itself when it is made."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    padding: str = "zero"


class _Compiled(NamedTuple):
    kernel: Any
    run: Any
    function: Any
    metadata: Any


_COMPILED: dict[Hashable, _Compiled] = {}


def known(key: Hashable) -> bool:
    """Say whether a launch with this key has been made."""
    return key in _COMPILED


def launch(
    kernel: Any, key: Hashable, grid: tuple[int, int], tensors: tuple[torch.Tensor, ...], others: tuple[Any, ...],
    **options: Any,
) -> None:  # fmt: skip
    """Launch a grid of programs of a kernel of Triton or Gluon; its arguments are `tensors` and then `others`.

    `key`: hashable, equal for two launches only if the kernel, the GPU, the options, the constants, the dtypes of
    tensors and whatever Triton specializes a kernel for are equal: whether tensors start at multiples of 16 bytes, and
    whether integers are 1 or multiples of 16. None: unknown, so that Triton looks. The GPU is the current one.
    """
    compiled = None if key is None else _COMPILED.get(key)
    if compiled is None:
        made = kernel[grid](*tensors, *others, **options)
        if NATIVE and key is not None:
            _COMPILED[key] = _Compiled(made, made.run, made.function, made.packed_metadata)
        return
    if _observed():
        compiled.kernel[(*grid, 1)](*tensors, *others)
        return
    stream = torch._C._cuda_getCurrentRawStream(tensors[0].get_device())
    addresses = map(torch.Tensor.data_ptr, tensors)  # Triton would ask each tensor, and then the driver about it
    compiled.run(
        *grid, 1, stream, compiled.function, compiled.metadata, None, None, None, *addresses, *others
    )  # fmt: skip


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
