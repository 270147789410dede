"""The grids of rows and channel factors of the CPU backend, in every way it runs, against `ops.reference`.

Codes and steps without a norm, and sums of products, are equal bit for bit. A row's step after GELU or LayerNorm is
that of the reference within their rounding.
"""

import pytest
import torch
from cpu_codes import found_codes, given_codes
from operands import Maker, gathered, inject, maker, signed_codes
from ties import assert_equal_up_to_ties, each_gelu, each_shape
from torch.nn.functional import gelu

from tqdit.backends import fused
from tqdit.backends.cpu import NativeCpu
from tqdit.errors import InputError
from tqdit.ops.composed import Composed
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, Norm, OperandParams, Residual, RowCodes
from tqdit.spec import Grid

REFERENCE = Reference()


def assert_rows_up_to_ties(run: Composed, actual: object, value: torch.Tensor, params: OperandParams) -> None:
    """`actual` are codes of `value` (fp64) with their rows' steps, from which rounding has moved neither far."""
    assert isinstance(actual, RowCodes)
    factors = 1 if params.channels is None else params.channels.double()
    plain = params._replace(channels=None)
    expected = REFERENCE.quantize((value * factors).float(), plain)
    torch.testing.assert_close(actual.scale, expected.scale, rtol=4e-6, atol=0)
    assert_equal_up_to_ties(found_codes(run, actual), value * factors, plain)


# Codes of float rows -------------------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_rows_is_equal(run, batch: int, tokens: int, width: int, heads: int, bits: int) -> None:
    """Widths that are no multiple of 16; a fraction of its own for every sample; with channel factors and without."""
    make = maker(0, bits)
    for target in (make.params(Grid.ROW, batch), make.params(Grid.ROW, batch, channels=width)):
        for dtype in (torch.float32, torch.bfloat16):
            x = (make.values(batch, tokens, width) * 3).to(dtype)
            actual, expected = run.quantize(x, target), REFERENCE.quantize(x, target)
            assert torch.equal(actual.scale, expected.scale)
            assert torch.equal(found_codes(run, actual), expected.codes.int())


@each_shape
def test_quantize_rows_after_a_norm(run, batch: int, tokens: int, width: int, heads: int) -> None:
    make = maker(1)
    x, target = make.values(batch, tokens, width) * 3 + 1, make.params(Grid.ROW, batch, channels=width)
    shift, scale, *_ = make.values(batch, 6 * width).chunk(6, dim=1)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = normal * (1 + scale.double()[:, None]) + shift.double()[:, None]
    for params in (target, target._replace(channels=None)):
        assert_rows_up_to_ties(run, run.quantize(x, params, Norm(shift, scale, 1e-6)), value, params)


@pytest.mark.parametrize("width", [5, 16, 40])
def test_rows_of_zeros_and_of_one_value(run, width: int) -> None:
    x = torch.zeros(1, 6, width)
    x[0, 1:5] = torch.tensor([3.0, -3.0, 1e-41, 3e38])[:, None]
    x[0, 5, -1] = 7.0  # the largest magnitude in the last place
    target = maker(2).params(Grid.ROW)
    actual, expected = run.quantize(x, target), REFERENCE.quantize(x, target)
    assert torch.equal(actual.scale, expected.scale)
    assert torch.equal(found_codes(run, actual), expected.codes.int())
    assert torch.isfinite(actual.scale).all()
    assert found_codes(run, actual)[0, 0].eq(0).all()
    weight, bias = maker(3).weight(9, width), maker(3).values(9)
    assert torch.equal(run.linear(actual, target, run.prepare(weight, bias))[0, 0], bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 39])
@pytest.mark.parametrize("after", ["nothing", "norm", "gelu"])
def test_a_row_that_is_not_finite_stays_so(run, bad: float, place: int, after: str) -> None:
    """Every product of such a row is NaN or Inf; the rows beside it are untouched."""
    make, width = maker(4), 40
    x, target = make.values(2, 3, width), make.params(Grid.ROW, 2)
    layer, eye = run.prepare(make.weight(21, width), make.values(21)), make.weight(width, width)
    eye = eye._replace(codes=torch.eye(width, dtype=torch.int8), scale=torch.ones(1), colsum=None)

    def products(x: torch.Tensor) -> torch.Tensor:
        if after == "gelu":  # through a layer that is 1
            hidden = RowCodes(torch.ones(2, 3, width, dtype=torch.int8), x.amax(-1))
            codes = run.linear(given_codes(run, hidden, target), target, run.prepare(eye, None), Activation(target))
        else:
            norm = Norm(make.values(2, width) * 0, make.values(2, width) * 0, 1e-6) if after == "norm" else None
            codes = run.quantize(x, target, norm)
        return run.linear(codes, target, layer)

    expected = products(x)
    x[1, 2, place] = bad
    actual = products(x)
    if after != "gelu" or bad != -float("inf"):  # GELU(-Inf) may be 0 or NaN
        assert not torch.isfinite(actual[1, 2]).any()
    actual[1, 2] = expected[1, 2]
    assert torch.equal(actual, expected)


