"""Every kernel against `ops.reference`: on a GPU, or in Triton's interpreter where there is none.

Sums and codes are equal; where a float operation is rounded differently (LayerNorm, GELU, exp), a code may differ by
one step where the value is within `ties.TIE` steps of a rounding boundary.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import (
    EVERY_SHAPE,
    SHAPE,
    as_projected,
    each_pair,
    each_shape,
    from_projected,
    padded,
    read,
    stored,
    to,
    traced,
    without_gpu,
)
from operands import as_operand, maker
from ties import GELU, KIND, SOFTMAX, TIE, assert_equal_up_to_ties, each_gelu, each_softmax

from poisoned import PoisonedTorch

pytest.importorskip("triton")
from tqdit.backends.triton import candidates, float_launch, launch, tuning
from tqdit.backends.triton.backend import PackedTritonBackend, TritonBackend
from tqdit.backends.triton.float_launch import FEW_ROWS
from tqdit.backends.triton.layer import TritonLinear
from tqdit.backends.triton.layouts import Config, Weight
from tqdit.ops.composed import probabilities, split_heads
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, Norm, Residual, WeightParams
from tqdit.ops.tables import ZERO
from tqdit.spec import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = Reference()
BIASED = TIE + 256 * 8 * 2.0**-24  # scores to some tens, whose sum with the bias is rounded
CONFIGS = {"tiles": Config(32, 0, 64), "one": Config(64, 0, 256, blocks=4)}
BACKENDS = {backend.NAME: backend for backend in (TritonBackend(), PackedTritonBackend())}
each_config = pytest.mark.parametrize("config", CONFIGS)
each_backend = pytest.mark.parametrize("run", BACKENDS.values(), ids=list(BACKENDS))
each_stream = pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def first_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests time nothing; `test_results_do_not_depend_on_the_configuration` has the others."""
    if DEVICE.type == "cuda":
        monkeypatch.setattr(tuning, "choose", lambda key, device, candidates, run: candidates()[0])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launch, float_launch):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


def on_device(layer):
    return layer.to(DEVICE)


def narrow(weight: WeightParams, bits: int) -> WeightParams:
    """The same with codes of fewer bits."""
    codes = weight.codes >> (8 - bits)
    return weight._replace(codes=codes, bits=bits, colsum=codes.sum(1, dtype=torch.int32))


any_sums = given(
    batch=st.integers(1, 3), tokens=st.integers(1, 40), k=st.integers(1, 300), n=st.integers(1, 150),
    zero=st.integers(-128, 127), bits=st.sampled_from([8, 6, 4]), packed=st.booleans(), extreme=st.booleans(),
    seed=st.integers(0, 2**20),
)  # fmt: skip


@any_sums
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sums_are_exact(**drawn: Any) -> None:
    assert_exact_sums(**drawn)


@pytest.mark.long
@any_sums
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_more_sums_are_exact(**drawn: Any) -> None:
    assert_exact_sums(**drawn)


def assert_exact_sums(batch, tokens, k, n, zero, bits, packed, extreme, seed) -> None:
    """The accumulators themselves: scales and gate 1, bias and residual 0."""
    make = maker(seed)
    codes, weight = make.codes(batch, tokens, k), narrow(make.weight(n, k), bits)
    if extreme:
        codes, weight = (
            torch.full_like(codes, 127),
            weight._replace(codes=torch.full_like(weight.codes, -128 >> 8 - bits)),
        )
    source = as_operand(Grid.UNIFORM, 8, torch.ones(1, 1), torch.full((1, 1), zero, dtype=torch.int32))
    run = PackedTritonBackend() if packed else TritonBackend()
    layer = on_device(run.prepare(WeightParams(weight.codes, torch.ones(1), bits), None))
    assert torch.equal(layer.unpacked().cpu(), weight.codes)
    x, gate = torch.zeros(batch, tokens, n, device=DEVICE), torch.ones(batch, n, device=DEVICE)
    given = to(DEVICE, padded(codes)), to(DEVICE, source), layer
    expected = (codes.long() - zero) @ weight.codes.long().t()
    for then in (None, Residual(x, gate), Residual(x)):
        assert torch.equal(run.linear(*given, then).cpu(), expected.float())


