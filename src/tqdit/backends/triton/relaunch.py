"""Launch a kernel again without asking Triton again how it is to be compiled.

Triton looks at every argument of every launch to find the kernel that was compiled for such arguments, which takes
longer than the launch. A caller that knows what the arguments have in common with those of an earlier launch says so by
a key, and the compiled kernel is launched as it is.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from tqdit.backends.triton.layouts import NATIVE

_COMPILED: dict[Hashable, Any] = {}


class Blocks(NamedTuple):
    """A descriptor of blocks of a tensor, for a kernel that is compiled: Triton's own checks itself when it is made."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    padding: str = "zero"


def known(key: Hashable) -> bool:
    """Say whether a launch with this key has been made."""
    return key in _COMPILED


def launch(kernel: Any, key: Hashable, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel of Triton or Gluon as `programs` programs, all its arguments in their order.

    `key`: hashable, equal for two launches only if the kernel, the device, the options, the constants, the dtypes of
    tensors and whatever Triton specializes a kernel for are equal: whether tensors start at multiples of 16 bytes, and
    whether integers are 1 or multiples of 16. None: unknown, so that Triton looks.
    """
    compiled = None if key is None else _COMPILED.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments)
        return
    compiled = kernel[(programs,)](*arguments, **options)
    if NATIVE and key is not None:
        _COMPILED[key] = compiled


def aligned(*tensors: torch.Tensor) -> bool:
    """Say whether tensors start at multiples of 16 bytes."""
    return not any(tensor.data_ptr() & 15 for tensor in tensors)
