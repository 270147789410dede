"""The CPU backend's operations as `torch.library` operators, so that torch.compile and torch.export take a whole model.

Plain calls do not go through these: torch's dispatcher would cost them time. Operands travel flat: the table of each,
then its channel factors if it has some, and four integers (grid, bits, whether its regions merge, whether it has
factors); a weight as its tensors and three (kind, out, in); codes of rows as codes and the rows' steps; a dtype as an
integer.
An exported program that was saved needs these operators again, and that of layers in float: `import tqdit.backends.cpu`
before it is loaded.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from tqdit.backends import cpu_ends, fused, onednn
from tqdit.backends.onednn import PackedWeight
from tqdit.backends.panels import PanelWeight
from tqdit.ops import float_linear  # noqa: F401 - the operator of layers in float that no kernel here computes
from tqdit.ops.schema import AttentionParams, Codes, Norm, OperandParams, Residual, RowCodes
from tqdit.spec import Grid

GRIDS = (Grid.UNIFORM, Grid.MRQ_SOFTMAX, Grid.MRQ_GELU, Grid.ROW, Grid.SOFTMAX_ROW)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of results
NUMBERS = 4  # integers of an operand
PANELS, ONEDNN, CODES = range(3)

Flat = tuple[list[Tensor], list[int]]


def flatten(*operands: OperandParams) -> Flat:
    """Return the flat form of operands: their tables, rows of the batch selected, their factors, and their integers."""
    tensors: list[Tensor] = []
    kinds: list[int] = []
    for o in operands:
        tensors += [o.selected()] if o.channels is None else [o.selected(), o.channels]
        kinds += [GRIDS.index(o.grid), o.bits, int(o.merged), int(o.channels is not None)]
    return tensors, kinds


def flat_codes(codes: Codes) -> tuple[Tensor, Tensor | None]:
    """Return the flat form of codes: themselves, and the steps of their rows or None."""
    return codes if isinstance(codes, RowCodes) else (codes, None)


def _codes(codes: Tensor, steps: Tensor | None) -> Codes:
    return codes if steps is None else RowCodes(codes, steps)


def _operands(tensors: list[Tensor], kinds: list[int]) -> list[OperandParams]:
    rest, made = iter(tensors), []
    for at in range(0, len(kinds), NUMBERS):
        grid, bits, merged, factored = kinds[at : at + NUMBERS]
        table = next(rest)
        made.append(OperandParams(GRIDS[grid], bits, table, bool(merged), channels=next(rest) if factored else None))
    return made


def _two_planes(kind: list[int]) -> bool:
    """Say whether codes of an operand, given by its integers, are two planes."""
    grid, _, merged, _ = kind
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
    """Return codes as `fused.quantize` does, for a target with a static step."""
    (target,) = _operands(operands, kinds)
    codes = fused.quantize(x, target, _norm(shift, scale, eps))
    assert isinstance(codes, Tensor)
    return codes


@quantize.register_fake
def _(x, shift, scale, eps, operands, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(*((2,) if _two_planes(kinds) else ()), *x.shape, dtype=torch.uint8)


def _norm(shift: Tensor | None, scale: Tensor | None, eps: float) -> Norm | None:
    return None if shift is None or scale is None else Norm(shift, scale, eps)


@custom_op("tqdit_cpu::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, operands: list[Tensor], kinds: list[int],
    gelu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return codes and steps as `fused.quantize` does, for a target on the grid of rows."""
    (target,) = _operands(operands, kinds)
    codes = fused.quantize(x, target, _norm(shift, scale, eps), gelu)
    assert isinstance(codes, RowCodes)
    return codes.codes, codes.scale


