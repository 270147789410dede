"""Grids of rows, softmax rows and channel factors in every kernel, against `ops.reference`: on a GPU or interpreted.

Steps of rows without a norm, accumulators and linear layers are equal bit for bit; after LayerNorm, GELU and exp a code
may differ by one step where the value is within `ties.TIE` steps of a boundary. `test_hopper_rows` has the kernels for
Hopper.
"""

from typing import Any

import pytest
import torch
from layouts import as_projected, each_shape, from_projected, padded, read, to, traced, without_gpu
from operands import Maker, as_operand, maker
from ties import TIE, assert_equal_up_to_ties

from poisoned import PoisonedTorch

pytest.importorskip("triton")
from tqdit.backends.triton import candidates, configurations, launch, naming, operators, tuning
from tqdit.backends.triton.backend import PackedTritonBackend, TritonBackend
from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.layouts import Config, Weight
from tqdit.errors import InputError
from tqdit.grids.uniform import SMALLEST
from tqdit.ops.composed import split_heads
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, AttentionParams, Norm, OperandParams, Residual, RowCodes, WeightParams
from tqdit.spec import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = Reference()
each_backend = pytest.mark.parametrize("run", [TritonBackend(), PackedTritonBackend()], ids=lambda b: b.NAME)
each_stream = pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_bits = pytest.mark.parametrize("bits", [8, 6, 4])
no_numbers = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
each_config = pytest.mark.parametrize("config", [Config(32, 0, 64), Config(64, 0, 256, blocks=4)], ids=["tiles", "one"])


LINEAR_CONFIGS = [Config(32, 32, 64), Config(32, 64, 64, 2, piece=32), Config(16, 64, 128, piece=16)]
NORM_CONFIGS = [Config(2, 0, 0, blocks=2), Config(1, 0, 0, stages=1), Config(4, 0, 0, stages=1)]
if DEVICE.type == "cuda":
    LINEAR_CONFIGS = candidates.linear(16, False, 8) + candidates.linear(16384, False, 8)
    NORM_CONFIGS = list(dict.fromkeys(candidates.norm(512, 1152) + candidates.norm(16384, 1152)))


@pytest.fixture(autouse=True)
def poisoned_and_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "torch", PoisonedTorch())
    if DEVICE.type == "cuda":
        monkeypatch.setattr(tuning, "choose", lambda key, device, candidates, run: candidates()[0])


def row_operand(bits: int = 8, share: float = 1.0, lead: int = 1) -> OperandParams:
    """The grid of rows, whose step reaches a share of the largest magnitude; `lead`: samples in groups of their own."""
    shares = share * torch.linspace(1, 0.8, lead + 1)[:, None] if lead > 1 else torch.full((1, 1), share)
    group = torch.arange(lead, 0, -1) if lead > 1 else None
    return as_operand(Grid.ROW, bits, shares / ((1 << (bits - 1)) - 1), None)._replace(group=group)


def softmax_row(bits: int = 8) -> OperandParams:
    return as_operand(Grid.SOFTMAX_ROW, bits, torch.full((1, 1), 1 / ((1 << bits) - 1)), None)


def special_rows(x: torch.Tensor) -> torch.Tensor:
    """x with a row of zeros, one with a NaN, one with an Inf and one of tiny numbers, where it has as many rows."""
    rows = x.flatten(0, 1)
    for row, value in zip(range(0, len(rows), 2), (0.0, torch.nan, -torch.inf), strict=False):
        rows[row, -1] = value
    rows[0] = 0
    if len(rows) > 6:
        rows[6] *= 2.0**-121
    return rows.view_as(x)


def row_codes(make: Maker, batch: int, tokens: int, width: int) -> tuple[RowCodes, RowCodes]:
    """Codes of rows with steps of many magnitudes for the reference, and on the device in the layout of kernels."""
    codes = make.codes(batch, tokens, width)
    scale = make.values(batch, tokens).abs() * 0.03 + 1e-3
    return RowCodes(codes, scale), RowCodes(to(DEVICE, padded(codes)), to(DEVICE, scale))


