"""The kernels as `torch.library` operators, so that torch.compile takes a whole model without a graph break.

Their arguments are flat (`flat`). Channel factors are an argument of the one operator that reads them. The operators of
layers inside a float model are in `float_operators`.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.library import custom_op

from tqdit.backends.triton import (
    candidates,
    deviations,
    flat,
    float_attention,
    float_launch,
    hopper,
    launch,
    naming,
    tuning,
)
from tqdit.backends.triton.layouts import (
    HEADS_OF,
    Config,
    Projected,
    Weight,
    attended,
    mode,
    part_sizes,
    pitch,
    with_steps,
)
from tqdit.ops.schema import Codes, Norm, OperandParams, Residual

P = ParamSpec("P")
R = TypeVar("R")


def operator(name: str, empty: Callable[..., Any]) -> Callable[[Callable[P, R]], Any]:
    """Make a function a `torch.library` operator of that name.

    `empty`: a function of the same arguments that returns results of the right shapes with undefined numbers. It is the
    operator's fake implementation, and stands for the launch where kernels are noted (`tuning.collecting`).
    """

    def made(function: Callable[P, R]) -> Any:
        placed = flat.on_device_of(function)

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
    codes, _ = with_steps(_norm_quantize(x, Norm(shift, scale, eps), *flat.operands(tables, group, kinds)))
    return codes


def _norm_quantize_rows_empty(x, shift, scale, eps, tables, group, kinds):  # type: ignore[no-untyped-def]
    return flat.empty_rows(x)


@operator("tqdit::norm_quantize_rows", _norm_quantize_rows_empty)
def norm_quantize_rows(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float,
    tables: list[Tensor], group: Tensor | None, kinds: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return codes on the grid of rows and their steps as `launch.norm_quantize` does."""
    return flat.pair(_norm_quantize(x, Norm(shift, scale, eps), *flat.operands(tables, group, kinds)))


def _norm_quantize(x: Tensor, norm: Norm, target: OperandParams) -> Codes:
    def run(config: Config) -> Codes:
        return launch.norm_quantize(x, norm, target, config)

    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    known = [naming.norm_key(rows, width, x.dtype, by_row) for by_row in dict.fromkeys((target.grid.per_row, False))]
    return run(tuning.choose(known, x.device, functools.partial(candidates.norm, rows, width), run))


def _quantize_empty(x, tables, group, kinds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1], pitch(x.shape[2]), dtype=torch.int8)


@operator("tqdit::quantize", _quantize_empty)
def quantize(x: Tensor, tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> Tensor:
    """Return codes as `launch.quantize` does."""
    codes, _ = with_steps(_quantize(x, *flat.operands(tables, group, kinds)))
    return codes


def _quantize_rows_empty(x, tables, group, kinds):  # type: ignore[no-untyped-def]
    return flat.empty_rows(x)


@operator("tqdit::quantize_rows", _quantize_rows_empty)
def quantize_rows(x: Tensor, tables: list[Tensor], group: Tensor | None, kinds: list[int]) -> tuple[Tensor, Tensor]:
    """Return codes on the grid of rows and their steps as `launch.quantize` does."""
    return flat.pair(_quantize(x, *flat.operands(tables, group, kinds)))


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
    source, *targets = flat.operands(tables, group, kinds)
    layer, given = flat.weight(weight, weight_kind), flat.codes(codes)

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
    operands = flat.operands(tables, group, kinds)
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
    deviations.note(config, tokens, tokens if context is None else keys, head_dim)
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
    (source,) = flat.operands(tables, group, kinds)
    layer, given = flat.weight(weight, weight_kind), flat.codes(codes)

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
    (source,) = flat.operands(tables, group, kinds)
    layer, given = flat.weight(weight, weight_kind), flat.codes(codes)

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
    source, target = flat.operands(tables, group, kinds)
    target = target._replace(channels=channels)
    layer, given = flat.weight(weight, weight_kind), flat.codes(codes)

    def run(config: Config) -> Tensor:
        return launch.activation(given, source, layer, config, target)

    return run(_linear_config(naming.activation(channels is not None), given, layer, source, run))


def _float_input_linear_empty(x, weight, weight_kind):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight[0].shape[0])


@operator("tqdit::float_input_linear", _float_input_linear_empty)
def float_input_linear(x: Tensor, weight: list[Tensor], weight_kind: list[int]) -> Tensor:
    """Return x W^T + bias as `float_launch.float_input` does."""
    layer = flat.weight(weight, weight_kind)

    def run(config: Config) -> Tensor:
        return float_launch.float_input(x, layer, config)

    key = naming.float_key(len(x), len(layer.codes), layer.depth, layer.bits)
    possible = functools.partial(candidates.float_input, len(x), len(layer.codes))
    return run(tuning.choose([key], x.device, possible, run))