# Sources of rows -----------------------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("fours", [True, False])
def test_products_of_rows_are_equal(run, batch: int, tokens: int, width: int, heads: int, fours: bool) -> None:
    """Alone, with a residual and as heads, whose grids have time groups; depths for either product."""
    make, depth = maker(5), 4 * width if fours else 3 * width + 2
    source, columns = make.params(Grid.ROW, batch), 3 * width
    codes = make.codes(batch, tokens, depth)
    weight, bias = make.weight(columns, depth), make.values(columns)
    own, layer = given_codes(run, signed_codes(codes, source), source), run.prepare(weight, bias)
    known, theirs = signed_codes(codes, source), REFERENCE.prepare(weight, bias)
    gate, x = make.values(batch, columns), make.values(batch, tokens, columns)
    for then in (None, Residual(x), Residual(x, gate), Residual(x.bfloat16(), gate)):
        expected = REFERENCE.linear(known, source, theirs, then)
        assert torch.equal(run.linear(own, source, layer, then), expected)
    targets = [make.params(lead=batch, units=heads, reach=200.0) for _ in range(3)]
    expected = REFERENCE.project(known, source, theirs, targets, heads)
    assert torch.equal(found_codes(run, run.project(own, source, layer, targets, heads)), expected.int())
    assert len(expected.unique()) > 8


@pytest.mark.parametrize("count", [1, 3])
def test_codes_and_steps_must_belong_together(fast, count: int) -> None:
    make = maker(6)
    row, static, layer = make.params(Grid.ROW), make.params(), fast.prepare(make.weight(16, 24), None)
    codes = inject(fast, make.codes(count, 5, 24), row)
    with pytest.raises(InputError, match="steps"):
        fast.linear(codes.codes, row, layer)
    with pytest.raises(InputError, match="steps"):
        fast.linear(codes, static, layer)
    with pytest.raises(InputError, match="items"):
        fast.linear(codes._replace(scale=codes.scale[:, 1:]), row, layer)
    with pytest.raises(InputError, match="items"):
        fast.quantize(make.values(count, 5, 24), row._replace(channels=torch.ones(23)))
    with pytest.raises(InputError, match="probabilities"):
        fast.linear(codes.codes, make.params(Grid.SOFTMAX_ROW), layer)


# Targets of rows and channel factors ---------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("factored", [True, False])
def test_gelu_of_rows(run, batch: int, tokens: int, width: int, heads: int, factored: bool) -> None:
    make, columns = maker(7), 2 * width + 1
    source = make.params(Grid.ROW, batch)
    then = Activation(make.params(Grid.ROW, batch, channels=columns if factored else 0))
    codes, weight, bias = make.codes(batch, tokens, width), make.weight(columns, width), make.values(columns)
    weight = weight._replace(scale=weight.scale / 50)
    known = signed_codes(codes, source)
    value = gelu(REFERENCE.product(known, source, REFERENCE.prepare(weight, bias)).double(), approximate="tanh")
    actual = run.linear(given_codes(run, known, source), source, run.prepare(weight, bias), then)
    assert_rows_up_to_ties(run, actual, value, then.target)


@each_shape
@each_gelu
def test_gelu_with_channel_factors(
    run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool
) -> None:
    make, columns = maker(8, bits), 2 * width + 1
    codes, source = make.codes(batch, tokens, width), make.params(lead=batch)
    then = Activation(make.params(grid, batch, merged=merged, channels=columns))
    weight, bias = make.weight(columns, width), make.values(columns)
    layer = REFERENCE.prepare(weight, bias)
    value = gelu(REFERENCE.product(codes, source, layer).double(), approximate="tanh") * then.target.channels
    actual = run.linear(given_codes(run, codes, source), source, run.prepare(weight, bias), then)
    assert_equal_up_to_ties(found_codes(run, actual, then.target), value, then.target)
    without = then._replace(target=then.target._replace(channels=None))
    other = run.linear(given_codes(run, codes, source), source, run.prepare(weight, bias), without)
    assert tokens == 1 or not torch.equal(other, actual)


@each_gelu
def test_quantize_with_channel_factors_is_equal(run, grid: Grid, bits: int, merged: bool) -> None:
    make = maker(9, bits)
    target, x = make.params(grid, 2, merged=merged, channels=37), make.values(2, 5, 37) * 3
    assert torch.equal(found_codes(run, run.quantize(x, target), target), REFERENCE.quantize(x, target).int())