def prepared(run: TritonBackend, weight: WeightParams, bias: torch.Tensor | None):
    return run.prepare(weight, bias).to(DEVICE)


# Codes of floats ----------------------------------------------------------------------------------------------------


@no_numbers
@each_shape
@each_bits
@each_stream
def test_rows_are_quantized_as_by_the_reference(batch, tokens, width, heads, bits: int, stream: torch.dtype) -> None:
    """Steps and codes are equal, those of rows of zeros and of tiny numbers too; NaN and Inf are in the step."""
    x, target = special_rows(maker(0).values(batch, tokens, width) * 3).to(stream), row_operand(bits, 0.9, batch)
    expected = quantize(x, target)
    found = TritonBackend().quantize(to(DEVICE, x), to(DEVICE, target))
    assert isinstance(found, RowCodes)
    assert torch.equal(found.scale.cpu().nan_to_num(nan=-1.0), expected.scale.nan_to_num(nan=-1.0))
    sound = torch.isfinite(expected.scale)
    assert torch.equal(read(found.codes, width)[sound], expected.codes.int()[sound])
    assert found.scale.flatten()[0] == SMALLEST
    assert not read(found.codes, width)[0, 0].any()


def test_long_rows_are_quantized_in_pieces() -> None:
    x, target = maker(0).values(2, 3, 300), row_operand()
    expected = quantize(x, target)
    for config in (Config(1, 64, 0), Config(4, 512, 0)):
        found = launch.quantize(to(DEVICE, x), to(DEVICE, target), config)
        assert torch.equal(found.scale.cpu(), expected.scale)
        assert torch.equal(read(found.codes, 300), expected.codes.int())


@pytest.mark.parametrize("config", NORM_CONFIGS, ids=lambda c: f"{c.block_m}x{c.blocks}-{c.warps}-{c.stages}")
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "stream"),
    [
        without_gpu(*sizes, stream, fast=stream is usually)
        for *sizes, usually in [
            (2, 16, 24, torch.float32), (1, 4, 1152, torch.float32), (2, 11, 300, torch.bfloat16),
            (5, 1, 37, torch.float32),
        ]
        for stream in (torch.float32, torch.bfloat16)
    ],
)  # fmt: skip
def test_rows_after_a_norm(config: Config, batch: int, tokens: int, width: int, stream: torch.dtype) -> None:
    """A row's own step reaches its largest number; the codes follow from it, up to ties."""
    make = maker(1)
    x = (make.values(batch, tokens, width) * 3 + 1).to(stream)
    shift, scale, *_ = make.values(batch, 6 * width).chunk(6, dim=1)
    target = row_operand(8, 0.9, batch)
    found = launch.norm_quantize(to(DEVICE, x), Norm(to(DEVICE, shift), to(DEVICE, scale), 1e-6), to(DEVICE, target),
                                 config)  # fmt: skip
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = normal * (1 + scale.double()[:, None]) + shift.double()[:, None]
    fraction = target.selected()[:, :1, :1].double()
    assert ((found.scale.cpu() / (value.abs().amax(-1) * fraction[..., 0]) - 1).abs() < 2.0**-20).all()
    assert_near(read(found.codes, width), value / found.scale.cpu().double()[..., None])


def assert_near(codes: torch.Tensor, steps: torch.Tensor, bits: int = 8, tie: float = TIE) -> None:
    """`codes` are those of a number of steps, up to ties."""
    half = 1 << (bits - 1)
    below, above = (torch.round(steps + offset).clamp(-half, half - 1) for offset in (-tie, tie))
    assert ((codes >= below) & (codes <= above)).all()


