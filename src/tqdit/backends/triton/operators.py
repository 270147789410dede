"""The kernels as `torch.library` operators, so that torch.compile takes a whole model without a graph break.

Operands travel flat: their tables, the time groups they share, and two integers each (mode, bits); a weight as its
tensors and two integers (depth, bits); the codes of a linear layer as one tensor or, on the grid of rows, two, the
second their steps. Channel factors are an argument of the one operator that reads them.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.library import custom_op

from tqdit.backends.triton import candidates, float_attention, floats, hopper, launch, naming, tuning
from tqdit.backends.triton.layouts import (
    BF16,
    HEADS_OF,
    KINDS,
    Config,
    Projected,
    Weight,
    attended,
    mode,
    part_sizes,
    pitch,
    with_steps,
)
from tqdit.ops.schema import Codes, Norm, OperandParams, Residual, RowCodes

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


def operator(name: str, empty: Callable[..., Any]) -> Callable[[Callable[P, R]], Any]:
    """Make a function a `torch.library` operator of that name.

    `empty`: a function of the same arguments that returns results of the right shapes with undefined numbers. It is the
    operator's fake implementation, and stands for the launch where kernels are noted (`tuning.collecting`).
    """

    def made(function: Callable[P, R]) -> Any:
        placed = on_device_of(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return placed(*args, **kwargs)
            except tuning.Deferred:
                return cast(R, empty(*args, **kwargs))

        op = custom_op(name, mutates_args=())(run)
        op.register_fake(empty)
        return op

    return made


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of a tensor the current one, which it is already unless there are several."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


Flat = tuple[list[Tensor], Tensor | None, list[int]]


def flatten(*operands: OperandParams) -> Flat:
    """Return operands as an operator takes them; `_operands` is the inverse."""
    group = next((o.group for o in operands if o.group is not None and o.table.shape[0] > 1), None)
    return [o.table for o in operands], group, [number for o in operands for number in (mode(o), o.bits)]


def _operands(tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> tuple[OperandParams, ...]:
    found = []
    for table, kind, bits in zip(tables, kinds[::2], kinds[1::2], strict=True):
        grid, merged = KINDS[kind]
        found.append(OperandParams(grid, bits, table, merged, group if table.shape[0] > 1 else None))
    return tuple(found)


def _weight(tensors: list[Tensor], kind: list[int]) -> Weight:
    codes, scale, bias, sums, *high = tensors
    return Weight(codes, high[0] if high else None, scale, bias, sums, *kind)


def _codes(tensors: list[Tensor]) -> Codes:
    codes, *steps = tensors
    return RowCodes(codes, *steps) if steps else codes


def _linear_config(
    epilogue: str, given: Codes, layer: Weight, source: OperandParams, run: tuning.Run, head_dim: int = 8
) -> Config:
    codes, steps = with_steps(given)
    batch, tokens, _ = codes.shape
    rows, columns, two = batch * tokens, len(layer.codes), source.two_products
    tile = hopper.rows_of_tile(codes.device, tokens, layer.bits, two, head_dim)

    def possible() -> list[Config]:
        special = candidates.hopper_linear(epilogue, rows, columns, tile)
        return candidates.best_first(special + candidates.linear(rows, two, layer.bits), codes.device, *sizes[:3])

    sizes = rows, columns, layer.depth, layer.bits, two, tile
    sources = (False,) if steps is None else (True, False)
    keys = [naming.linear_key(name, *sizes, by_row) for by_row in sources for name in naming.epilogues(epilogue)]
    return tuning.choose(keys, codes.device, possible, run)


def _norm_quantize_empty(x, shift, scale, eps, tables, group, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)


@operator("tqdit::norm_quantize", _norm_quantize_empty)
def norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float,
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `launch.norm_quantize` does."""
    codes, _ = with_steps(_norm_quantize(x, Norm(shift, scale, eps), *_operands(tables, group, kinds)))
    return codes


def _norm_quantize_rows_empty(x, shift, scale, eps, tables, group, kinds):  # type: ignore[no-untyped-def]
    return _empty_rows(x)


@operator("tqdit::norm_quantize_rows", _norm_quantize_rows_empty)
def norm_quantize_rows(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float,
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return codes on the grid of rows and their steps as `launch.norm_quantize` does."""
    return _both(_norm_quantize(x, Norm(shift, scale, eps), *_operands(tables, group, kinds)))


def _norm_quantize(x: Tensor, norm: Norm, target: OperandParams) -> Codes:
    def run(config: Config) -> Codes:
        return launch.norm_quantize(x, norm, target, config)

    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    known = [naming.norm_key(rows, width, x.dtype, by_row) for by_row in dict.fromkeys((target.grid.per_row, False))]
    return run(tuning.choose(known, x.device, functools.partial(candidates.norm, rows, width), run))


def _both(codes: Codes) -> tuple[Tensor, Tensor]:
    assert isinstance(codes, RowCodes)
    return codes.codes, codes.scale


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty codes and steps of the rows of x (B, N, C)."""
    codes = x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)
    return codes, x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)


def _quantize_empty(x, tables, group, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)