@quantize_rows.register_fake
def _(x, shift, scale, eps, operands, kinds, gelu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@custom_op("tqdit_cpu::project", mutates_args=())
def project(
    codes: Tensor, steps: Tensor | None, weight: list[Tensor], kind: list[int], heads: int, operands: list[Tensor],
    kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `fused.project` does."""
    source, *targets = _operands(operands, kinds)
    return fused.project(_codes(codes, steps), source, _weight(weight, kind), targets, heads)


@project.register_fake
def _(codes, steps, weight, kind, heads, operands, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[-3:-1], kind[1])


@custom_op("tqdit_cpu::attend", mutates_args=())
def attend(
    projected: Tensor, context: Tensor | None, bias: Tensor | None, heads: int, operands: list[Tensor],
    kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `fused.attend` does, or values where the fifth operand, the target, is missing."""
    query, key, value, softmax, *rest = _operands(operands, kinds)
    target = rest[0] if rest else None
    out = fused.attend(projected, AttentionParams(query, key, value, softmax, heads), target, context, bias)
    assert isinstance(out, Tensor)
    return out


@attend.register_fake
def _(projected, context, bias, heads, operands, kinds):  # type: ignore[no-untyped-def]
    width = projected.shape[2] // (3 if context is None else 1)
    dtype = torch.uint8 if len(kinds) == 5 * NUMBERS else torch.float32
    return projected.new_empty(*projected.shape[:2], width, dtype=dtype)


@custom_op("tqdit_cpu::linear_gelu", mutates_args=())
def linear_gelu(
    codes: Tensor, steps: Tensor | None, weight: list[Tensor], kind: list[int], operands: list[Tensor],
    kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `fused.linear_gelu` does."""
    source, target = _operands(operands, kinds)
    out = fused.linear_gelu(_codes(codes, steps), source, _weight(weight, kind), target)
    assert isinstance(out, Tensor)
    return out


@linear_gelu.register_fake
def _(codes, steps, weight, kind, operands, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(*((2,) if _two_planes(kinds[NUMBERS:]) else ()), *codes.shape[-3:-1], kind[1])


@custom_op("tqdit_cpu::linear", mutates_args=())
def linear(
    codes: Tensor, steps: Tensor | None, weight: list[Tensor], kind: list[int], operands: list[Tensor],
    kinds: list[int], dtype: int,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias as `fused.linear` does. `dtype`: the index of the result's in `DTYPES`."""
    (source,) = _operands(operands, kinds)
    return fused.linear(_codes(codes, steps), source, _weight(weight, kind), DTYPES[dtype])


@linear.register_fake
def _(codes, steps, weight, kind, operands, kinds, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[-3:-1], kind[1], dtype=DTYPES[dtype])


@custom_op("tqdit_cpu::linear_added", mutates_args=())
def linear_added(
    codes: Tensor, steps: Tensor | None, weight: list[Tensor], kind: list[int], operands: list[Tensor],
    kinds: list[int], gate: Tensor | None, x: Tensor,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias, added to a residual, as `fused.linear_added` does."""
    (source,) = _operands(operands, kinds)
    return fused.linear_added(_codes(codes, steps), source, _weight(weight, kind), Residual(x, gate))


@linear_added.register_fake
def _(codes, steps, weight, kind, operands, kinds, gate, x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@custom_op("tqdit_cpu::float_input_linear", mutates_args=())
def float_input_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, dtype: int | None = None) -> Tensor:
    """Return x W^T + bias as `fused.float_input_linear` does. `dtype`: the index of the result's in `DTYPES`."""
    return fused.float_input_linear(x, codes, scale, bias, None if dtype is None else DTYPES[dtype])


@float_input_linear.register_fake
def _(x, codes, scale, bias, dtype=None):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=torch.float32 if dtype is None else DTYPES[dtype])


@custom_op("tqdit_cpu::embed", mutates_args=())
def embed(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, position: Tensor, side: int, dtype: int
) -> Tensor:
    """Return the residual stream as `cpu_ends.embed` does. `dtype`: the index of its dtype in `DTYPES`."""
    return cpu_ends.embed(x, cpu_ends.Weight(weight, scale, bias), position, side, DTYPES[dtype])


@embed.register_fake
def _(x, weight, scale, bias, position, side, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], *position.shape, dtype=DTYPES[dtype])


@custom_op("tqdit_cpu::unembed", mutates_args=())
def unembed(
    stream: Tensor, shift_scale: Tensor, eps: float, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    x: Tensor, side: int,
) -> Tensor:  # fmt: skip
    """Return latents as `cpu_ends.unembed` does."""
    return cpu_ends.unembed(stream, shift_scale, eps, cpu_ends.Weight(weight, scale, bias), x, side)


@unembed.register_fake
def _(stream, shift_scale, eps, weight, scale, bias, x, side):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0] // side**2, *x.shape[2:])


@custom_op("tqdit_cpu::product", mutates_args=())
def product(codes: Tensor, zeros: Tensor, weight: list[Tensor], kind: list[int]) -> Tensor:
    """Return sums as `onednn.product` does."""
    found = _weight(weight, kind)
    assert isinstance(found, PackedWeight)
    return onednn.product(codes, zeros, found)


@product.register_fake
def _(codes, zeros, weight, kind):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[:-1], kind[1], dtype=torch.float32)