@each_shape
@pytest.mark.parametrize("lead", [False, True])
@each_stream
def test_norm_quantize(batch: int, tokens: int, width: int, heads: int, lead: bool, stream: torch.dtype) -> None:
    run, make = TritonBackend(), maker(0)
    x = (make.values(batch, tokens, width) * 3 + 1).to(stream)
    shift, scale, *_ = make.values(batch, 6 * width).to(DEVICE).chunk(6, dim=1)  # rows of a wider tensor
    target = make.params(lead=batch if lead else 1)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = normal * (1 + scale.cpu().double()[:, None]) + shift.cpu().double()[:, None]
    actual = read(run.quantize(to(DEVICE, x), to(DEVICE, target), Norm(shift, scale, 1e-6)), width)
    assert_equal_up_to_ties(actual, value, target)


@each_shape
@each_gelu
@each_stream
def test_quantize(batch, tokens, width, heads, grid: Grid, bits: int, merged: bool, stream: torch.dtype) -> None:
    """Uniform codes are equal, those beyond the grid included; the others up to ties."""
    run, make = TritonBackend(), maker(0, bits)
    x, target = make.values(batch, tokens, width).mul(3).to(stream), make.params(grid, batch, merged=merged)
    actual = read(run.quantize(to(DEVICE, x), to(DEVICE, target)), width, target)
    if grid is Grid.UNIFORM:
        assert torch.equal(actual, quantize(x.float(), target).int())
    assert_equal_up_to_ties(actual, x.double(), target)


@each_pair(
    ("backend", *SHAPE, "parts", "per_channel", "lead"),
    list(BACKENDS),
    EVERY_SHAPE,
    [(3, False, True), (3, True, False), (2, True, True), (2, True, False), (1, False, True), (1, False, False)],
)
def test_projections_are_equal(
    backend: str, batch, tokens, width, heads, parts: int, per_channel: bool, lead: bool
) -> None:
    """To q, k and v, to k and v, or to q."""
    make, run = maker(1), BACKENDS[backend]
    codes, source = make.codes(batch, tokens, width), make.params(lead=batch if lead else 1)
    weight, bias = make.weight(parts * width, width, per_channel), make.values(parts * width)
    weight = narrow(weight, 6) if run.PACKED else weight
    params = make.attention(heads, Grid.UNIFORM, batch if lead else 1)
    targets = {3: params.projections, 2: params.projections[1:], 1: params.projections[:1]}[parts]
    expected = REFERENCE.project(codes, source, REFERENCE.prepare(weight, bias), targets, heads)
    layer = on_device(run.prepare(weight, bias))
    given = to(DEVICE, padded(codes)), to(DEVICE, source), layer, [to(DEVICE, target) for target in targets]
    assert torch.equal(from_projected(run.project(*given, heads), parts, heads), expected.int())


def check_attention(make, batch, tokens, keys, heads, head_dim, config: str, params, target, cross, bias=None, tie=TIE):
    """Check the codes of the probabilities up to ties; given those, P V and its codes exactly."""
    width = heads * head_dim
    x = make.codes(batch, tokens, width if cross else 3 * width)
    other = make.codes(batch, keys, 2 * width) if cross else x[..., width:]
    trace = torch.full((batch, heads, tokens, keys), 55, dtype=torch.int8, device=DEVICE)
    operands = tuple(to(DEVICE, p) for p in (*params.projections, params.softmax, target))
    given = as_projected(to(DEVICE, x), 1 if cross else 3, heads)
    context = as_projected(to(DEVICE, other), 2, heads) if cross else None
    added = None if bias is None else to(DEVICE, bias)
    actual = launch.attend(given, context, added, heads, operands, CONFIGS[config], trace)
    codes = traced(trace.cpu(), params.softmax)
    (q,), (k, v) = split_heads(x[..., :width], 1, heads), split_heads(other, 2, heads)
    scores = dequantize(q, params.query).double() @ dequantize(k, params.key).double().transpose(-1, -2)
    scores = scores * head_dim**-0.5 + (0 if bias is None else bias.double()[:, None, None])
    assert_equal_up_to_ties(codes.int(), probabilities(scores, params.softmax), params.softmax, tie)
    attended = REFERENCE.values(codes, params.softmax, v, params.value).transpose(1, 2).flatten(2)
    assert torch.equal(read(actual, width), quantize(attended, target).int())