@each_shape
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("factored", [True, False])
def test_attention_to_rows(run, batch: int, tokens: int, width: int, heads: int, bits: int, factored: bool) -> None:
    """The rows are those of exact sums with the codes of the probabilities, which `fused.attend` traces."""
    make = maker(10, bits)
    attention = make.attention(heads, Grid.SOFTMAX_ROW, batch)
    target = make.params(Grid.ROW, batch, channels=width if factored else 0)
    projected = make.codes(batch, tokens, 3 * width)
    actual = run.attend(given_codes(run, projected, attention.query), attention, target)
    if not isinstance(run, NativeCpu):
        expected = REFERENCE.attend(projected, attention, target)
        assert torch.equal(actual.scale, expected.scale)
        assert torch.equal(found_codes(run, actual), expected.codes.int())
        return
    trace = torch.empty(batch, heads, tokens, tokens, dtype=torch.int8)
    values = fused.attend(given_codes(run, projected, attention.query), attention, None, trace=trace)
    v = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)[2]
    attended = REFERENCE.values(trace, attention.softmax, v, attention.value).transpose(1, 2).flatten(2)
    assert torch.equal(values, attended)
    expected = REFERENCE.quantize(attended, target)
    assert torch.equal(actual.scale, expected.scale)
    assert torch.equal(found_codes(run, actual), expected.codes.int())


def test_attention_with_channel_factors(run) -> None:
    """A static step of the target, time groups, a context and a bias."""
    make, width = maker(11), 26
    attention = make.attention(2, Grid.SOFTMAX_ROW, 3)
    target = make.params(lead=3, reach=2.0, channels=width)
    query, context, bias = make.codes(3, 9, width), make.codes(3, 21, 2 * width), make.values(3, 21)
    expected = REFERENCE.attend(query, attention, target, context, bias)
    own = (given_codes(run, codes, attention.query) for codes in (query, context))
    query, context = own
    apart = (found_codes(run, run.attend(query, attention, target, context, bias)) - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


# Threads and batches -------------------------------------------------------------------------------------------------


def block(run: Composed, make: Maker, batch: int, members: slice = slice(None)) -> list[torch.Tensor]:
    """The calls of a block whose operands all have rows, on some members of a batch with fractions of their own."""
    tokens, width, heads = 21, 40, 2
    x, modulation = make.values(batch, tokens, width)[members], make.values(batch, 6, width)[members]
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    qkv, out, fc1, fc2 = (run.prepare(make.weight(columns, depth), make.values(columns)) for columns, depth in shapes)
    first, second, third, fourth = (gathered(make.params(Grid.ROW, batch), members) for _ in range(4))
    attention = make.attention(heads, Grid.SOFTMAX_ROW, batch)
    attention = attention._replace(
        **{name: gathered(getattr(attention, name), members) for name in ("query", "key", "value", "softmax")}
    )
    codes = run.quantize(x, first, Norm(modulation[:, 0], modulation[:, 1], 1e-6))
    attended = run.attend(run.project(codes, first, qkv, attention.projections, heads), attention, second)
    stream = run.linear(attended, second, out, Residual(x, modulation[:, 2]))
    inner = run.quantize(stream, third, Norm(modulation[:, 3], modulation[:, 4], 1e-6))
    wide = run.linear(inner, third, fc1, Activation(fourth))
    return [*codes, *attended, stream, *inner, *wide, run.linear(wide, fourth, fc2, Residual(stream, modulation[:, 5]))]


def test_neither_threads_nor_batches_change_rows(fast) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(block(fast, maker(12), 5))
    finally:
        torch.set_num_threads(before)
    parts = [block(fast, maker(12), 5, slice(i, i + 2)) for i in (0, 2, 4)]
    for index, whole in enumerate(results[0]):
        assert torch.equal(whole, results[1][index])
        assert torch.equal(whole, torch.cat([part[index] for part in parts]))


@pytest.mark.parametrize("tokens", [64, 200])
def test_samples_that_fill_a_cache_are_coded_one_after_the_other(fast, tokens: int) -> None:
    """Two of three samples together, or each alone, as all floats first and then all codes."""
    make, width = maker(15), 1600
    attention, row = make.attention(20, Grid.SOFTMAX_ROW, 3), make.params(Grid.ROW, 3)
    target, source = make.params(Grid.ROW, 3, channels=width), make.params(lead=3)
    projected = given_codes(fast, make.codes(3, tokens, 3 * width), source)
    layer, codes = fast.prepare(make.weight(width, 32), make.values(width)), make.codes(3, tokens, 32)
    hidden = inject(fast, codes, row)
    pairs = [
        (fast.attend(projected, attention, target), fast.quantize(fused.attend(projected, attention, None), target)),
        (
            fast.linear(hidden, row, layer, Activation(target)),
            fused.quantize(fast.linear(hidden, row, layer), target, gelu=True),
        ),
    ]
    for together, apart in pairs:
        assert torch.equal(together.scale, apart.scale)
        assert torch.equal(together.codes, apart.codes)


def test_a_block_of_rows_is_near_to_its_float_values(run) -> None:
    """Against the reference's block, whose codes differ at ties only."""
    actual, expected = block(run, maker(13), 2)[-1], block(REFERENCE, maker(13), 2)[-1]
    assert (actual - expected).abs().mean() < 0.01 * expected.abs().mean()
