"""Operations on codes of rows, on softmax rows, and with channel factors: the reference and its simulated twin."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from tqdit.ops import quantizer, reference, simulated
from tqdit.ops.composed import Composed
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, AttentionParams, Norm, OperandParams, RowCodes, WeightParams
from tqdit.ops.simulated import Simulated
from tqdit.ops.tables import operand as table_of
from tqdit.spec import Grid, GridParams, Role, SiteSpec

BATCH, TOKENS, INNER, OUT, HEADS, HEAD = 3, 5, 70, 9, 2, 8
WIDTH = HEADS * HEAD
EPILOGUE = 8 * 2.0**-24  # the roundings of an epilogue after an exact accumulator


def gamma(k: int) -> float:
    """Relative error of an fp32 sum of k products; see `ops.simulated`."""
    return (k + 4) * 2.0**-24


def rows(bits: int = 8, channels: torch.Tensor | None = None) -> OperandParams:
    spec = SiteSpec("x", Role.INPUT, bits, Grid.ROW)
    return table_of(GridParams(spec, torch.tensor([[1 / (2 ** (bits - 1) - 1)]]), channels=channels))


def softmax_rows(bits: int = 8) -> OperandParams:
    spec = SiteSpec("p", Role.SOFTMAX, bits, Grid.SOFTMAX_ROW)
    return table_of(GridParams(spec, torch.tensor([[1 / (2**bits - 1)]])))


def real(weight: WeightParams) -> torch.Tensor:
    return weight.codes.double() * weight.scale.double()[:, None]


@pytest.fixture
def row_codes() -> RowCodes:
    """Codes of any value; steps of very different size."""
    codes = torch.randint(-128, 128, (BATCH, TOKENS, INNER), dtype=torch.int8)
    return RowCodes(codes, torch.rand(BATCH, TOKENS) * torch.logspace(-3, 3, TOKENS) + 1e-4)


@pytest.fixture(params=[Reference, Simulated])
def run(request: pytest.FixtureRequest) -> Composed:
    return request.param()


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_of_rows(weight, row_codes: RowCodes, per_channel: bool, with_bias: bool) -> None:
    """The reference within the roundings of its epilogue, the twin within the bound of an fp32 sum."""
    w, bias = weight(OUT, INNER, per_channel), torch.randn(OUT) if with_bias else None
    x = row_codes.codes.double() * row_codes.scale.double()[..., None]
    expected, magnitude = x @ real(w).t(), x.abs() @ real(w).abs().t()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    exact, twin = (module.linear(row_codes, rows(), w, bias) for module in (reference, simulated))
    assert exact.dtype is twin.dtype is torch.float32
    assert ((exact.double() - expected).abs() <= EPILOGUE * magnitude).all()
    assert ((exact.double() - twin.double()).abs() <= gamma(INNER) * magnitude).all()


def test_a_row_of_nan_or_inf_stays_visible_and_alone(run, weight) -> None:
    x = torch.randn(1, 3, INNER)
    layer = run.prepare(weight(OUT, INNER), torch.randn(OUT))
    expected = run.linear(run.quantize(x, rows()), rows(), layer)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[0, 1, 7] = value
        y = run.linear(run.quantize(x, rows()), rows(), layer)
        assert not torch.isfinite(y[0, 1]).any()
        assert torch.equal(y[0, ::2], expected[0, ::2])


def test_a_row_of_zeros_is_the_bias(run, weight) -> None:
    bias, codes = torch.randn(OUT), run.quantize(torch.zeros(1, 2, INNER), rows())
    assert torch.equal(run.linear(codes, rows(), run.prepare(weight(OUT, INNER), bias)), bias.expand(1, 2, -1))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_of_a_modulated_layernorm(run, bits: int) -> None:
    """Steps are of the modulated rows, not of x."""
    x, shift, scale = torch.randn(BATCH, TOKENS, WIDTH) * 3 + 5, torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    made = run.quantize(x, rows(bits), Norm(shift, scale, 1e-6))
    y = layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    top = 2 ** (bits - 1) - 1
    assert torch.allclose(made.scale, y.abs().amax(-1) / top, rtol=1e-5, atol=0)
    assert (made.codes.abs().amax(-1) == top).all()
    values = quantizer.dequantize(made, rows(bits))
    assert ((values - y).abs() <= made.scale[..., None] * (0.5 + 1e-3)).all()


def test_linear_then_the_rows_of_gelu(run, weight, row_codes: RowCodes) -> None:
    """What `quantize` returns, ready for the next layer."""
    w = weight(OUT, INNER)
    layer = run.prepare(w._replace(scale=w.scale / 500), torch.randn(OUT))
    y = run.linear(row_codes, rows(), layer)
    made = run.linear(row_codes, rows(), layer, Activation(rows(6)))
    expected = quantizer.quantize(gelu(y, approximate="tanh"), rows(6))
    assert torch.equal(made.codes, expected.codes)
    assert torch.equal(made.scale, expected.scale)


def test_project_from_rows(run, operand, weight, row_codes: RowCodes) -> None:
    targets = [operand((1,), units=HEADS, size=300.0)[1] for _ in range(3)]
    layer = run.prepare(weight(3 * WIDTH, INNER), torch.randn(3 * WIDTH))
    y = run.linear(row_codes, rows(), layer)
    projected = run.project(row_codes, rows(), layer, targets, HEADS)
    assert projected.dtype is torch.int8
    for part, target in enumerate(targets):
        own = y[..., part * WIDTH : (part + 1) * WIDTH].unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        expected = quantizer.quantize(own, target).transpose(1, 2).flatten(2)
        assert torch.equal(projected[..., part * WIDTH : (part + 1) * WIDTH], expected)


# Softmax rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lead", [1, BATCH])
def test_values_of_softmax_rows(operand, exact, bits: int, lead: int) -> None:
    """P V = s_v sum(c (v - z)) / sum(c), whatever the codes are."""
    counts = torch.randint(0, 2**bits, (BATCH, HEADS, TOKENS, 7))
    counts[..., 0] = 2**bits - 1  # the largest value of each row
    p = (counts - 2 ** (bits - 1)).to(torch.int8)
    v, v_params = operand((BATCH, HEADS, 7, HEAD), lead=lead, units=HEADS)
    x = counts.double() / counts.sum(-1, keepdim=True)
    real_v = exact(v, v_params)
    magnitude = x @ real_v.abs()
    ours, twin = (module.values(p, softmax_rows(bits), v, v_params) for module in (reference, simulated))
    assert ours.dtype is torch.float32
    assert ((ours.double() - x @ real_v).abs() <= EPILOGUE * magnitude).all()
    assert ((ours.double() - twin.double()).abs() <= gamma(7) * magnitude).all()


def test_values_that_are_all_alike_are_kept(operand) -> None:
    """A row sums to 1 exactly: the weighted mean of one value is that value, up to two roundings."""
    v = torch.full((1, 1, 64, HEAD), 77, dtype=torch.int8)
    _, params = operand((1,), units=1)
    e = torch.rand(1, 1, 20, 64)
    e = e / e.amax(-1, keepdim=True)
    p = quantizer.quantize(e, softmax_rows())
    expected = quantizer.dequantize(v, params)[0, 0, 0, 0]
    assert torch.allclose(reference.values(p, softmax_rows(), v, params), expected, rtol=3 * 2.0**-24, atol=0)


class Watched(Reference):
    """Keeps the probability codes that it was given last."""

    seen: torch.Tensor

    def values(self, p: torch.Tensor, *rest) -> torch.Tensor:  # type: ignore[override]
        self.seen = p
        return super().values(p, *rest)


@pytest.fixture
def attention(operand) -> Callable[[], AttentionParams]:
    def make() -> AttentionParams:
        q, k, v = (operand((1,), lead=BATCH, units=HEADS, size=0.15, zeros=30)[1] for _ in range(3))
        return AttentionParams(q, k, v, softmax_rows(), HEADS)

    return make


def test_attend_is_close_to_the_float_attention(run, attention, operand, exact) -> None:
    """Codes of 8 bits for e / max e: within half a step in 255, and the error of their sum."""
    params, target = attention(), operand((1,), size=0.05, zeros=30)[1]
    own = torch.randint(-128, 128, (BATCH, TOKENS, 3 * WIDTH), dtype=torch.int8)
    parts = [part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in own.split(WIDTH, -1)]
    q, k, v = (exact(codes, params[i]) for i, codes in enumerate(parts))
    scores = q @ k.transpose(-1, -2) / HEAD**0.5
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    counts = torch.round(e * 255)
    expected = ((counts / counts.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)
    codes = run.attend(own, params, target)
    wanted = quantizer.quantize(expected.float(), target)
    assert (codes.int() - wanted.int()).abs().max() <= 2
    assert (codes != wanted).float().mean() < 0.05
    assert wanted.unique().numel() > 30, "the target would not show an error"


def test_attend_may_write_rows(run, attention) -> None:
    own = torch.randint(-128, 128, (BATCH, TOKENS, 3 * WIDTH), dtype=torch.int8)
    made = run.attend(own, attention(), rows())
    assert isinstance(made, RowCodes)
    assert made.scale.shape == (BATCH, TOKENS)
    assert (made.codes.abs().amax(-1) == 127).all()


def test_discarded_tokens_count_nothing(attention, operand) -> None:
    run, params, target = Watched(), attention(), operand((1,), size=0.05, zeros=30)[1]
    own = torch.randint(-128, 128, (BATCH, TOKENS, WIDTH), dtype=torch.int8)
    context = torch.randint(-128, 128, (BATCH, 7, 2 * WIDTH), dtype=torch.int8)
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    masked = run.attend(own, params, target, context, (~kept).float().expand(BATCH, -1) * -10000.0)
    assert (run.seen[..., ~kept] == -128).all()
    assert (run.seen.amax(-1) == 127).all()
    alone = run.attend(own, params, target, context[:, kept])
    assert (masked.int() - alone.int()).abs().max() <= 1
    assert (masked != alone).float().mean() < 0.02


# Channel factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_GELU, Grid.ROW])
def test_a_weight_divided_by_the_factors_gives_the_product_of_the_values(run, operand, grid: Grid) -> None:
    """W x = (W / channels) (channels x). Powers of two change no bit of the codes' values."""
    channels = 2.0 ** torch.randint(-3, 4, (INNER,))
    params = rows() if grid is Grid.ROW else operand((1,), grid, size=2.0)[1]
    x, w = torch.randn(BATCH, TOKENS, INNER), torch.randint(-100, 101, (OUT, INNER), dtype=torch.int8)
    coded = quantizer.quantize(x, params._replace(channels=channels))
    values = quantizer.dequantize(coded, params) / channels
    same = quantizer.quantize(x * channels, params)
    pairs = zip(coded, same, strict=True) if isinstance(coded, RowCodes) else [(coded, same)]
    assert all(torch.equal(mine, other) for mine, other in pairs)
    layer = run.prepare(WeightParams(w, torch.rand(OUT) + 0.1, 8), None)
    y = run.linear(coded, params._replace(channels=channels), layer)
    original = w.double() * layer.scale.double()[:, None] * channels.double()  # the weight before it was divided
    expected = values.double() @ original.t()
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_factors_make_small_channels_fine(operand) -> None:
    """What they are for: a channel a hundredth of the others is coded with as many levels."""
    x = torch.randn(BATCH, TOKENS, 8) * torch.tensor([1.0] * 7 + [0.01])
    params = operand((1,), size=0.3, zeros=1)[1]
    factors = torch.tensor([1.0] * 7 + [100.0])
    errors = []
    for channels in (None, factors):
        own = params._replace(channels=channels)
        values = quantizer.dequantize(quantizer.quantize(x, own), own) / (1.0 if channels is None else channels)
        errors.append((values - x)[..., 7].abs().mean())
    assert errors[1] < errors[0] / 20


def test_activation_with_factors(run, weight, row_codes: RowCodes) -> None:
    """fc1's epilogue: codes of channels times GELU's values."""
    channels = torch.rand(OUT) + 0.5
    w = weight(OUT, INNER)
    layer = run.prepare(w._replace(scale=w.scale / 500), None)
    made = run.linear(row_codes, rows(), layer, Activation(rows(8, channels)))
    y = gelu(run.linear(row_codes, rows(), layer), approximate="tanh")
    assert torch.equal(made.codes, quantizer.quantize(y * channels, rows()).codes)
