"""Every verb of the CPU backend, in every way it runs, against `ops.reference`: equal codes, floats within a bound.

LayerNorm, GELU and exp are rounded differently from torch's. So a code after one of them may differ, by one step, where
the value before rounding is nearer to a boundary than that rounding reaches; everything else is equal bit for bit.
"""

import pytest
import torch
from cpu_codes import found_codes, given_codes, traced
from operands import as_operand, decode, inject, maker
from ties import assert_equal_up_to_ties, each_gelu, each_shape, each_softmax
from together import together
from torch.nn.functional import gelu

from tqdit.backends import fused
from tqdit.backends.cpu import NativeCpu
from tqdit.ops.composed import FUNCTIONS, probabilities, split_heads
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, Norm, Residual
from tqdit.spec import Grid

REFERENCE = Reference()
each_lead = pytest.mark.parametrize("lead", [False, True])


# Codes of float rows -------------------------------------------------------------------------------------------------


@each_shape
@each_lead
def test_quantize_after_a_norm(run, batch: int, tokens: int, width: int, heads: int, lead: bool) -> None:
    make = maker(0)
    x = make.values(batch, tokens, width) * 3 + 1
    modulation = make.values(batch, 6 * width)  # its chunks are rows of a wider tensor
    shift, scale, *_ = modulation.chunk(6, dim=1)
    target, norm = make.params(lead=batch if lead else 1), Norm(shift, scale, 1e-6)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = normal * (1 + scale.double()[:, None]) + shift.double()[:, None]
    actual = found_codes(run, run.quantize(x, target, norm))
    assert_equal_up_to_ties(actual, value, target)
    assert (actual != REFERENCE.quantize(x, target, norm)).float().mean() < 0.01
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(found_codes(run, run.quantize(strided, target, norm)), actual)


@each_shape
@each_gelu
def test_quantize_without_a_norm_is_equal(
    run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool
) -> None:
    make = maker(1, bits)
    target = make.params(grid, batch, merged=merged)
    for dtype in (torch.float32, torch.bfloat16):
        x = (make.values(batch, tokens, width) * 3).to(dtype)
        assert torch.equal(found_codes(run, run.quantize(x, target), target), REFERENCE.quantize(x, target).int())


@pytest.mark.parametrize("scale", [0.0173, 1 / 3, 0.25, 7.1e5, 2.0**-126, 1.5 * 2.0**-126, 3e38, 2.0**126])
def test_quotients_between_two_integers_are_rounded_as_a_division_rounds_them(run, scale: float) -> None:
    """A reciprocal of a scale, rounded, tells another integer for some of these values, or has no bits left."""
    steps = torch.arange(-140, 140, dtype=torch.float64)[:, None] + torch.tensor(
        [0.5, 0.5 + 1e-9, 0.5 - 1e-9, 0.4999, 0]
    )
    x = (steps * scale).float()
    x = torch.cat([x, x.nextafter(x + x.abs()), x.nextafter(x - x.abs())], dim=1).nan_to_num(0, 3e38, -3e38)[None]
    target = as_operand(Grid.UNIFORM, 8, torch.tensor([[scale]]), torch.tensor([[5]], dtype=torch.int32))
    assert torch.equal(found_codes(run, run.quantize(x, target)), REFERENCE.quantize(x, target).int())


@pytest.mark.parametrize(("grid", "merged"), [(Grid.UNIFORM, False), (Grid.MRQ_GELU, False), (Grid.MRQ_GELU, True)])
def test_codes_go_in_and_out_by_verbs_alone(run, grid: Grid, merged: bool) -> None:
    """`inject` and `decode`, which need not know a backend's layout."""
    make = maker(13, 6)
    codes, params = make.codes(2, 5, 24), make.params(grid, 2, merged=merged)
    given = inject(run, codes, params)
    assert torch.equal(given, given_codes(run, codes, params))
    assert torch.equal(decode(run, given, params, 24), codes.int())


# Projections and attention -------------------------------------------------------------------------------------------


@each_shape
@each_lead
@pytest.mark.parametrize(("parts", "per_channel"), [(1, True), (2, True), (3, True), (3, False)])
def test_project_is_equal(
    run, batch: int, tokens: int, width: int, heads: int, lead: bool, parts: int, per_channel: bool
) -> None:
    make = maker(1)
    codes, source = make.codes(batch, tokens, width), make.params(lead=batch if lead else 1)
    weight, bias = make.weight(parts * width, width, per_channel), make.values(parts * width)
    targets = [make.params(lead=batch if lead else 1, units=heads) for _ in range(parts)]
    expected = REFERENCE.project(codes, source, REFERENCE.prepare(weight, bias), targets, heads)
    actual = run.project(given_codes(run, codes, source), source, run.prepare(weight, bias), targets, heads)
    assert torch.equal(found_codes(run, actual), expected.int())


