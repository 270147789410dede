"""The verbs that `Composed` makes: against float64 on the values of the same codes, and against one formula each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tqdit.ops.composed import Composed
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, AttentionParams, Norm, OperandParams, Residual
from tqdit.ops.simulated import Simulated
from tqdit.spec import Grid

BATCH, TOKENS, CONTEXT, HEADS, HEAD = 3, 5, 7, 2, 8
WIDTH = HEADS * HEAD
DISCARD = -10000.0  # diffusers' bias of a token that a mask leaves out


@pytest.fixture(params=[Reference, Simulated])
def run(request: pytest.FixtureRequest) -> Composed:
    return request.param()


@pytest.fixture
def uniform_codes(column) -> Callable[[torch.Tensor, OperandParams], torch.Tensor]:
    """clip(round(x / s) + z) by hand, fp32."""

    def codes(x: torch.Tensor, params: OperandParams) -> torch.Tensor:
        half = 2 ** (params.bits - 1)
        rounded = torch.round(x.float() / column(params, 0, x.ndim)) + column(params, 2, x.ndim)
        return rounded.clamp(-half, half - 1).to(torch.int8)

    return codes


# Codes of hidden states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [1, BATCH])
def test_quantize_without_norm_is_of_the_values_themselves(run, operand, uniform_codes, dtype, lead: int) -> None:
    x = (torch.randn(BATCH, TOKENS, WIDTH) + 0.5).to(dtype)
    _, target = operand(x.shape, lead=lead)
    codes = run.quantize(x, target)
    assert codes.dtype is torch.int8
    assert torch.equal(codes, uniform_codes(x, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_of_a_modulated_layernorm(run, operand, uniform_codes, dtype: torch.dtype) -> None:
    x = (torch.randn(BATCH, TOKENS, WIDTH) * 3 + 5).to(dtype)
    shift, scale = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    _, target = operand(x.shape, lead=BATCH)
    exact = x.double()
    normal = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, unbiased=False, keepdim=True) + 0.3).sqrt()
    expected = uniform_codes(normal * (1 + scale[:, None]) + shift[:, None], target)
    difference = (run.quantize(x, target, Norm(shift, scale, 0.3)).int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.02


# Projections ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("lead", [1, BATCH])
def test_project_into_heads(run, operand, weight, uniform_codes, parts: int, lead: int) -> None:
    """Outputs of a layer are its parts one after the other, each of whole heads with their own parameters."""
    codes, source = operand((BATCH, TOKENS, 12), lead=lead)
    targets = [operand((1,), lead=lead, units=HEADS, size=3.0)[1] for _ in range(parts)]
    layer = run.prepare(weight(parts * WIDTH, 12), torch.randn(parts * WIDTH))
    y = run.product(codes, source, layer)
    projected = run.project(codes, source, layer, targets, HEADS)
    assert projected.shape == (BATCH, TOKENS, parts * WIDTH)
    assert projected.dtype is torch.int8
    for place in range(parts * HEADS):
        own = slice(place * HEAD, (place + 1) * HEAD)
        target, head = targets[place // HEADS], place % HEADS
        alone = target._replace(table=target.table[:, head : head + 1])
        assert torch.equal(projected[..., own], uniform_codes(y[..., own], alone))


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def attention(operand) -> Callable[..., AttentionParams]:
    """Operands whose scores are neither all alike nor one peak."""

    def make(lead: int = BATCH, softmax: Grid = Grid.UNIFORM, timed: bool = True) -> AttentionParams:
        context_lead = lead if timed else 1
        query = operand((1,), lead=lead, units=HEADS, size=0.15, zeros=30)[1]
        key, value = (operand((1,), lead=context_lead, units=HEADS, size=0.15, zeros=30)[1] for _ in range(2))
        probabilities = operand((1,), softmax, lead=lead)[1]
        table = probabilities.table.clone()
        table[..., 0], table[..., 2] = (1 / 255, -128.0) if softmax is Grid.UNIFORM else (0.001, 0.0)
        table[..., 1] = 1 / 127
        return AttentionParams(query, key, value, probabilities._replace(table=table), HEADS)

    return make


def codes_of(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def heads_of(codes: torch.Tensor, part: int) -> torch.Tensor:
    """(B, N, parts C) -> (B, H, N, head_dim) of one part, head by head."""
    first = part * WIDTH
    return torch.stack([codes[..., first + h * HEAD : first + (h + 1) * HEAD] for h in range(HEADS)], dim=1)


def probability_codes(p: torch.Tensor, grid: Grid) -> torch.Tensor:
    if grid is Grid.UNIFORM:
        return ((p * 255).round() - 128).clamp(-128, 127)
    return torch.where(p <= 127 * 0.001, -(p / 0.001).round(), (p * 127).round().clamp(max=127))


def attended(exact, params: AttentionParams, q, k, v, bias: torch.Tensor | None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V in float64 with quantized probabilities: codes (B, H, N, d) -> (B, N, C)."""
    q, k, v = exact(q, params.query), exact(k, params.key), exact(v, params.value)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / HEAD**0.5
    if bias is not None:
        scores = scores + bias[:, None, None].double()
    codes = probability_codes(scores.softmax(-1), params.softmax.grid)
    out = torch.einsum("bhnm,bhmd->bhnd", exact(codes.to(torch.int8), params.softmax), v)
    return torch.cat(list(out.unbind(1)), dim=-1)


