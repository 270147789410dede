"""The CPU backend's operations as `torch.library` operators, so that torch.compile and torch.export take a whole model.

Plain calls do not go through these: torch's dispatcher would cost them time. Operands travel flat: the tensors of each,
and three integers (grid, bits, whether its regions merge); a weight as its tensors and three (kind, out, in).
An exported program that was saved needs these operators again: `import tqdit.backends.cpu` before it is loaded.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from tqdit.backends import fused, onednn
from tqdit.backends.onednn import PackedWeight
from tqdit.backends.panels import PanelWeight
from tqdit.ops.schema import AttentionParams, OperandParams
from tqdit.spec import Grid

GRIDS = tuple(Grid)
PANELS, ONEDNN, CODES = range(3)

Flat = tuple[list[Tensor], list[int]]


def flatten(*operands: OperandParams) -> Flat:
    """The tensors of some operands, and what else they are."""
    tensors, kinds = [], []
    for o in operands:
        tensors += [o.scale, o.coarse, o.zero_point] + ([] if o.shift is None else [o.shift])
        kinds += [GRIDS.index(o.grid), o.bits, int(o.shift is not None)]
    return tensors, kinds


def _operands(tensors: list[Tensor], kinds: list[int]) -> list[OperandParams]:
    rest = iter(tensors)
    found = []
    for grid, bits, merged in zip(kinds[::3], kinds[1::3], kinds[2::3], strict=True):
        scale, coarse, zero = next(rest), next(rest), next(rest)
        found.append(OperandParams(GRIDS[grid], bits, scale, zero, coarse, next(rest) if merged else None))
    return found


def flat_weight(weight: fused.Weight) -> Flat:
    """The tensors of a layer, and what else it is."""
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


@custom_op("tqdit_cpu::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, operands: list[Tensor], kinds: list[int]
) -> Tensor:
    (target,) = _operands(operands, kinds)
    return fused.norm_quantize(x, shift, scale, eps, target)


@norm_quantize.register_fake
def _(x, shift, scale, eps, operands, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.uint8)


@custom_op("tqdit_cpu::linear_heads", mutates_args=())
def linear_heads(
    codes: Tensor, weight: list[Tensor], kind: list[int], heads: int, operands: list[Tensor], kinds: list[int]
) -> Tensor:
    source, *targets = _operands(operands, kinds)
    query, key, value = targets
    return fused.qkv(codes, source, _weight(weight, kind), AttentionParams(query, key, value, value, heads))


@linear_heads.register_fake
def _(codes, weight, kind, heads, operands, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[-3:-1], kind[1])


@custom_op("tqdit_cpu::attention", mutates_args=())
def attention(qkv: Tensor, heads: int, operands: list[Tensor], kinds: list[int]) -> Tensor:
    query, key, value, softmax, target = _operands(operands, kinds)
    return fused.attention(qkv, AttentionParams(query, key, value, softmax, heads), target)


@attention.register_fake
def _(qkv, heads, operands, kinds):  # type: ignore[no-untyped-def]
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@custom_op("tqdit_cpu::linear_gelu", mutates_args=())
def linear_gelu(
    codes: Tensor, weight: list[Tensor], kind: list[int], operands: list[Tensor], kinds: list[int]
) -> Tensor:
    source, target = _operands(operands, kinds)
    return fused.linear_gelu(codes, source, _weight(weight, kind), target)


@linear_gelu.register_fake
def _(codes, weight, kind, operands, kinds):  # type: ignore[no-untyped-def]
    grid, _, merged = kinds[3:]
    planes = (2,) if GRIDS[grid].two_region and not merged else ()
    return codes.new_empty(*planes, *codes.shape[-3:-1], kind[1])


@custom_op("tqdit_cpu::linear_residual", mutates_args=())
def linear_residual(
    codes: Tensor, weight: list[Tensor], kind: list[int], operands: list[Tensor], kinds: list[int],
    gate: Tensor, x: Tensor,
) -> Tensor:  # fmt: skip
    (source,) = _operands(operands, kinds)
    return fused.linear_residual(codes, source, _weight(weight, kind), gate, x)


@linear_residual.register_fake
def _(codes, weight, kind, operands, kinds, gate, x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@custom_op("tqdit_cpu::float_input_linear", mutates_args=())
def float_input_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return fused.float_input_linear(x, codes, scale, bias)


@float_input_linear.register_fake
def _(x, codes, scale, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=torch.float32)


@custom_op("tqdit_cpu::product", mutates_args=())
def product(codes: Tensor, zeros: Tensor, weight: list[Tensor], kind: list[int]) -> Tensor:
    found = _weight(weight, kind)
    assert isinstance(found, PackedWeight)
    return onednn.product(codes, zeros, found)


@product.register_fake
def _(codes, zeros, weight, kind):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[:-1], kind[1], dtype=torch.float32)
