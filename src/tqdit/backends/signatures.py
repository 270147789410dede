"""Declare the C functions of `kernels/` to ctypes: structures, argument types, and pointers that are checked.

A wrong type in a call of C reads other memory without a word. So every function is declared once, here, and a tensor
becomes a pointer only if it is what the kernel will take it for.
"""

import ctypes
from ctypes import POINTER, c_float, c_int64, c_void_p
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import COLUMNS
from tqdit.spec import MAX_BITS, MIN_BITS, Grid

# Numbers of the enumeration `Grid` of operands.h; regions that merge are a grid of their own there.
GRIDS = {Grid.UNIFORM: 0, Grid.MRQ_SOFTMAX: 1, Grid.MRQ_GELU: 1, Grid.ROW: 3, Grid.SOFTMAX_ROW: 4}
MERGED = 2
# Numbers of the enumeration `FloatType` of floats.h.
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_SIZE = 2**48  # items, bytes, rows: more than any memory has, so that no product of C overflows by mistake


class Operand(ctypes.Structure):
    """The structure `Operand` of operands.h.

    `alive`: the tensors it points into. A copy of the structure does not keep them alive.
    """

    alive: tuple[torch.Tensor, torch.Tensor | None]
    _fields_ = (
        *((name, c_void_p) for name in ("table", "channels")),
        *((name, c_int64) for name in ("sample_stride", "unit_stride", "grid", "bits")),
    )


class QuantizeCall(ctypes.Structure):
    """The structure `QuantizeCall` of elementwise.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "shift", "scale", "first", "second", "steps")),
        *((name, c_int64) for name in ("sample_stride", "token_stride")),
        *((name, c_int64) for name in ("stride", "batch", "tokens", "width", "type", "gelu", "threads")),
        ("target", Operand),
        ("eps", c_float),
    )


class AttentionCall(ctypes.Structure):
    """The structure `AttentionCall` of attention.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "out", "attended", "steps", "trace", "bias")),
        *((name, c_int64) for name in ("query_stride", "context_stride", "bias_stride")),
        *((name, c_int64) for name in ("batch", "tokens", "context", "heads", "dim", "threads")),
        *((name, Operand) for name in ("queries", "keys", "values", "probability", "target")),
        ("factor", c_float),
    )


class LinearCall(ctypes.Structure):
    """The structure `LinearCall` of linear.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("first", "second", "packed", "column_sums", "first_sums", "second_sums")),
        *((name, c_void_p) for name in ("weight", "bias", "steps")),
        *((name, c_int64) for name in ("batch", "tokens", "depth", "columns", "threads")),
        ("source", Operand),
    )


class ManyRowsCall(ctypes.Structure):
    """The structure `ManyRowsCall` of float_panels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "codes", "scale", "bias", "out")),
        *((name, c_int64) for name in ("rows", "columns", "depth", "type", "out_type", "threads")),
    )


class Patches(ctypes.Structure):
    """The structure `Patches` of ends.h."""

    _fields_ = tuple((name, c_int64) for name in ("batch", "tokens", "across", "side"))


class EndWeight(ctypes.Structure):
    """The structure `EndLayer` of ends.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "codes", "scale", "bias")),
        *((name, c_int64) for name in ("columns", "depth")),
    )


class EmbedCall(ctypes.Structure):
    """The structure `EmbedCall` of ends.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "position", "out")),
        *((name, c_int64) for name in ("sample_stride", "channel_stride", "line_stride", "pixel_stride")),
        *((name, c_int64) for name in ("channels", "type", "out_type", "threads")),
        ("patches", Patches),
        ("layer", EndWeight),
    )