@pytest.mark.parametrize("softmax", [Grid.UNIFORM, Grid.MRQ_SOFTMAX])
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("lead", "timed"), [(1, True), (BATCH, True), (BATCH, False)])
def test_attend_is_the_attention_of_the_values(
    run, attention, operand, exact, uniform_codes, softmax: Grid, context: bool, biased: bool, lead: int, timed: bool
) -> None:
    """With M tokens of a context, whose operands may have no time groups, or with the tokens themselves."""
    params = attention(lead, softmax, timed)
    _, target = operand((1,), lead=lead, size=0.05, zeros=30)
    count = CONTEXT if context else TOKENS
    bias = torch.randn(BATCH, count) if biased else None
    own = codes_of(BATCH, TOKENS, WIDTH if context else 3 * WIDTH)
    other = codes_of(BATCH, count, 2 * WIDTH) if context else None
    k, v = (heads_of(own, 1), heads_of(own, 2)) if other is None else (heads_of(other, 0), heads_of(other, 1))
    expected = uniform_codes(attended(exact, params, heads_of(own, 0), k, v, bias), target)
    codes = run.attend(own, params, target, other, bias)
    assert codes.shape == (BATCH, TOKENS, WIDTH)
    assert codes.dtype is torch.int8
    # A probability between two codes may have the other one.
    difference = (codes.int() - expected.int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.05
    assert expected.unique().numel() > 30, "the target would not show an error"


class Watched(Reference):
    """Keeps the probability codes that it was given last."""

    seen: torch.Tensor

    def values(self, p: torch.Tensor, *rest: Any) -> torch.Tensor:  # type: ignore[override]
        self.seen = p
        return super().values(p, *rest)


@pytest.mark.parametrize("softmax", [Grid.UNIFORM, Grid.MRQ_SOFTMAX])
def test_discarded_tokens_have_the_codes_of_probability_0(attention, operand, softmax: Grid) -> None:
    """So they are as if they were not there, in each sample its own ones."""
    run, params = Watched(), attention(1, softmax)
    _, target = operand((1,), size=0.05, zeros=30)
    own, context = codes_of(BATCH, TOKENS, WIDTH), codes_of(BATCH, CONTEXT, 2 * WIDTH)
    kept = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    masked = run.attend(own, params, target, context, (~kept).float() * DISCARD)
    zero = -128 if softmax is Grid.UNIFORM else 0
    for i in range(BATCH):
        assert (run.seen[i][..., ~kept[i]] == zero).all()
        assert (run.seen[i][..., kept[i]] != zero).any()
    for i in range(BATCH):
        alone = run.attend(own[i : i + 1], params, target, context[i : i + 1, kept[i]])
        assert ((masked[i] - alone[0]).abs() <= 1).all()
        assert (masked[i] != alone[0]).float().mean() < 0.02


@pytest.mark.parametrize("softmax", [Grid.UNIFORM, Grid.MRQ_SOFTMAX])
def test_a_bias_of_all_tokens_changes_nothing_but_roundings(attention, operand, softmax: Grid) -> None:
    """A score of -10000 has steps of 2^-10: probabilities move by a thousandth of themselves."""
    run, params = Watched(), attention(1, softmax)
    _, target = operand((1,), size=0.05, zeros=30)
    own, context = codes_of(BATCH, TOKENS, WIDTH), codes_of(BATCH, CONTEXT, 2 * WIDTH)
    plain = run.attend(own, params, target, context)
    plain_p = run.seen
    discarded = run.attend(own, params, target, context, torch.full((BATCH, CONTEXT), DISCARD))
    assert (run.seen.int() - plain_p.int()).abs().max() <= 1
    assert (discarded.int() - plain.int()).abs().max() <= 2
    assert (discarded != plain).float().mean() < 0.1


def test_a_bias_of_zeros_changes_nothing(run, attention, operand) -> None:
    params, (_, target) = attention(), operand((1,), size=0.05, zeros=30)
    own, context = codes_of(BATCH, TOKENS, WIDTH), codes_of(BATCH, CONTEXT, 2 * WIDTH)
    plain = run.attend(own, params, target, context)
    assert torch.equal(run.attend(own, params, target, context, torch.zeros(BATCH, CONTEXT)), plain)


def test_a_context_can_be_kept_for_many_calls(run, attention, operand) -> None:
    """It is one tensor that no call changes."""
    params, (_, target) = attention(), operand((1,), size=0.05, zeros=30)
    own, context = codes_of(BATCH, TOKENS, WIDTH), codes_of(BATCH, CONTEXT, 2 * WIDTH)
    before = context.clone(), own.clone()
    first = run.attend(own, params, target, context, torch.zeros(BATCH, CONTEXT))
    assert torch.equal(run.attend(own, params, target, context.clone()), first)
    assert torch.equal(context, before[0])
    assert torch.equal(own, before[1])


# Linear layers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def product(run, operand, weight) -> tuple[Any, ...]:
    """Codes, their operand, a layer, and its outputs (B, N, C)."""
    codes, source = operand((BATCH, TOKENS, 12), lead=BATCH)
    layer = run.prepare(weight(WIDTH, 12), torch.randn(WIDTH))
    return codes, source, layer, run.product(codes, source, layer)


def test_linear_alone_is_the_product(run, product, exact) -> None:
    codes, source, layer, y = product
    plain = run.linear(codes, source, layer)
    assert plain.dtype is torch.float32
    assert torch.equal(plain, y)
    assert torch.equal(run.linear(codes, source, layer, None), y)
    real = exact(codes, source) @ (layer.codes.double() * layer.scale.double()[:, None]).t() + layer.bias.double()
    assert torch.allclose(plain.double(), real, rtol=1e-5, atol=1e-5 * real.abs().max())


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_GELU])
def test_linear_then_the_codes_of_gelu(run, product, operand, uniform_codes, column, grid: Grid) -> None:
    codes, source, layer, y = product
    _, between = operand((1,), grid, lead=BATCH, size=4.0)
    gelu = F.gelu(y, approximate="tanh")
    if grid is Grid.UNIFORM:
        expected = uniform_codes(gelu, between)
    else:
        own = torch.where(gelu < 0, column(between, 0, 3), column(between, 1, 3))
        expected = torch.round(gelu / own).clamp(-128, 127).to(torch.int8)
    assert torch.equal(run.linear(codes, source, layer, Activation(between)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_linear_then_a_residual_is_rounded_once(run, product, dtype: torch.dtype, gated: bool) -> None:
    codes, source, layer, y = product
    x, gate = torch.randn(BATCH, TOKENS, WIDTH).to(dtype), torch.randn(BATCH, WIDTH) if gated else None
    before = x.clone()
    out = run.linear(codes, source, layer, Residual(x, gate))
    assert out.dtype is dtype
    assert torch.equal(out, (x.float() + (y if gate is None else gate[:, None] * y)).to(dtype))
    assert torch.equal(x, before)


def test_a_residual_has_no_gate_by_default(run, product) -> None:
    codes, source, layer, y = product
    assert torch.equal(run.linear(codes, source, layer, Residual(torch.zeros_like(y))), y)
