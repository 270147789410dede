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
from tqdit.backends.triton.layouts import Config, Operand, Weight, pitch, takes_two_products

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of(function: Callable[P, R]) -> Callable[P, R]:
    """The first argument's GPU is the current one while the operator runs: Triton launches there."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return function(*args, **kwargs)

    return run


Flat = tuple[list[Tensor], Tensor | None, list[int]]


def flatten(*operands: Operand) -> Flat:
    group = next((o.group for o in operands if o.group is not None), None)
    return [o.table for o in operands], group, [number for o in operands for number in (o.mode, o.bits)]


def _operands(tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> tuple[Operand, ...]:
    return tuple(
        Operand(table, group if len(table) > 1 else None, mode, bits)
        for table, mode, bits in zip(tables, kinds[::2], kinds[1::2], strict=True)
    )


def _weight(tensors: list[Tensor], kind: list[int]) -> Weight:
    codes, scale, bias, sums, *high = tensors
    return Weight(codes, high[0] if high else None, scale, bias, sums, *kind)


def _linear_config(
    epilogue: str, codes: Tensor, layer: Weight, source: Operand, run: tuning.Run, head_dim: int = 8
) -> Config:
    batch, tokens, _ = codes.shape
    rows, columns, two = batch * tokens, len(layer.codes), takes_two_products(source)
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
    (target,) = _operands(tables, group, kinds)

    def run(config: Config) -> Tensor:
        return launch.norm_quantize(x, shift, scale, eps, target, config)

    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    possible = functools.partial(candidates.norm, rows, width)
    return run(tuning.choose(tuning.norm_key(rows, width, x.dtype), x.device, possible, run))


@norm_quantize.register_fake
def _(x, shift, scale, eps, tables, group, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)


@custom_op("tqdit::linear_heads", mutates_args=())
@on_device_of
def linear_heads(
    codes: Tensor, weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], head_dim: int,
) -> Tensor:  # fmt: skip
    source, *targets = _operands(tables, group, kinds)
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.heads(codes, source, layer, config, tuple(targets), head_dim)

    return run(_linear_config("heads", codes, layer, source, run, head_dim))


@linear_heads.register_fake
def _(codes, weight, weight_kind, tables, group, kinds, head_dim):  # type: ignore[no-untyped-def]
    batch, tokens, _ = codes.shape
    size = launch.heads_size(batch, tokens, weight[0].shape[0] // 3 // head_dim, head_dim)
    return codes.new_empty(size)


@custom_op("tqdit::attention", mutates_args=())
@on_device_of
def attention(
    qkv: Tensor, batch: int, tokens: int, heads: int, head_dim: int,
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    operands = _operands(tables, group, kinds)

    def run(config: Config) -> Tensor:
        return launch.attention(qkv, batch, tokens, heads, head_dim, operands, config)

    two = takes_two_products(operands[3])
    special = candidates.hopper_attention(qkv.device, tokens, head_dim, two)
    key = tuning.attention_key(batch * heads, tokens, head_dim, operands[3].mode, bool(special))
    ordinary = functools.partial(candidates.attention, batch * heads, tokens)
    return run(tuning.choose(key, qkv.device, lambda: special + ordinary(), run))


@attention.register_fake
def _(qkv, batch, tokens, heads, head_dim, tables, group, kinds):  # type: ignore[no-untyped-def]
    return qkv.new_empty(batch, tokens, pitch(heads * head_dim))


@custom_op("tqdit::linear_residual", mutates_args=())
@on_device_of
def linear_residual(
    codes: Tensor, weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], gate: Tensor, x: Tensor,
) -> Tensor:  # fmt: skip
    (source,) = _operands(tables, group, kinds)
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.residual(codes, source, layer, config, gate, x)

    return run(_linear_config(tuning.residual(x.dtype), codes, layer, source, run))


@linear_residual.register_fake
def _(codes, weight, weight_kind, tables, group, kinds, gate, x):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@custom_op("tqdit::linear_gelu", mutates_args=())
@on_device_of
def linear_gelu(
    codes: Tensor, weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    source, target = _operands(tables, group, kinds)
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.activation(codes, source, layer, config, target)

    return run(_linear_config("gelu", codes, layer, source, run))


@linear_gelu.register_fake
def _(codes, weight, weight_kind, tables, group, kinds):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape[0], codes.shape[1], pitch(weight[0].shape[0]))


@custom_op("tqdit::float_input_linear", mutates_args=())
@on_device_of
def float_input_linear(x: Tensor, weight: list[Tensor], weight_kind: list[int]) -> Tensor:
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.float_input(x, layer, config)

    key = tuning.float_key(len(x), len(layer.codes), layer.depth, layer.bits)
    possible = functools.partial(candidates.float_input, len(x), len(layer.codes))
    return run(tuning.choose(key, x.device, possible, run))


@float_input_linear.register_fake
def _(x, weight, weight_kind):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight[0].shape[0])