@no_numbers
@each_stream
def test_rows_that_are_no_numbers_stay_so(stream: torch.dtype) -> None:
    """A norm makes NaN of NaN and Inf, also where the modulation has them; the products with such a row are NaN."""
    make, run, width = maker(2), TritonBackend(), 40
    x = special_rows(make.values(2, 5, width)).to(stream)
    shift, scale = make.values(2, width).to(DEVICE), make.values(2, width).to(DEVICE)
    shift[1, 3] = torch.nan
    target = to(DEVICE, row_operand())
    found = run.quantize(to(DEVICE, x), target, Norm(shift, scale, 1e-6))
    plain = run.quantize(to(DEVICE, x), target)
    layer = prepared(run, make.weight(24, width), None)
    for codes, sound in ((found, x[:1].isfinite().all(-1)), (plain, x.isfinite().all(-1))):
        numbers = run.linear(codes, target, layer).isfinite().cpu()
        assert torch.equal(numbers.all(-1)[: len(sound)], sound)
        assert torch.equal(numbers.any(-1)[: len(sound)], sound)
    assert found.scale[1].isnan().all()


def test_channel_factors_before_the_codes_of_floats() -> None:
    """No kernel that reads floats has them; they are multiplied in before, and after a norm."""
    make, run, width = maker(3), TritonBackend(), 24
    x, channels = make.values(2, 5, width), make.values(width).abs() + 0.1
    norm = Norm(make.values(2, width), make.values(2, width), 1e-6)
    for plain in (make.params(), row_operand()):
        target = plain._replace(channels=channels)
        expected, found = quantize(x, target), run.quantize(to(DEVICE, x), to(DEVICE, target))
        if target.grid is Grid.ROW:
            expected, found = expected.codes, found.codes
        assert torch.equal(read(found, width), expected.int())
        codes = REFERENCE.quantize(x, target, norm)
        there = run.quantize(to(DEVICE, x), to(DEVICE, target), Norm(*(to(DEVICE, n) for n in norm[:2]), 1e-6))
        if target.grid is Grid.ROW:
            codes, there = codes.codes, there.codes
        assert (read(there, width) - codes.int()).abs().max() <= 1


# Linear layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "batch", "tokens", "width", "heads"),
    [(TritonBackend(), 1, 1, 16, 1), (TritonBackend(), 3, 17, 40, 2), (TritonBackend(), 1, 64, 72, 1),
     (PackedTritonBackend(), 2, 5, 24, 3), (PackedTritonBackend(), 3, 17, 40, 2)],
)  # fmt: skip
def test_layers_that_read_rows_are_equal(run, batch, tokens, width, heads) -> None:
    """Without an epilogue, with a residual, and to heads: the reference's results bit for bit."""
    make, source = maker(4), row_operand()
    codes, given = row_codes(make, batch, tokens, width)
    weight, bias = make.weight(3 * width, width), make.values(3 * width)
    if run.PACKED:
        weight = weight._replace(codes=weight.codes >> 4, bits=4)
    layer, plain = prepared(run, weight, bias), REFERENCE.prepare(weight, bias)
    there = to(DEVICE, source)
    assert torch.equal(run.linear(given, there, layer).cpu(), REFERENCE.linear(codes, source, plain))
    x, gate = make.values(batch, tokens, 3 * width), make.values(batch, 3 * width)
    for then in (Residual(x, gate), Residual(x.bfloat16(), gate), Residual(x)):
        out = run.linear(given, there, layer, to(DEVICE, then))
        assert torch.equal(out.cpu(), REFERENCE.linear(codes, source, plain, then))
    targets = make.attention(heads, Grid.UNIFORM, batch).projections
    expected = REFERENCE.project(codes, source, plain, targets, heads)
    found = run.project(given, there, layer, [to(DEVICE, target) for target in targets], heads)
    assert torch.equal(from_projected(found, 3, heads), expected.int())


