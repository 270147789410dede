"""Arguments of operators, which torch wants flat: lists of tensors and of integers.

Operands travel as their tables, the time groups they share, and two integers each (mode, bits); a weight as its
tensors and two integers (depth, bits); the codes of a linear layer as one tensor or, on the grid of rows, two, the
second their steps.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from tqdit.backends.triton.layouts import KINDS, Weight, mode, pitch
from tqdit.ops.schema import Codes, OperandParams, RowCodes

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of(function: Callable[P, R]) -> Callable[P, R]:
    """Make the GPU of the first tensor the current one while the operator runs: Triton launches there."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        assert isinstance(first, Tensor)
        with on(first):
            return function(*args, **kwargs)

    return run


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of a tensor the current one, which it is already unless there are several."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


Flat = tuple[list[Tensor], Tensor | None, list[int]]


def flatten(*given: OperandParams) -> Flat:
    """Return operands as an operator takes them; `operands` is the inverse."""
    group = next((o.group for o in given if o.group is not None and o.table.shape[0] > 1), None)
    return [o.table for o in given], group, [number for o in given for number in (mode(o), o.bits)]


def operands(tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> tuple[OperandParams, ...]:
    """Return operands from what `flatten` made of them."""
    found = []
    for table, kind, bits in zip(tables, kinds[::2], kinds[1::2], strict=True):
        grid, merged = KINDS[kind]
        found.append(OperandParams(grid, bits, table, merged, group if table.shape[0] > 1 else None))
    return tuple(found)


def weight(tensors: list[Tensor], kind: list[int]) -> Weight:
    """Return a weight from its tensors and its depth and bits."""
    stored, scale, bias, sums, *high = tensors
    return Weight(stored, high[0] if high else None, scale, bias, sums, *kind)


def codes(tensors: list[Tensor]) -> Codes:
    """Return codes from one tensor, or on the grid of rows from codes and steps."""
    given, *steps = tensors
    return RowCodes(given, *steps) if steps else given


def pair(given: Codes) -> tuple[Tensor, Tensor]:
    """Return codes on the grid of rows and their steps."""
    assert isinstance(given, RowCodes)
    return given.codes, given.scale


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty codes and steps of the rows of x (B, N, C)."""
    made = x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)
    return made, x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)
