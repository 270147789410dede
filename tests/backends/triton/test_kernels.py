"""Every kernel against `ops.reference`: on a GPU, or in Triton's interpreter where there is none.

Sums and codes are equal; where a float operation is rounded differently (LayerNorm, GELU, exp), a code may differ by
one step where the value is within `test_cpu.TIE` steps of a rounding boundary.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import from_heads, heads_of, padded, read, stored, to
from operands import maker
from test_cpu import assert_equal_up_to_ties, each_gelu, each_shape, each_softmax, traced

from poisoned import PoisonedTorch

pytest.importorskip("triton")
from tqdit.backends.triton import candidates, launch, tuning
from tqdit.backends.triton.backend import PackedTritonBackend, TritonBackend, operand
from tqdit.backends.triton.launch import FEW_ROWS
from tqdit.backends.triton.layer import TritonLinear
from tqdit.backends.triton.layouts import Config, Weight
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.reference import Reference
from tqdit.ops.schema import OperandParams, WeightParams
from tqdit.spec import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = Reference()
each_backend = pytest.mark.parametrize("run", [TritonBackend(), PackedTritonBackend()], ids=lambda b: b.NAME)
each_stream = pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def first_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests time nothing; `test_results_do_not_depend_on_the_configuration` has the others."""
    if DEVICE.type == "cuda":
        monkeypatch.setattr(tuning, "choose", lambda key, device, candidates, run: candidates()[0])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "torch", PoisonedTorch())


def on_device(layer):
    return layer.to(DEVICE)


def narrow(weight: WeightParams, bits: int) -> WeightParams:
    """The same with codes of fewer bits."""
    codes = weight.codes >> (8 - bits)
    return weight._replace(codes=codes, colsum=codes.sum(1, dtype=torch.int32))


@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 40), k=st.integers(1, 300), n=st.integers(1, 150),
    zero=st.integers(-128, 127), bits=st.sampled_from([8, 6, 4]), packed=st.booleans(), extreme=st.booleans(),
    seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sums_are_exact(batch, tokens, k, n, zero, bits, packed, extreme, seed) -> None:
    """The accumulators themselves: scales and gate 1, bias and residual 0."""
    make = maker(seed)
    codes, weight = make.codes(batch, tokens, k), narrow(make.weight(n, k), bits)
    if extreme:
        codes, weight = (
            torch.full_like(codes, 127),
            weight._replace(codes=torch.full_like(weight.codes, -128 >> 8 - bits)),
        )
    one = torch.ones(1, 1, 1)
    source = OperandParams(Grid.UNIFORM, 8, one, torch.full((1, 1, 1), zero, dtype=torch.int32), one)
    run = PackedTritonBackend() if packed else TritonBackend()
    layer = on_device(run.prepare(WeightParams(weight.codes, torch.ones(1)), None))
    assert torch.equal(layer.unpacked().cpu(), weight.codes)
    x, gate = torch.zeros(batch, tokens, n, device=DEVICE), torch.ones(batch, n, device=DEVICE)
    out = run.linear_residual(to(DEVICE, padded(codes)), to(DEVICE, source), layer, gate, x)
    assert torch.equal(out.cpu(), ((codes.long() - zero) @ weight.codes.long().t()).float())


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
    actual = read(run.norm_quantize(to(DEVICE, x), shift, scale, 1e-6, to(DEVICE, target)), width)
    assert_equal_up_to_ties(actual, value, target)