@each_pair(("config", *SHAPE, *KIND), list(CONFIGS), EVERY_SHAPE, SOFTMAX)
def test_attention(config: str, batch, tokens, width, heads, grid: Grid, bits: int, merged: bool) -> None:
    make = maker(2, bits)
    params, target = make.attention(heads, grid, batch, merged), make.params(lead=batch, reach=2.0)
    check_attention(make, batch, tokens, tokens, heads, width // heads, config, params, target, False)


CONTEXTS = [
    (2, 5, 1, 3, 6, False), (1, 37, 3, 2, 72, True), (2, 17, 48, 2, 40, True), (2, 1, 120, 1, 144, False),
    (1, 5, 150, 2, 16, True),
]  # fmt: skip


@each_pair(
    ("config", *KIND, "batch", "tokens", "keys", "heads", "head_dim", "usually"), list(CONFIGS), SOFTMAX, CONTEXTS
)
@pytest.mark.parametrize("other", [without_gpu(other, fast=not other) for other in (False, True)])
def test_attention_to_a_context(
    config: str, grid: Grid, bits: int, merged: bool, batch, tokens, keys, heads, head_dim, usually: bool, other: bool
) -> None:
    """Keys fewer and more than queries, and than a tile; of them, with a bias, some are hidden."""
    make, biased = maker(2, bits), usually != other
    params, target = make.attention(heads, grid, batch, merged), make.params(lead=batch, reach=2.0)
    bias = some_hidden(make.values(batch, keys)) if biased else None
    check_attention(
        make, batch, tokens, keys, heads, head_dim, config, params, target, True, bias, BIASED if biased else TIE
    )


@each_softmax
@each_config
def test_attention_with_a_bias(grid: Grid, bits: int, merged: bool, config: str) -> None:
    """On the tokens themselves; the zero points of keys, a constant of each row, are large."""
    make, batch, tokens, heads, head_dim = maker(4, bits), 2, 70, 1, 72
    params, target = make.attention(heads, grid, batch, merged), make.params(lead=batch, reach=2.0)
    bias = some_hidden(make.values(batch, tokens))
    check_attention(make, batch, tokens, tokens, heads, head_dim, config, params, target, False, bias, BIASED)


@each_config
def test_attention_where_every_key_is_hidden(config: str) -> None:
    """A bias of -10000 everywhere leaves scores with a precision of 2^-10, and probabilities that are numbers."""
    make, batch, tokens, keys, heads, head_dim = maker(5), 2, 9, 70, 2, 24
    params, target = make.attention(heads, Grid.UNIFORM, batch), make.params(lead=batch, reach=2.0)
    bias = torch.full((batch, keys), -10000.0)
    check_attention(make, batch, tokens, keys, heads, head_dim, config, params, target, True, bias, 256 * 2.0**-9)


def some_hidden(bias: torch.Tensor) -> torch.Tensor:
    """A bias whose every third key but the first ones is hidden."""
    return torch.where(torch.arange(bias.shape[1]) % 3 == 2, -10000.0, bias)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("tokens", [32, 20])
def test_attention_of_what_the_linear_kernel_wrote(tokens: int, cross: bool) -> None:
    """Both have v's tokens in one order, also where heads are not whole groups of 8 columns."""
    make, run, batch, heads, head_dim = maker(9), TritonBackend(), 2, 2, 12
    width = heads * head_dim
    codes, source = make.codes(batch, tokens, width), make.params()
    params, target = make.attention(heads, Grid.UNIFORM), make.params(reach=2.0)
    weight = make.weight(3 * width, width)
    parts = [params.projections[:1], params.projections[1:]] if cross else [params.projections]
    places = [slice(width), slice(width, None)] if cross else [slice(None)]
    layers = [WeightParams(weight.codes[place], weight.scale[place], 8) for place in places]

    def both(backend, given, device):
        found = []
        for layer, part in zip(layers, parts, strict=True):
            prepared = backend.prepare(layer, None).to(device)
            there = [to(device, p) for p in part]
            found.append(backend.project(to(device, given), to(device, source), prepared, there, heads))
        return backend.attend(found[0], to(device, params), to(device, target), found[1] if cross else None)

    expected = both(REFERENCE, codes, torch.device("cpu"))
    found = both(run, padded(codes), DEVICE)
    assert (read(found, width) != expected).float().mean() < 0.01


def test_attention_where_no_query_is_negative() -> None:
    """Their zero point is -128, and 128 is no int8: the product that takes it out is made of two."""
    make, batch, tokens, width, heads = maker(8), 2, 48, 144, 2
    params, target = make.attention(heads, Grid.UNIFORM, batch), make.params(lead=batch, reach=2.0)
    table = params.query.table.clone()
    table[..., ZERO] = -128.0
    params = params._replace(query=params.query._replace(table=table))
    qkv = make.codes(batch, tokens, 3 * width)
    operands = tuple(to(DEVICE, p) for p in (*params.projections, params.softmax, target))
    given = as_projected(to(DEVICE, qkv), 3, heads)
    for config in (Config(32, 0, 64), Config(32, 0, 32)):
        found = launch.attend(given, None, None, heads, operands, config)
        assert (read(found, width) != REFERENCE.attend(qkv, params, target)).float().mean() < 0.01


@each_pair(("backend", *SHAPE, *KIND), list(BACKENDS), EVERY_SHAPE, GELU)
def test_feed_forward(backend: str, batch, tokens, width, heads, grid: Grid, bits: int, merged: bool) -> None:
    """Codes after GELU up to ties; the layer that reads them bit for bit, gate and residual of each type included."""
    make, eight, run = maker(3, bits), maker(4), BACKENDS[backend]
    source, target = eight.params(lead=batch), make.params(grid, batch, merged=merged)
    codes, bias = eight.codes(batch, tokens, width), eight.values(2 * width)
    first, second = narrow(eight.weight(2 * width, width), bits), narrow(eight.weight(width, 2 * width), bits)
    layer = on_device(run.prepare(first, bias))
    given = to(DEVICE, padded(codes)), to(DEVICE, source), layer
    actual = run.linear(*given, Activation(to(DEVICE, target)))
    hidden = REFERENCE.linear(codes, source, REFERENCE.prepare(first, bias)).double()
    assert torch.equal(run.linear(*given).cpu().double(), hidden)
    value = torch.nn.functional.gelu(hidden, approximate="tanh")
    found = read(actual, 2 * width, target)
    assert_equal_up_to_ties(found, value, target)

    x, gate = eight.values(batch, tokens, width), eight.values(batch, 6 * width).chunk(6, dim=1)[2]
    layer = on_device(run.prepare(second, None))
    for then in (Residual(x, gate), Residual(x), Residual(x.bfloat16(), gate), Residual(x.bfloat16())):
        expected = REFERENCE.linear(found.to(torch.int8), target, REFERENCE.prepare(second, None), then)
        out = run.linear(actual, to(DEVICE, target), layer, to(DEVICE, then))
        assert torch.equal(out.cpu(), expected)


@each_backend
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 7, 3), (5, 130, 70), (8, 64, 9), (9, 96, 70), (40, 256, 33)]
)
def test_float_input_linear(run, rows: int, depth: int, columns: int, bits: int) -> None:
    """Within (K + 4) 2^-24 of the sum of absolute products, as fp32."""
    make = maker(5)
    x, weight, bias = make.values(rows, depth) * 100, narrow(make.weight(columns, depth), bits), make.values(columns)
    layer = on_device(run.prepare_float_input(weight, bias))
    out = run.float_input_linear(to(DEVICE, x), layer).cpu()
    strided = to(DEVICE, x.t().contiguous()).t()
    assert torch.equal(run.float_input_linear(strided, layer).cpu(), out)
    w = weight.codes.double() * weight.scale.double()[:, None]
    exact, size = x.double() @ w.t() + bias.double(), x.double().abs() @ w.abs().t() + bias.abs()
    assert ((out - exact).abs() <= (depth + 4) * 2.0**-24 * size).all()


