"""The CPU backend's operations as `torch.library` operators, so that torch.compile and torch.export take a whole model.

Plain calls do not go through these: torch's dispatcher would cost them time. Operands travel flat: the table of each,
and three integers (grid, bits, whether its regions merge); a weight as its tensors and three (kind, out, in).
An exported program that was saved needs these operators again: `import tqdit.backends.cpu` before it is loaded.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from tqdit.backends import fused, onednn
from tqdit.backends.onednn import PackedWeight
from tqdit.backends.panels import PanelWeight
from tqdit.ops.schema import AttentionParams, Norm, OperandParams, Residual
from tqdit.spec import Grid

GRIDS = (Grid.UNIFORM, Grid.MRQ_SOFTMAX, Grid.MRQ_GELU)
PANELS, ONEDNN, CODES = range(3)

Flat = tuple[list[Tensor], list[int]]


def flatten(*operands: OperandParams) -> Flat:
    """Return the flat form of operands: their tables, rows of the batch selected, and three integers for each."""
    kinds = [number for o in operands for number in (GRIDS.index(o.grid), o.bits, int(o.merged))]
    return [o.selected() for o in operands], kinds


def _operands(tables: list[Tensor], kinds: list[int]) -> list[OperandParams]:
    each = zip(tables, kinds[::3], kinds[1::3], kinds[2::3], strict=True)
    return [OperandParams(GRIDS[grid], bits, table, bool(merged)) for table, grid, bits, merged in each]


def _two_planes(kind: list[int]) -> bool:
    """Say whether codes of an operand, given by three integers, are two planes."""
    grid, _, merged = kind
    return GRIDS[grid].two_region and not merged


def flat_weight(weight: fused.Weight) -> Flat:
    """Return the flat form of a layer: its tensors, and three integers (kind, out, in)."""
    if isinstance(weight, PanelWeight):
        return [weight.packed, weight.sums, weight.scale, weight.bias], [PANELS, *weight.shape]
    if weight.packed is not None:
        return [weight.packed, weight.scale, weight.bias], [ONEDNN, *weight.shape]
    assert weight.codes is not None
    assert weight.colsum is not None
    return [weight.codes, weight.colsum, weight.scale, weight.bias], [CODES, *weight.shape]


def _weight(tensors: list[Tensor], kind: list[int]) -> fused.Weight:
    *product, scale, bias = tensors
    which, out_features, in_features = kind
    shape = (out_features, in_features)
    if which == PANELS:
        return PanelWeight(product[0], product[1], scale, bias, shape)
    if which == ONEDNN:
        return PackedWeight(product[0], None, None, scale, bias, shape)
    return PackedWeight(None, product[0], product[1], scale, bias, shape)


@custom_op("tqdit_cpu::quantize", mutates_args=())
def quantize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, operands: list[Tensor], kinds: list[int]
) -> Tensor:
    """Return codes as `fused.quantize` does."""
    (target,) = _operands(operands, kinds)
    return fused.quantize(x, target, None if shift is None or scale is None else Norm(shift, scale, eps))


@quantize.register_fake
def _(x, shift, scale, eps, operands, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(*((2,) if _two_planes(kinds) else ()), *x.shape, dtype=torch.uint8)


@custom_op("tqdit_cpu::project", mutates_args=())
def project(
    codes: Tensor, weight: list[Tensor], kind: list[int], heads: int, operands: list[Tensor], kinds: list[int]
) -> Tensor:
    """Return codes as `fused.project` does."""
    source, *targets = _operands(operands, kinds)
    return fused.project(codes, source, _weight(weight, kind), targets, heads)


@project.register_fake
def _(codes, weight, kind, heads, operands, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[-3:-1], kind[1])


@custom_op("tqdit_cpu::attend", mutates_args=())
def attend(
    projected: Tensor, context: Tensor | None, bias: Tensor | None, heads: int, operands: list[Tensor],
    kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `fused.attend` does."""
    query, key, value, softmax, target = _operands(operands, kinds)
    return fused.attend(projected, AttentionParams(query, key, value, softmax, heads), target, context, bias)


@attend.register_fake
def _(projected, context, bias, heads, operands, kinds):  # type: ignore[no-untyped-def]
    return projected.new_empty(*projected.shape[:2], projected.shape[2] // (3 if context is None else 1))


@custom_op("tqdit_cpu::linear_gelu", mutates_args=())
def linear_gelu(
    codes: Tensor, weight: list[Tensor], kind: list[int], operands: list[Tensor], kinds: list[int]
) -> Tensor:
    """Return codes as `fused.linear_gelu` does."""
    source, target = _operands(operands, kinds)
    return fused.linear_gelu(codes, source, _weight(weight, kind), target)


@linear_gelu.register_fake
def _(codes, weight, kind, operands, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(*((2,) if _two_planes(kinds[3:]) else ()), *codes.shape[-3:-1], kind[1])


@custom_op("tqdit_cpu::linear", mutates_args=())
def linear(
    codes: Tensor, weight: list[Tensor], kind: list[int], operands: list[Tensor], kinds: list[int],
    gate: Tensor | None, x: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias as `fused.linear` does."""
    (source,) = _operands(operands, kinds)
    return fused.linear(codes, source, _weight(weight, kind), None if x is None else Residual(x, gate))


@linear.register_fake
def _(codes, weight, kind, operands, kinds, gate, x):  # type: ignore[no-untyped-def]
    if x is None:
        return codes.new_empty(*codes.shape[-3:-1], kind[1], dtype=torch.float32)
    return x.new_empty(x.shape)


@custom_op("tqdit_cpu::float_input_linear", mutates_args=())
def float_input_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + bias as `fused.float_input_linear` does."""
    return fused.float_input_linear(x, codes, scale, bias)


@float_input_linear.register_fake
def _(x, codes, scale, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=torch.float32)


@custom_op("tqdit_cpu::product", mutates_args=())
def product(codes: Tensor, zeros: Tensor, weight: list[Tensor], kind: list[int]) -> Tensor:
    """Return sums as `onednn.product` does."""
    found = _weight(weight, kind)
    assert isinstance(found, PackedWeight)
    return onednn.product(codes, zeros, found)


@product.register_fake
def _(codes, zeros, weight, kind):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[:-1], kind[1], dtype=torch.float32)
