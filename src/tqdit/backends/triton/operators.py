"""The kernels as `torch.library` operators, so that torch.compile takes a whole model without a graph break.

Operands travel flat: their tables, the time groups they share, and two integers each (mode, bits); a weight as its
tensors and two integers (depth, bits).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from tqdit.backends.triton import candidates, hopper, launch, tuning
from tqdit.backends.triton.layouts import HEADS_OF, KINDS, Config, Projected, Weight, mode, part_sizes, pitch
from tqdit.ops.schema import Norm, OperandParams, Residual

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of(function: Callable[P, R]) -> Callable[P, R]:
    """Make the first argument's GPU the current one while the operator runs: Triton launches there."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return function(*args, **kwargs)

    return run


Flat = tuple[list[Tensor], Tensor | None, list[int]]


def flatten(*operands: OperandParams) -> Flat:
    """Return operands as an operator takes them; `_operands` is the inverse."""
    group = next((o.group for o in operands if o.group is not None and len(o.table) > 1), None)
    return [o.table for o in operands], group, [number for o in operands for number in (mode(o), o.bits)]


def _operands(tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> tuple[OperandParams, ...]:
    found = []
    for table, kind, bits in zip(tables, kinds[::2], kinds[1::2], strict=True):
        grid, merged = KINDS[kind]
        found.append(OperandParams(grid, bits, table, merged, group if len(table) > 1 else None))
    return tuple(found)


def _weight(tensors: list[Tensor], kind: list[int]) -> Weight:
    codes, scale, bias, sums, *high = tensors
    return Weight(codes, high[0] if high else None, scale, bias, sums, *kind)


def _linear_config(
    epilogue: str, codes: Tensor, layer: Weight, source: OperandParams, run: tuning.Run, head_dim: int = 8
) -> Config:
    batch, tokens, _ = codes.shape
    rows, columns, two = batch * tokens, len(layer.codes), source.two_products
    tile = hopper.rows_of_tile(codes.device, tokens, layer.bits, two, head_dim)

    def possible() -> list[Config]:
        special = candidates.hopper_linear(epilogue, rows, columns, tile)
        return special + candidates.linear(rows, two, layer.bits)

    key = tuning.linear_key(epilogue, rows, columns, layer.depth, layer.bits, two, tile)
    return tuning.choose(key, codes.device, possible, run)


@custom_op("tqdit::norm_quantize", mutates_args=())
@on_device_of
def norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float,
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `launch.norm_quantize` does."""
    (target,) = _operands(tables, group, kinds)

    def run(config: Config) -> Tensor:
        return launch.norm_quantize(x, Norm(shift, scale, eps), target, config)

    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    possible = functools.partial(candidates.norm, rows, width)
    return run(tuning.choose(tuning.norm_key(rows, width, x.dtype), x.device, possible, run))


@norm_quantize.register_fake
def _(x, shift, scale, eps, tables, group, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)


@custom_op("tqdit::quantize", mutates_args=())
@on_device_of
def quantize(x: Tensor, tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> Tensor:
    """Return codes as `launch.quantize` does."""
    (target,) = _operands(tables, group, kinds)

    def run(config: Config) -> Tensor:
        return launch.quantize(x, target, config)

    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    key = tuning.quantize_key(rows, width, x.dtype, kinds[0])
    return run(tuning.choose(key, x.device, candidates.quantize, run))


@quantize.register_fake
def _(x, tables, group, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)


@custom_op("tqdit::project", mutates_args=())
@on_device_of
def project(
    codes: Tensor, weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], heads: int,
) -> Tensor:  # fmt: skip
    """Return the buffer of a `Projected`, as `launch.project` fills it."""
    source, *targets = _operands(tables, group, kinds)
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.project(codes, source, layer, config, tuple(targets), heads).codes

    head_dim = len(layer.codes) // len(targets) // heads
    return run(_linear_config(HEADS_OF[len(targets)], codes, layer, source, run, head_dim))


@project.register_fake
def _(codes, weight, weight_kind, tables, group, kinds, heads):  # type: ignore[no-untyped-def]
    batch, tokens, _ = codes.shape
    parts = len(tables) - 1
    return codes.new_empty(sum(part_sizes(parts, batch, tokens, heads, weight[0].shape[0] // parts // heads)))


@custom_op("tqdit::attend", mutates_args=())
@on_device_of
def attend(
    codes: Tensor, context: Tensor | None, bias: Tensor | None, sizes: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `launch.attend` does.

    `codes`, `context`: buffers of `Projected`. `sizes`: batch, tokens, tokens of the context, heads, head_dim.
    """
    operands = _operands(tables, group, kinds)
    batch, tokens, keys, heads, head_dim = sizes
    projected = Projected(codes, batch, tokens, head_dim)
    other = None if context is None else Projected(context, batch, keys, head_dim)

    def run(config: Config) -> Tensor:
        return launch.attend(projected, other, bias, heads, operands, config)

    sequences, kind = batch * heads, kinds[6]
    if context is None and bias is None:
        special = candidates.hopper_attention(codes.device, tokens, head_dim, operands[3].two_products)
        key = tuning.attention_key(sequences, tokens, head_dim, kind, bool(special))
    else:
        special = []
        key = tuning.cross_attention_key(sequences, tokens, keys, head_dim, kind, bias is not None)
    ordinary = functools.partial(candidates.attention, sequences, keys)
    return run(tuning.choose(key, codes.device, lambda: special + ordinary(), run))


@attend.register_fake
def _(codes, context, bias, sizes, tables, group, kinds):  # type: ignore[no-untyped-def]
    batch, tokens, _, heads, head_dim = sizes
    return codes.new_empty(batch, tokens, pitch(heads * head_dim))


@custom_op("tqdit::linear", mutates_args=())
@on_device_of
def linear(
    codes: Tensor, weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return x W^T + bias as `launch.plain` does."""
    (source,) = _operands(tables, group, kinds)
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.plain(codes, source, layer, config)

    return run(_linear_config("plain", codes, layer, source, run))


@linear.register_fake
def _(codes, weight, weight_kind, tables, group, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape[0], codes.shape[1], weight[0].shape[0], dtype=torch.float32)


@custom_op("tqdit::linear_residual", mutates_args=())
@on_device_of
def linear_residual(
    codes: Tensor, weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], x: Tensor, gate: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return x + gate y as `launch.residual` does."""
    (source,) = _operands(tables, group, kinds)
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.residual(codes, source, layer, config, Residual(x, gate))

    return run(_linear_config(tuning.residual(x.dtype, gate is not None), codes, layer, source, run))


@linear_residual.register_fake
def _(codes, weight, weight_kind, tables, group, kinds, x, gate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@custom_op("tqdit::linear_activation", mutates_args=())
@on_device_of
def linear_activation(
    codes: Tensor, weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `launch.activation` does."""
    source, target = _operands(tables, group, kinds)
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.activation(codes, source, layer, config, target)

    return run(_linear_config("gelu", codes, layer, source, run))


@linear_activation.register_fake
def _(codes, weight, weight_kind, tables, group, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape[0], codes.shape[1], pitch(weight[0].shape[0]))


@custom_op("tqdit::float_input_linear", mutates_args=())
@on_device_of
def float_input_linear(x: Tensor, weight: list[Tensor], weight_kind: list[int]) -> Tensor:
    """Return x W^T + bias as `launch.float_input` does."""
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.float_input(x, layer, config)

    key = tuning.float_key(len(x), len(layer.codes), layer.depth, layer.bits)
    possible = functools.partial(candidates.float_input, len(x), len(layer.codes))
    return run(tuning.choose(key, x.device, possible, run))


@float_input_linear.register_fake
def _(x, weight, weight_kind):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight[0].shape[0])