class UnembedCall(ctypes.Structure):
    """The structure `UnembedCall` of ends.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "modulation", "out")),
        *((name, c_int64) for name in ("stride", "type", "out_type", "threads")),
        ("patches", Patches),
        ("layer", EndWeight),
        ("eps", c_float),
    )


_operand, _linear = POINTER(Operand), POINTER(LinearCall)

# Name without "tqdit_" -> argument types. Only functions that ask a question return something, a number.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "has_instructions": (),
    "has_products": (),
    "has_bfloat16": (),
    "pack_weight": (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
    "quantize": (POINTER(QuantizeCall),),
    "weight_only": (
        c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64,
    ),
    "many_rows": (POINTER(ManyRowsCall),),
    "project": (_linear, _operand, c_int64, c_int64, c_void_p),
    "linear_gelu": (_linear, _operand, c_void_p, c_void_p, c_void_p),
    "linear": (_linear, c_int64, c_void_p),
    "linear_added": (_linear, c_void_p, c_int64, c_void_p, c_void_p),
    "attention": (POINTER(AttentionCall),),
    "embed": (POINTER(EmbedCall),),
    "unembed": (POINTER(UnembedCall),),
}  # fmt: skip


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of every function. Raises `AttributeError` for one that the library lacks."""
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, f"tqdit_{name}")
        function.argtypes = arguments
        function.restype = c_int64 if name.startswith("has_") else None
    return library


def need(condition: bool, message: str) -> None:
    """Raise `InputError` unless a condition of the kernels holds; unlike `assert`, with python -O as well."""
    if not condition:
        raise refusal(message)


def refusal(message: str) -> InputError:
    """Return the error of `need`.

    Callers that format a message only when it is needed raise it themselves: a call takes microseconds.
    """
    return InputError(f"the CPU kernels cannot run this: {message}")


def address(tensor: torch.Tensor, dtype: torch.dtype, numel: int | None = None, adjacent: bool = True) -> int:
    """Return the address of a tensor's items, checked.

    Raises `InputError` unless they lie in this process's own memory and have this dtype and number. `adjacent`: they
    must lie one after the other.
    """
    if tensor.dtype is not dtype or not tensor.is_cpu or (adjacent and not tensor.is_contiguous()):
        _refuse(tensor, dtype)
    if numel is not None and tensor.numel() != numel:
        raise InputError(f"the CPU kernels need {numel} items, a tensor has shape {tuple(tensor.shape)}")
    try:
        found = tensor.data_ptr()
    except RuntimeError:  # torch raises this for a tensor without memory
        found = 0
    if not found:
        raise InputError(f"the CPU kernels need items in memory; a {type(tensor).__name__} has none")
    return found


def _refuse(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    raise InputError(f"the CPU kernels need {dtype} on the CPU; a tensor is {tensor.dtype} on {tensor.device}{layout}")


def size(value: int) -> int:
    """Return a count for C, where a larger one would wrap around."""
    if type(value) is not int or not 0 <= value < MAX_SIZE:
        raise InputError(f"the CPU kernels need a whole number from 0, got {value!r}")
    return value


def operand(params: OperandParams, batch: int, units: int = 1, channels: int | None = None) -> Operand:
    """Return a pointer into the table of an operand. The result must outlive the call of C.

    `batch`: samples of the call; the table has a row for each, or one for all. `units`: entries of a row, or one for
    all. `channels`: the number of channels that the operand's factors multiply; None: the factors are not used.
    """
    table = params.selected()
    rows, entries, columns = table.shape
    if columns != COLUMNS:
        raise refusal(f"a table of parameters {tuple(table.shape)}")
    if rows not in (1, batch) or entries not in (1, units):
        raise refusal(f"parameters of {rows} samples of {entries} for {batch} samples of {units}")
    if not MIN_BITS <= params.bits <= MAX_BITS:
        raise refusal(f"codes of {params.bits} bits")
    need(params.grid in GRIDS, f"codes on the grid '{params.grid}'")
    strides = 0 if rows == 1 else entries * COLUMNS, 0 if entries == 1 else COLUMNS
    factors = None if params.channels is None or channels is None else params.channels.contiguous()
    factor_address = None if factors is None else address(factors, torch.float32, channels)
    grid = MERGED if params.merged else GRIDS[params.grid]
    made = Operand(address(table, torch.float32), factor_address, *strides, grid, params.bits)
    made.alive = table, factors
    return made