@pytest.mark.parametrize(("grid", "merged"), [(Grid.MRQ_GELU, False), (Grid.MRQ_GELU, True)])
def test_a_source_of_two_regions_is_projected(run, grid: Grid, merged: bool) -> None:
    """With targets of one entry for all heads, which a table may have too."""
    make = maker(14, 6)
    codes, source = make.codes(2, 9, 24), make.params(grid, 2, merged=merged)
    weight, targets = make.weight(48, 24), [make.params(lead=2), make.params()]
    expected = REFERENCE.project(codes, source, REFERENCE.prepare(weight, None), targets, 3)
    actual = run.project(given_codes(run, codes, source), source, run.prepare(weight, None), targets, 3)
    assert torch.equal(found_codes(run, actual), expected.int())


def check_attention(run, projected, context, attention, target, bias=None) -> None:
    """`projected`, `context`: signed codes; the latter None for self-attention."""
    heads = attention.heads
    expected = REFERENCE.attend(projected, attention, target, context, bias)
    given = given_codes(run, projected, attention.query)
    given_context = None if context is None else given_codes(run, context, attention.key)
    actual = found_codes(run, run.attend(given, attention, target, given_context, bias))
    if not isinstance(run, NativeCpu):
        assert torch.equal(actual, expected.int())
        return
    if context is None:
        q, k, v = split_heads(projected, 3, heads)
    else:
        (q,), (k, v) = split_heads(projected, 1, heads), split_heads(context, 2, heads)
    trace = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.int8)
    assert torch.equal(found_codes(run, fused.attend(given, attention, target, given_context, bias, trace)), actual)
    codes = traced(trace, attention.softmax)
    scores = REFERENCE.scores(q, attention.query, k, attention.key, q.shape[-1] ** -0.5)  # equal bit for bit
    exact = dequantize(q, attention.query).double() @ dequantize(k, attention.key).double().transpose(-1, -2)
    torch.testing.assert_close(scores.double(), exact * q.shape[-1] ** -0.5, rtol=1e-5, atol=1e-5)
    biased = scores if bias is None else scores + bias[:, None, None, :]
    assert_equal_up_to_ties(codes.int(), probabilities(biased.double(), attention.softmax), attention.softmax)
    attended = REFERENCE.values(codes, attention.softmax, v, attention.value).transpose(1, 2).flatten(2)
    assert torch.equal(actual, quantize(attended, target).int())  # P V is exact
    assert (actual != expected).float().mean() < 0.01


@each_shape
@each_softmax
def test_attend(run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool) -> None:
    make = maker(2, bits)
    attention, target = make.attention(heads, grid, batch, merged), make.params(lead=batch, reach=2.0)
    check_attention(run, make.codes(batch, tokens, 3 * width), None, attention, target)


# batch, query tokens, context tokens, heads, head_dim
CROSS = [
    (1, 1, 1, 1, 16),
    (2, 5, 1, 3, 8),
    (3, 17, 77, 2, 13),
    (2, 40, 300, 2, 24),
    (4, 33, 16, 1, 7),
    (1, 20, 3, 2, 1),
]


@together(("batch", "tokens", "length", "heads", "dim"), CROSS)
@pytest.mark.parametrize("biased", [False, True])
@each_softmax
def test_attend_to_a_context(
    run, batch: int, tokens: int, length: int, heads: int, dim: int, biased: bool, grid: Grid, bits: int, merged: bool
) -> None:
    """Queries in time groups of their own, a context with one group for all, and a mask that keeps some tokens."""
    make, width = maker(3, bits), heads * dim
    attention, target = make.attention(heads, grid, batch, merged), make.params(lead=batch, reach=2.0)
    attention = attention._replace(key=make.params(units=heads), value=make.params(units=heads))
    bias = None
    if biased:
        kept = torch.rand(batch, length, generator=make.generator) < 0.7
        kept[:, 0] = True
        bias = torch.where(kept, make.values(batch, length), torch.tensor(-10000.0))
    projected, context = make.codes(batch, tokens, width), make.codes(batch, length, 2 * width)
    check_attention(run, projected, context, attention, target, bias)


def test_a_bias_reaches_self_attention_and_its_rows_may_be_apart(run) -> None:
    make = maker(15)
    attention, target = make.attention(2, Grid.MRQ_SOFTMAX, 3), make.params(reach=2.0)
    bias = make.values(3, 50)[:, 10:31]
    check_attention(run, make.codes(3, 21, 3 * 24), None, attention, target, bias)
    shared = make.values(1, 21).expand(3, 21)
    check_attention(run, make.codes(3, 21, 3 * 24), None, attention, target, shared)