@pytest.mark.parametrize("config", LINEAR_CONFIGS, ids=lambda c: "-".join(map(str, c)))
def test_rows_of_every_configuration(config: Config) -> None:
    make, batch, tokens, width = maker(5), 2, 24, 96
    codes, given = row_codes(make, batch, tokens, width)
    weight, bias = make.weight(width, width), make.values(width)
    layer = prepared(TritonBackend(), weight, bias)
    tensors = Weight(layer.codes, layer.high, layer.scale, layer.bias, layer.sums, width, 8)
    out = launch.plain(given, to(DEVICE, row_operand()), tensors, config)
    assert torch.equal(out.cpu(), REFERENCE.linear(codes, row_operand(), REFERENCE.prepare(weight, bias)))


def test_a_row_of_zeros_gives_the_bias() -> None:
    make, run = maker(6), TritonBackend()
    bias, target = make.values(20), to(DEVICE, row_operand())
    codes = run.quantize(torch.zeros(1, 3, 24, device=DEVICE), target)
    out = run.linear(codes, target, prepared(run, make.weight(20, 24), bias))
    assert torch.equal(out.cpu(), bias.expand(1, 3, -1))


@each_backend
@pytest.mark.parametrize("by_row", [False, True], ids=["static", "rows"])
@pytest.mark.parametrize("factors", [False, True], ids=["plain", "channels"])
@pytest.mark.parametrize(
    ("grid", "bits", "merged"), [(Grid.UNIFORM, 8, False), (Grid.MRQ_GELU, 8, False), (Grid.MRQ_GELU, 6, True)]
)
def test_gelu_with_channel_factors(run, grid: Grid, bits: int, merged: bool, by_row: bool, factors: bool) -> None:
    """Codes of gelu(y) times the factor of its channel, up to ties; of codes of rows or of a static grid."""
    make, eight, batch, tokens, width, hidden = maker(7, bits), maker(8), 2, 9, 40, 70
    if by_row:
        source = row_operand()
        codes, given = row_codes(eight, batch, tokens, width)
    else:
        source, codes = eight.params(lead=batch), eight.codes(batch, tokens, width)
        given = to(DEVICE, padded(codes))
    target = make.params(grid, batch, merged=merged)
    if factors:
        target = target._replace(channels=eight.values(hidden).abs() + 0.2)
    weight, bias = eight.weight(hidden, width), eight.values(hidden)
    y = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias)).double()
    value = torch.nn.functional.gelu(y, approximate="tanh") * (target.channels.double() if factors else 1)
    found = run.linear(given, to(DEVICE, source), prepared(run, weight, bias), Activation(to(DEVICE, target)))
    assert_equal_up_to_ties(read(found, hidden, target), value, target)


def test_rows_after_gelu() -> None:
    """The values leave the kernel in fp32; the step is that of the values times their channels' factors."""
    make, run, hidden = maker(9), TritonBackend(), 70
    codes, given = row_codes(make, 2, 5, 40)
    target = row_operand()._replace(channels=make.values(hidden).abs() + 0.2)
    weight, bias = make.weight(hidden, 40), make.values(hidden)
    expected = REFERENCE.linear(codes, row_operand(), REFERENCE.prepare(weight, bias), Activation(target))
    there = to(DEVICE, row_operand()), prepared(run, weight, bias), Activation(to(DEVICE, target))
    found = run.linear(given, *there)
    assert torch.allclose(found.scale.cpu(), expected.scale, rtol=2.0**-18)
    assert (read(found.codes, hidden) - expected.codes.int()).abs().max() <= 1


# Attention ----------------------------------------------------------------------------------------------------------