@operator("tqdit::quantize", _quantize_empty)
def quantize(x: Tensor, tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> Tensor:
    """Return codes as `launch.quantize` does."""
    codes, _ = with_steps(_quantize(x, *_operands(tables, group, kinds)))
    return codes


def _quantize_rows_empty(x, tables, group, kinds):  # type: ignore[no-untyped-def]
    return _empty_rows(x)


@operator("tqdit::quantize_rows", _quantize_rows_empty)
def quantize_rows(x: Tensor, tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> tuple[Tensor, Tensor]:
    """Return codes on the grid of rows and their steps as `launch.quantize` does."""
    return _both(_quantize(x, *_operands(tables, group, kinds)))


def _quantize(x: Tensor, target: OperandParams) -> Codes:
    def run(config: Config) -> Codes:
        return launch.quantize(x, target, config)

    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    key = naming.quantize_key(rows, width, x.dtype, mode(target))
    return run(tuning.choose([key], x.device, candidates.quantize, run))


def _project_empty(codes, weight, weight_kind, tables, group, kinds, heads):  # type: ignore[no-untyped-def]
    batch, tokens, _ = codes[0].shape
    parts = len(tables) - 1
    return codes[0].new_empty(sum(part_sizes(parts, batch, tokens, heads, weight[0].shape[0] // parts // heads)))


@operator("tqdit::project", _project_empty)
def project(
    codes: list[Tensor], weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], heads: int,
) -> Tensor:  # fmt: skip
    """Return the buffer of a `Projected`, as `launch.project` fills it."""
    source, *targets = _operands(tables, group, kinds)
    layer, given = _weight(weight, weight_kind), _codes(codes)

    def run(config: Config) -> Tensor:
        return launch.project(given, source, layer, config, tuple(targets), heads).codes

    head_dim = len(layer.codes) // len(targets) // heads
    return run(_linear_config(HEADS_OF[len(targets)], given, layer, source, run, head_dim))


def _attend_empty(codes, context, bias, sizes, tables, group, kinds):  # type: ignore[no-untyped-def]
    batch, tokens, _, heads, head_dim = sizes
    columns, dtype = attended(tables, heads * head_dim)
    return codes.new_empty(batch, tokens, columns, dtype=dtype)


@operator("tqdit::attend", _attend_empty)
def attend(
    codes: Tensor, context: Tensor | None, bias: Tensor | None, sizes: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return codes as `launch.attend` does, or without a target fp32.

    `codes`, `context`: buffers of `Projected`. `sizes`: batch, tokens, tokens of the context, heads, head_dim.
    """
    operands = _operands(tables, group, kinds)
    batch, tokens, keys, heads, head_dim = sizes
    projected = Projected(codes, batch, tokens, head_dim)
    other = None if context is None else Projected(context, batch, keys, head_dim)

    def run(config: Config) -> Tensor:
        return launch.attend(projected, other, bias, heads, operands, config)

    sequences, kind, softmax = batch * heads, kinds[6], operands[3]
    one_pass: list[Config] = []
    if softmax.grid.per_row and bias is None:
        one_pass = candidates.hopper_flash(codes.device, tokens if context is None else keys, head_dim)
    if context is None and bias is None:
        special = candidates.hopper_attention(
            codes.device, tokens, head_dim, softmax.two_products, softmax.grid.per_row
        )
        known = [naming.attention_key(sequences, tokens, head_dim, m, bool(special)) for m in naming.modes(kind)]
    else:
        special, biased = [], bias is not None
        known = [naming.cross_attention_key(sequences, tokens, keys, head_dim, m, biased) for m in naming.modes(kind)]

    def possible() -> list[Config]:
        return special + candidates.attention(sequences, keys)

    if more := one_pass + ([float_attention.CONFIG] if bias is None and float_attention.offered() else []):
        known, possible = _with_more(known, more, codes.device, possible)
    config = tuning.choose(known, codes.device, possible, run)
    if config.hopper == BF16:
        float_attention.note(tokens, tokens if context is None else keys, head_dim)
    return run(config)


def _with_more(
    keys: list[str], more: list[Config], device: torch.device, possible: Callable[[], list[Config]]
) -> tuple[list[str], Callable[[], list[Config]]]:
    """Return the key and the candidates of an attention that takes `more` of them, after the best one without these."""

    def all_of_them() -> list[Config]:
        best = tuning.known(keys, device, possible)
        others = possible()
        return list(dict.fromkeys([best or others[0], *more, *others]))

    return [naming.with_more(keys[0], more)], all_of_them


def _linear_empty(codes, weight, weight_kind, tables, group, kinds):  # type: ignore[no-untyped-def]
    return codes[0].new_empty(*codes[0].shape[:2], weight[0].shape[0], dtype=torch.float32)


@operator("tqdit::linear", _linear_empty)
def linear(
    codes: list[Tensor], weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> Tensor:  # fmt: skip
    """Return x W^T + bias as `launch.plain` does."""
    (source,) = _operands(tables, group, kinds)
    layer, given = _weight(weight, weight_kind), _codes(codes)

    def run(config: Config) -> Tensor:
        return launch.plain(given, source, layer, config)

    return run(_linear_config("plain", given, layer, source, run))


def _linear_residual_empty(codes, weight, weight_kind, tables, group, kinds, x, gate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@operator("tqdit::linear_residual", _linear_residual_empty)
def linear_residual(
    codes: list[Tensor], weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], x: Tensor, gate: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return x + gate y as `launch.residual` does."""
    (source,) = _operands(tables, group, kinds)
    layer, given = _weight(weight, weight_kind), _codes(codes)

    def run(config: Config) -> Tensor:
        return launch.residual(given, source, layer, config, Residual(x, gate))

    return run(_linear_config(naming.residual(x.dtype, gate is not None), given, layer, source, run))


def _linear_activation_empty(codes, weight, weight_kind, tables, group, kinds, channels=None):  # type: ignore[no-untyped-def]
    return codes[0].new_empty(*codes[0].shape[:2], pitch(weight[0].shape[0]))


@operator("tqdit::linear_activation", _linear_activation_empty)
def linear_activation(
    codes: list[Tensor], weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
    channels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return codes as `launch.activation` does. `channels`: of the target."""
    source, target = _operands(tables, group, kinds)
    target = target._replace(channels=channels)
    layer, given = _weight(weight, weight_kind), _codes(codes)

    def run(config: Config) -> Tensor:
        return launch.activation(given, source, layer, config, target)

    return run(_linear_config(naming.activation(channels is not None), given, layer, source, run))


def _float_input_linear_empty(x, weight, weight_kind):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight[0].shape[0])


@operator("tqdit::float_input_linear", _float_input_linear_empty)
def float_input_linear(x: Tensor, weight: list[Tensor], weight_kind: list[int]) -> Tensor:
    """Return x W^T + bias as `launch.float_input` does."""
    layer = _weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return launch.float_input(x, layer, config)

    key = naming.float_key(len(x), len(layer.codes), layer.depth, layer.bits)
    possible = functools.partial(candidates.float_input, len(x), len(layer.codes))
    return run(tuning.choose([key], x.device, possible, run))


# Layers inside a float model are many, so these operators are registered with as little around them as torch has:
# `custom_op` adds more Python than a launch takes.
LIBRARY = torch.library.Library("tqdit", "FRAGMENT")
for schema in (
    "quantize_floats(Tensor x, Tensor? channels, Tensor[] tables, Tensor? group, int[] kinds) -> (Tensor, Tensor)",
    "linear_to_floats(Tensor[] codes, Tensor[] weight, int[] weight_kind, Tensor[] tables, Tensor? group, int[] kinds,"
    " ScalarType dtype) -> Tensor",
    "linear_from_floats(Tensor x, Tensor[] weight, int[] weight_kind, ScalarType dtype) -> Tensor",
):
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


@on_device_of
def _quantize_floats(
    x: Tensor, channels: Tensor | None, tables: list[Tensor], group: Tensor | None, kinds: list[int]
) -> tuple[Tensor, Tensor]:
    """Return codes on the grid of rows and their steps as `floats.quantize` does. `channels`: of the target."""
    (target,) = _operands(tables, group, kinds)
    return _both(floats.quantize(x, target._replace(channels=channels)))


@on_device_of
def _linear_to_floats(
    codes: list[Tensor], weight: list[Tensor], weight_kind: list[int],
    tables: list[Tensor], group: Tensor | None, kinds: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias as `floats.linear` does."""
    (source,) = _operands(tables, group, kinds)
    return floats.linear(_codes(codes), source, _weight(weight, weight_kind), dtype)


@on_device_of
def _linear_from_floats(x: Tensor, weight: list[Tensor], weight_kind: list[int], dtype: torch.dtype) -> Tensor:
    """Return x W^T + bias as `floats.float_input` does."""
    return floats.float_input(x, _weight(weight, weight_kind), dtype)


LIBRARY.impl("quantize_floats", _quantize_floats, "CompositeExplicitAutograd")
LIBRARY.impl("linear_to_floats", _linear_to_floats, "CompositeExplicitAutograd")
LIBRARY.impl("linear_from_floats", _linear_from_floats, "CompositeExplicitAutograd")
quantize_floats = torch.ops.tqdit.quantize_floats.default
linear_to_floats = torch.ops.tqdit.linear_to_floats.default
linear_from_floats = torch.ops.tqdit.linear_from_floats.default


@torch.library.register_fake("tqdit::quantize_floats", lib=LIBRARY)
def _(x, channels, tables, group, kinds):  # type: ignore[no-untyped-def]
    return _empty_rows(x)


@torch.library.register_fake("tqdit::linear_to_floats", lib=LIBRARY)
def _(codes, weight, weight_kind, tables, group, kinds, dtype):  # type: ignore[no-untyped-def]
    return codes[0].new_empty(*codes[0].shape[:2], weight[0].shape[0], dtype=dtype)


@torch.library.register_fake("tqdit::linear_from_floats", lib=LIBRARY)
def _(x, weight, weight_kind, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight[0].shape[0], dtype=dtype)