def test_a_token_that_a_mask_discards_changes_nothing(run) -> None:
    make, batch, length, width = maker(16), 2, 20, 32
    attention, target = make.attention(2, Grid.MRQ_SOFTMAX, batch), make.params(reach=2.0)
    projected, context = make.codes(batch, 9, width), make.codes(batch, length, 2 * width)
    bias = torch.zeros(batch, length)
    bias[:, 13:] = -10000.0
    other = context.clone()
    other[:, 13:] = make.codes(batch, 7, 2 * width)
    given = given_codes(run, projected, attention.query)
    contexts = [given_codes(run, c, attention.key) for c in (context, other, context[:, :13].contiguous())]
    masked, replaced = (run.attend(given, attention, target, c, bias) for c in contexts[:2])
    assert torch.equal(masked, replaced)
    shorter = run.attend(given, attention, target, contexts[2])
    assert torch.equal(masked, shorter)
    assert not torch.equal(masked, run.attend(given, attention, target, contexts[0]))


def test_self_attention_is_attention_to_its_own_tokens(run) -> None:
    make, width = maker(17), 26
    attention, target = make.attention(2, Grid.MRQ_SOFTMAX, 2), make.params(reach=2.0)
    qkv = given_codes(run, make.codes(2, 19, 3 * width), attention.query)
    q, kv = qkv[..., :width].contiguous(), qkv[..., width:].contiguous()
    assert torch.equal(run.attend(q, attention, target, kv), run.attend(qkv, attention, target))


# Linear layers -------------------------------------------------------------------------------------------------------


@each_shape
@each_gelu
@each_lead
def test_linear_with_an_activation(
    run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool, lead: bool
) -> None:
    make = maker(3, bits)
    count = batch if lead else 1
    codes, source = make.codes(batch, tokens, width), make.params(lead=count)
    then = Activation(make.params(grid, count, merged=merged))
    weight, bias = make.weight(2 * width + 1, width), make.values(2 * width + 1)
    layer = REFERENCE.prepare(weight, bias)
    value = gelu(REFERENCE.product(codes, source, layer).double(), approximate="tanh")
    actual = run.linear(given_codes(run, codes, source), source, run.prepare(weight, bias), then)
    actual = found_codes(run, actual, then.target)
    assert_equal_up_to_ties(actual, value, then.target)
    assert (actual != REFERENCE.linear(codes, source, layer, then)).float().mean() < 0.01


@each_shape
@each_gelu
@pytest.mark.parametrize(
    ("lead", "stream", "gated"),
    [
        (False, torch.float32, True), (True, torch.float32, True), (True, torch.bfloat16, True),
        (True, torch.float32, False), (True, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_linear_with_a_residual_is_equal(
    run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool, lead: bool, stream, gated
) -> None:
    make = maker(4, bits)
    depth = 4 * width if lead else 3 * width + 2  # a multiple of four, and not
    codes = make.codes(batch, tokens, depth)
    source = make.params(grid, batch if lead else 1, merged=merged)
    weight, bias = make.weight(width, depth), make.values(width)
    gate, x = make.values(batch, 6 * width).chunk(6, dim=1)[2], make.values(batch, tokens, width).to(stream)
    then, before = Residual(x, gate if gated else None), x.clone()
    expected = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias), then)
    actual = run.linear(given_codes(run, codes, source), source, run.prepare(weight, bias), then)
    assert actual.dtype is stream
    assert torch.equal(actual, expected)
    assert torch.equal(x, before)


@each_shape
@each_gelu
@each_lead
def test_linear_alone_is_equal(
    run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool, lead: bool
) -> None:
    make = maker(18, bits)
    depth = 4 * width if lead else 3 * width + 2
    codes, source = make.codes(batch, tokens, depth), make.params(grid, batch if lead else 1, merged=merged)
    weight, bias = make.weight(width + 3, depth), make.values(width + 3)
    expected = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias))
    actual = run.linear(given_codes(run, codes, source), source, run.prepare(weight, bias))
    assert actual.dtype is torch.float32
    assert torch.equal(actual, expected)


def test_a_function_without_a_kernel_runs_in_torch(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUNCTIONS, "relu", torch.relu)
    make = maker(19)
    codes, source, then = make.codes(2, 5, 24), make.params(lead=2), Activation(make.params(lead=2), "relu")
    weight = make.weight(20, 24)
    expected = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, None), then)
    actual = run.linear(given_codes(run, codes, source), source, run.prepare(weight, None), then)
    assert torch.equal(found_codes(run, actual), expected.int())


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 1), (3, 33, 17), (9, 70, 64), (20, 5, 65), (3, 40, 130)])
@pytest.mark.parametrize("bias", [False, True])
def test_float_input_linear(run, rows: int, columns: int, depth: int, bias: bool) -> None:
    make = maker(5)
    x, weight = make.values(rows, depth), make.weight(columns, depth)
    b = make.values(columns) if bias else None
    actual = run.float_input_linear(x, run.prepare_float_input(weight, b))
    value = weight.codes.double() * weight.scale.double()[:, None]
    exact = x.double() @ value.t() + (b.double() if bias else 0)
    bound = (depth + 4) * 2.0**-24 * (x.double().abs() @ value.abs().t() + (b.double().abs() if bias else 0))
    assert ((actual - exact).abs() <= bound).all()