def exact_powers(q, k, params: AttentionParams, head_dim: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """exp(s - max s) of codes of queries and keys, in fp64.

    Codes times scales are fp64, too: large scales would make their roundings visible.
    """
    query, key = (operand._replace(table=operand.table.double()) for operand in (params.query, params.key))
    scores = dequantize(q, query).double() @ dequantize(k, key).double().transpose(-1, -2)
    scores = scores * head_dim**-0.5 + (0 if bias is None else bias.double()[:, None, None])
    return (scores - scores.amax(-1, keepdim=True)).exp()


def check_softmax_rows(make, batch, tokens, keys, heads, head_dim, config, bits=8, cross=False, bias=None, coded=True):
    """Codes of the powers up to ties; given those, P V and its codes, or its fp32 values, exactly."""
    width, lead = heads * head_dim, batch
    params = make.attention(heads, Grid.UNIFORM, lead)._replace(softmax=softmax_row(bits))
    target = make.params(lead=lead, reach=2.0)
    x = make.codes(batch, tokens, width if cross else 3 * width)
    other = make.codes(batch, keys, 2 * width) if cross else x[..., width:]
    trace = torch.full((batch, heads, tokens, keys), 55, dtype=torch.int8, device=DEVICE)
    operands = tuple(to(DEVICE, p) for p in (*params.projections, params.softmax, *((target,) if coded else ())))
    given = as_projected(to(DEVICE, x), 1 if cross else 3, heads)
    context = as_projected(to(DEVICE, other), 2, heads) if cross else None
    added = None if bias is None else to(DEVICE, bias)
    actual = launch.attend(given, context, added, heads, operands, config, trace)
    codes = traced(trace.cpu(), params.softmax)
    (q,), (k, v) = split_heads(x[..., :width], 1, heads), split_heads(other, 2, heads)
    powers = exact_powers(q, k, params, head_dim, bias)
    tie = TIE if bias is None else TIE + 256 * 8 * 2.0**-24
    half = 1 << (bits - 1)
    assert_near(codes.int(), powers * (2 * half - 1) - half, bits, tie)
    attended = REFERENCE.values(codes, params.softmax, v, params.value).transpose(1, 2).flatten(2)
    if coded:
        assert torch.equal(read(actual, width), quantize(attended, target).int())
    else:
        assert torch.equal(actual.cpu(), attended)


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "heads", "bits"),
    [(1, 1, 16, 1, 8), (2, 5, 24, 3, 4), (3, 17, 40, 2, 8), (1, 64, 144, 2, 8), (1, 113, 34, 1, 6), (2, 150, 32, 1, 8)],
)
@each_config
def test_softmax_rows(batch, tokens, width, heads, bits: int, config: Config) -> None:
    check_softmax_rows(maker(10), batch, tokens, tokens, heads, width // heads, config, bits)


@pytest.mark.parametrize(
    ("biased", "coded"),
    [without_gpu(biased, coded, fast=biased != coded) for biased in (False, True) for coded in (False, True)],
)
@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads", "head_dim"), [(2, 5, 1, 3, 6), (1, 37, 3, 2, 72), (2, 3, 150, 2, 16)]
)
@each_config
def test_softmax_rows_of_a_context(batch, tokens, keys, heads, head_dim, config, biased: bool, coded: bool) -> None:
    make = maker(11)
    bias = make.values(batch, keys) if biased else None
    if biased:
        bias[:, 2::3] = -10000.0  # hidden keys
    check_softmax_rows(make, batch, tokens, keys, heads, head_dim, config, 8, True, bias, coded)


@pytest.mark.parametrize("softmax", [softmax_row(), None], ids=["softmax rows", "uniform"])
def test_rows_after_attention(softmax: OperandParams | None) -> None:
    """The attended values leave the kernel in fp32, and are quantized by rows; so are those with channel factors."""
    make, run, heads, head_dim = maker(12), TritonBackend(), 2, 24
    params = make.attention(heads, Grid.UNIFORM, 2)
    params = params._replace(softmax=softmax or params.softmax)
    width = heads * head_dim
    qkv = make.codes(2, 17, 3 * width)
    given = as_projected(to(DEVICE, qkv), 3, heads)
    expected = REFERENCE.attend(qkv, params, row_operand())
    found = run.attend(given, to(DEVICE, params), to(DEVICE, row_operand()))
    assert torch.allclose(found.scale.cpu(), expected.scale, rtol=0.02)
    difference = read(found.codes, width) - expected.codes.int()
    assert difference.abs().max() <= 2
    assert (difference != 0).float().mean() < 0.1
    target = make.params(reach=2.0)._replace(channels=make.values(width).abs() + 0.5)
    found = run.attend(given, to(DEVICE, params), to(DEVICE, target))
    assert (read(found, width) != REFERENCE.attend(qkv, params, target)).float().mean() < 0.02