FLOAT_CONFIGS = [Config(0, 8, 32), Config(8, 32, 64), Config(16, 32, 128), Config(64, 32, 64), Config(64, 128, 32)]
if DEVICE.type == "cuda":
    sizes = ((FEW_ROWS, 64), (16, 64), (64, 32), (64, 64), (16384, 32), (16384, 64))
    FLOAT_CONFIGS = list(dict.fromkeys(c for size in sizes for c in candidates.float_input(*size)))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("config", FLOAT_CONFIGS)
def test_float_input_configurations(config: Config, bits: int) -> None:
    """All codes, and inputs of many magnitudes: the three parts of each are exact."""
    make, rows, depth, columns = maker(6), 70, 300, 150
    if DEVICE.type == "cpu":  # two tiles and a part of one
        rows, depth, columns = config.block_m + 6, 140, 70
    rows = rows if config.block_m else FEW_ROWS
    x = make.values(rows, depth) * 10 ** (4 * make.values(rows, depth)).clamp(-30, 30)
    weight, bias = narrow(make.weight(columns, depth), bits), make.values(columns)
    every = torch.arange(columns * depth).remainder(1 << bits).sub(1 << (bits - 1)).view(columns, depth)
    weight = weight._replace(codes=every.to(torch.int8))
    layer = on_device(TritonLinear(weight, bias, bits))
    tensors = Weight(layer.codes, layer.high, layer.scale, layer.bias, layer.sums, depth, bits)
    out = float_launch.float_input(to(DEVICE, x), tensors, config).cpu()
    w = weight.codes.double() * weight.scale.double()[:, None]
    exact, size = x.double() @ w.t() + bias.double(), x.double().abs() @ w.abs().t() + bias.abs()
    assert ((out - exact).abs() <= (depth + 4) * 2.0**-24 * size).all()


