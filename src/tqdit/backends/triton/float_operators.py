"""The verbs of layers inside a float model as `torch.library` operators, for graphs of torch.compile.

Such layers are many, so these operators are registered with as little around them as torch has: `custom_op` adds more
Python than a launch takes.
"""

import torch
from torch import Tensor

from tqdit.backends.triton import flat, floats

LIBRARY = torch.library.Library("tqdit", "FRAGMENT")
for schema in (
    "quantize_floats(Tensor x, Tensor? channels, Tensor[] tables, Tensor? group, int[] kinds) -> (Tensor, Tensor)",
    "linear_to_floats(Tensor[] codes, Tensor[] weight, int[] weight_kind, Tensor[] tables, Tensor? group, int[] kinds,"
    " ScalarType dtype) -> Tensor",
    "linear_from_floats(Tensor x, Tensor[] weight, int[] weight_kind, ScalarType dtype) -> Tensor",
):
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


@flat.on_device_of
def _quantize_floats(
    x: Tensor, channels: Tensor | None, tables: list[Tensor], group: Tensor | None, kinds: list[int]
) -> tuple[Tensor, Tensor]:
    """Return codes on the grid of rows and their steps as `floats.quantize` does. `channels`: of the target."""
    (target,) = flat.operands(tables, group, kinds)
    return flat.pair(floats.quantize(x, target._replace(channels=channels)))


@flat.on_device_of
def _linear_to_floats(
    codes: list[Tensor], weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias as `floats.linear` does."""
    (source,) = flat.operands(tables, group, kinds)
    return floats.linear(flat.codes(codes), source, flat.weight(weight, weight_kind), dtype)


@flat.on_device_of
def _linear_from_floats(x: Tensor, weight: list[Tensor], weight_kind: list[int], dtype: torch.dtype) -> Tensor:
    """Return x W^T + bias as `floats.float_input` does."""
    return floats.float_input(x, flat.weight(weight, weight_kind), dtype)


LIBRARY.impl("quantize_floats", _quantize_floats, "CompositeExplicitAutograd")
LIBRARY.impl("linear_to_floats", _linear_to_floats, "CompositeExplicitAutograd")
LIBRARY.impl("linear_from_floats", _linear_from_floats, "CompositeExplicitAutograd")
quantize_floats = torch.ops.tqdit.quantize_floats.default
linear_to_floats = torch.ops.tqdit.linear_to_floats.default
linear_from_floats = torch.ops.tqdit.linear_from_floats.default


@torch.library.register_fake("tqdit::quantize_floats", lib=LIBRARY)
def _(x, channels, tables, group, kinds):  # type: ignore[no-untyped-def]
    return flat.empty_rows(x)


@torch.library.register_fake("tqdit::linear_to_floats", lib=LIBRARY)
def _(codes, weight, weight_kind, tables, group, kinds, dtype):  # type: ignore[no-untyped-def]
    return codes[0].new_empty(*codes[0].shape[:2], weight[0].shape[0], dtype=dtype)


@torch.library.register_fake("tqdit::linear_from_floats", lib=LIBRARY)
def _(x, weight, weight_kind, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight[0].shape[0], dtype=dtype)