def test_projections_to_rows_are_an_error() -> None:
    make, run = maker(13), TritonBackend()
    layer = prepared(run, make.weight(48, 16), None)
    codes = to(DEVICE, padded(make.codes(1, 4, 16)))
    with pytest.raises(InputError, match="'triton' projects to heads on static grids"):
        run.project(codes, to(DEVICE, make.params()), layer, [to(DEVICE, row_operand())] * 3, 2)


# What surrounds the kernels -----------------------------------------------------------------------------------------


def test_operators_have_true_fake_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, tuple[Any, ...]]] = []
    names = "quantize_rows", "norm_quantize_rows", "project", "attend", "linear", "linear_residual", "linear_activation"
    for name in names:

        def record(*args: Any, operator: Any = getattr(operators, name)) -> Any:
            called.append((operator, args))
            return operator(*args)

        monkeypatch.setattr(operators, name, record)
    make, run, rows = maker(14), TritonBackend(), to(DEVICE, row_operand())
    attention = make.attention(2, Grid.UNIFORM)._replace(softmax=softmax_row())
    x, norm = make.values(2, 5, 20).to(DEVICE), Norm(*make.values(2, 2, 20).to(DEVICE), 1e-6)
    layer = prepared(run, make.weight(60, 20), None)
    run.quantize(x, rows)
    codes = run.quantize(x, rows, norm)
    run.attend(run.project(codes, rows, layer, to(DEVICE, attention)[:3], 2), to(DEVICE, attention), rows)
    run.linear(codes, rows, layer)
    run.linear(codes, rows, layer, Residual(torch.zeros(2, 5, 60, device=DEVICE)))
    target = to(DEVICE, make.params()._replace(channels=torch.ones(60)))
    run.linear(codes, rows, layer, Activation(target))
    assert len(called) == 6
    for operator, args in called:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_new_forms_take_the_configuration_of_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys are their own; where only today's are known, those serve, and nothing is timed."""
    sizes = 512, 3456, 1152, 8, False, 128
    static = naming.linear_key("heads", *sizes)
    assert static == "linear heads 512x3456x1152, 8 bits, 1 products, Hopper tiles of 128 rows"
    assert naming.norm_key(512, 1152, torch.bfloat16) == "norm bfloat16 512x1152"
    keys = [naming.linear_key(name, *sizes, rows) for rows in (True, False) for name in ("gelu-channels", "gelu")]
    assert len({static, *keys}) == 5
    assert naming.epilogues(naming.activation(True)) == ("gelu-channels", "gelu")
    assert naming.epilogues("residual") == ("residual",)
    softmax, uniform = rounding.SOFTMAX_ROW.value, rounding.UNIFORM.value
    assert naming.modes(softmax) == (softmax, uniform)
    assert naming.modes(uniform) == (uniform,)
    known: dict[str, Config] = {}
    monkeypatch.setattr(tuning, "NATIVE", True)
    monkeypatch.setattr(configurations, "table", lambda gpu: known)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for key, config in (
        (keys[3], Config(64, 64, 128)),
        (keys[1], Config(64, 128, 128)),
        (keys[0], Config(128, 64, 128)),
    ):
        known[key] = config
        assert tuning.choose(keys, torch.device("cuda"), list, lambda config: None) == config