LINEAR_CONFIGS = [
    Config(32, 32, 64),
    Config(64, 32, 128),
    Config(32, 64, 64, 2, piece=32),
    Config(16, 64, 128, piece=16),
]
if DEVICE.type == "cuda":
    LINEAR_CONFIGS = [c for two in (False, True) for c in candidates.linear(16, two, 8)]
    LINEAR_CONFIGS += candidates.linear(16384, False, 8)


@pytest.mark.parametrize("config", LINEAR_CONFIGS, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("two", [False, True])
def test_results_do_not_depend_on_the_configuration(config: Config, two: bool) -> None:
    make = maker(6)
    batch, tokens, width = 2, 48, 96
    source = make.params(Grid.MRQ_GELU if two else Grid.UNIFORM, batch)
    codes, weight, bias = make.codes(batch, tokens, width), make.weight(width, width), make.values(width)
    x, gate = make.values(batch, tokens, width), make.values(batch, width)
    plain = REFERENCE.prepare(weight, bias)
    layer = on_device(TritonBackend().prepare(weight, bias))
    tensors = Weight(layer.codes, layer.high, layer.scale, layer.bias, layer.sums, width, 8)
    given = (to(DEVICE, stored(codes, source)), to(DEVICE, source), tensors, config)
    for then in (Residual(x, gate), Residual(x)):
        out = launch.residual(*given, to(DEVICE, then))
        assert torch.equal(out.cpu(), REFERENCE.linear(codes, source, plain, then))
    assert torch.equal(launch.plain(*given).cpu(), REFERENCE.linear(codes, source, plain))