@each_backend
@each_shape
@pytest.mark.parametrize("lead", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_qkv_is_equal(run, batch: int, tokens: int, width: int, heads: int, lead: bool, per_channel: bool) -> None:
    make = maker(1)
    codes, source = make.codes(batch, tokens, width), make.params(lead=batch if lead else 1)
    weight, bias = make.weight(3 * width, width, per_channel), make.values(3 * width)
    weight = narrow(weight, 6) if run.PACKED else weight
    params = make.attention(heads, Grid.UNIFORM, batch if lead else 1)
    expected = REFERENCE.qkv(codes, source, REFERENCE.prepare(weight, bias), params)
    layer = on_device(run.prepare(weight, bias))
    actual = run.qkv(to(DEVICE, padded(codes)), to(DEVICE, source), layer, to(DEVICE, params))
    assert torch.equal(from_heads(actual, heads), expected.int())


@each_shape
@each_softmax
@pytest.mark.parametrize("config", [Config(32, 0, 64), Config(64, 0, 256, blocks=4)], ids=["tiles", "one"])
def test_attention(batch, tokens, width, heads, grid: Grid, bits: int, merged: bool, config: Config) -> None:
    """The codes of the probabilities up to ties; given those, P V and its codes exactly."""
    make = maker(2, bits)
    params, target = make.attention(heads, grid, batch, merged), make.params(lead=batch, reach=2.0)
    qkv = make.codes(batch, tokens, 3 * width)
    trace = torch.full((batch, heads, tokens, tokens), 55, dtype=torch.int8, device=DEVICE)
    operands = tuple(operand(to(DEVICE, p)) for p in (*params.projections, params.softmax, target))
    given = heads_of(to(DEVICE, qkv), heads)
    actual = launch.attention(given.codes, batch, tokens, heads, given.head_dim, operands, config, trace)
    codes = traced(trace.cpu(), params.softmax)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = dequantize(q, params.query).double() @ dequantize(k, params.key).double().transpose(-1, -2)
    assert_equal_up_to_ties(codes.int(), (scores * q.shape[-1] ** -0.5).softmax(-1), params.softmax)
    attended = REFERENCE.values(codes, params.softmax, v, params.value).transpose(1, 2).flatten(2)
    assert torch.equal(read(actual, width), quantize(attended, target).int())


@pytest.mark.parametrize("tokens", [32, 20])
def test_attention_of_what_the_linear_kernel_wrote(tokens: int) -> None:
    """Both have v's tokens in one order, also where heads are not whole groups of 8 columns."""
    make, run, batch, heads, head_dim = maker(9), TritonBackend(), 2, 2, 12
    width = heads * head_dim
    codes, source = make.codes(batch, tokens, width), make.params()
    params, target = make.attention(heads, Grid.UNIFORM), make.params(reach=2.0)
    weight = make.weight(3 * width, width)
    expected = REFERENCE.attention(
        REFERENCE.qkv(codes, source, REFERENCE.prepare(weight, None), params), params, target
    )
    given = to(DEVICE, padded(codes)), to(DEVICE, source), on_device(run.prepare(weight, None)), to(DEVICE, params)
    found = run.attention(run.qkv(*given), to(DEVICE, params), to(DEVICE, target))
    assert (read(found, width) != expected).float().mean() < 0.01


def test_attention_where_no_query_is_negative() -> None:
    """Their zero point is -128, and 128 is no int8: the product that takes it out is made of two."""
    make, batch, tokens, width, heads = maker(8), 2, 48, 144, 2
    params, target = make.attention(heads, Grid.UNIFORM, batch), make.params(lead=batch, reach=2.0)
    params = params._replace(query=params.query._replace(zero_point=torch.full_like(params.query.zero_point, -128)))
    qkv = make.codes(batch, tokens, 3 * width)
    operands = tuple(operand(to(DEVICE, p)) for p in (*params.projections, params.softmax, target))
    given = heads_of(to(DEVICE, qkv), heads)
    for config in (Config(32, 0, 64), Config(32, 0, 32)):
        found = launch.attention(given.codes, batch, tokens, heads, given.head_dim, operands, config)
        assert (read(found, width) != REFERENCE.attention(qkv, params, target)).float().mean() < 0.01


@each_shape
@each_gelu
@each_backend
@each_stream
def test_feed_forward(run, batch, tokens, width, heads, grid: Grid, bits: int, merged: bool, stream) -> None:
    """Codes after GELU up to ties; the layer that reads them bit for bit, gate and residual included."""
    make = maker(3, bits)
    eight = maker(4)
    source, target = eight.params(lead=batch), make.params(grid, batch, merged=merged)
    codes, bias = eight.codes(batch, tokens, width), eight.values(4 * width)
    first, second = narrow(eight.weight(4 * width, width), bits), narrow(eight.weight(width, 4 * width), bits)
    layer = on_device(run.prepare(first, bias))
    actual = run.linear_gelu(to(DEVICE, padded(codes)), to(DEVICE, source), layer, to(DEVICE, target))
    hidden = REFERENCE.linear(codes, source, REFERENCE.prepare(first, bias)).double()
    value = torch.nn.functional.gelu(hidden, approximate="tanh")
    found = read(actual, 4 * width, target)
    assert_equal_up_to_ties(found, value, target)

    x, gate = eight.values(batch, tokens, width).to(stream), eight.values(batch, 6 * width).chunk(6, dim=1)[2]
    expected = REFERENCE.linear_residual(found.to(torch.int8), target, REFERENCE.prepare(second, None), gate, x)
    layer = on_device(run.prepare(second, None))
    out = run.linear_residual(actual, to(DEVICE, target), layer, to(DEVICE, gate), to(DEVICE, x))
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
    make, rows, depth, columns = maker(6), FEW_ROWS if config.block_m == 0 else 70, 300, 150
    x = make.values(rows, depth) * 10 ** (4 * make.values(rows, depth)).clamp(-30, 30)
    weight, bias = narrow(make.weight(columns, depth), bits), make.values(columns)
    every = torch.arange(columns * depth).remainder(1 << bits).sub(1 << (bits - 1)).view(columns, depth)
    weight = weight._replace(codes=every.to(torch.int8))
    layer = on_device(TritonLinear(weight, bias, bits))
    tensors = Weight(layer.codes, layer.high, layer.scale, layer.bias, layer.sums, depth, bits)
    out = launch.float_input(to(DEVICE, x), tensors, config).cpu()
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
    expected = REFERENCE.linear_residual(codes, source, REFERENCE.prepare(weight, bias), gate, x)
    from tqdit.backends.triton.layouts import Weight

    layer = on_device(TritonBackend().prepare(weight, bias))
    tensors = Weight(layer.codes, layer.high, layer.scale, layer.bias, layer.sums, width, 8)
    given = (to(DEVICE, stored(codes, source)), operand(to(DEVICE, source)), tensors, config)
    out = launch.residual(*given, to(DEVICE, gate), to(DEVICE, x))
    assert torch.equal(out.cpu(), expected)
    plain = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias))
    assert torch.equal(launch.plain(*given).cpu(), plain)
