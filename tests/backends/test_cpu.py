"""Every way the CPU backend runs against `ops.reference`: equal codes and accumulators, floats within a stated bound.

LayerNorm, GELU and exp are rounded differently from torch's. So a code after one of them may differ, by one step, where
the value before rounding is nearer to a boundary than that rounding reaches; everything else is equal bit for bit.
"""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import Maker, maker
from torch._subclasses.fake_tensor import FakeTensorMode

from tqdit.backends import native, onednn
from tqdit.backends.cpu import NativeCpu
from tqdit.backends.onednn import SIGN, PackedLinear
from tqdit.backends.panels import PanelLinear
from tqdit.backends.signatures import FUNCTIONS
from tqdit.errors import InputError
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.reference import Reference, int_matmul
from tqdit.ops.schema import OperandParams, WeightParams
from tqdit.spec import Grid

REFERENCE = Reference()
# How far a float operation may be from torch's, in steps of the grid it is quantized to (at most 256 steps of range).
TIE = 256 * 16 * 2.0**-24
# batch, tokens, width, heads: one token, odd sizes, head_dim 72, more keys and rows than one panel or task holds
SHAPES = [(1, 1, 16, 1), (2, 5, 24, 3), (3, 17, 40, 2), (1, 64, 144, 2), (1, 113, 68, 2), (2, 150, 32, 1)]
each_shape = pytest.mark.parametrize(("batch", "tokens", "width", "heads"), SHAPES)
each_gelu = pytest.mark.parametrize(
    ("grid", "bits", "merged"),
    [(Grid.UNIFORM, 8, False), (Grid.MRQ_GELU, 8, False), (Grid.MRQ_GELU, 6, False), (Grid.MRQ_GELU, 6, True)],
)
each_softmax = pytest.mark.parametrize(
    ("grid", "bits", "merged"),
    [
        (Grid.UNIFORM, 8, False), (Grid.UNIFORM, 4, False), (Grid.MRQ_SOFTMAX, 8, False),
        (Grid.MRQ_SOFTMAX, 8, True), (Grid.MRQ_SOFTMAX, 6, False), (Grid.MRQ_SOFTMAX, 6, True),
    ],
)  # fmt: skip


def given_codes(run, codes: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Signed codes in the layout of a backend."""
    if not isinstance(run, NativeCpu):
        return codes
    if params.grid is Grid.UNIFORM:
        return codes.view(torch.uint8) ^ SIGN
    if params.shift is not None:
        shifted = torch.where(codes < 0, codes.int(), codes.int() << params.shift)
        return (shifted + (1 << (params.bits - 1))).to(torch.uint8)
    return torch.stack([(-codes.int().clamp(max=0)).to(torch.uint8), codes.clamp(min=0).to(torch.uint8)])


def found_codes(run, codes: torch.Tensor, params: OperandParams | None = None) -> torch.Tensor:
    """The inverse."""
    if not isinstance(run, NativeCpu):
        return codes.int()
    if params is None or params.grid is Grid.UNIFORM:
        return codes.int() - SIGN
    if params.shift is not None:
        shifted = codes.int() - (1 << (params.bits - 1))
        return torch.where(shifted < 0, shifted, shifted >> params.shift)
    return codes[1].int() - codes[0].int()


def assert_equal_up_to_ties(actual: torch.Tensor, value: torch.Tensor, params: OperandParams) -> None:
    """`actual` are codes of `value` (fp64), or of a value closer to it than TIE steps."""
    wide = OperandParams(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in params))
    below, above = (exact_codes(value, wide, offset) for offset in (-TIE, TIE))
    assert ((actual >= torch.minimum(below, above)) & (actual <= torch.maximum(below, above))).all()


def exact_codes(value: torch.Tensor, params: OperandParams, offset: float) -> torch.Tensor:
    """Codes of a value moved by `offset` steps, in fp64."""
    half = 1 << (params.bits - 1)
    if params.grid is Grid.UNIFORM:
        return (torch.round(value / params.scale + offset) + params.zero_point).clamp(-half, half - 1)
    if params.grid is Grid.MRQ_SOFTMAX:
        top = half - 1
        fine = value + offset * params.scale <= top * params.scale
        steps = torch.round(value / torch.where(fine, params.scale, params.coarse) + offset).clamp(max=top)
        return torch.where(fine, -steps, steps)
    moved = value / torch.where(value < 0, params.scale, params.coarse) + offset
    return torch.round(moved).clamp(-half, half - 1)


# Products -----------------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 40), k=st.integers(1, 300), n=st.integers(1, 70), zero=st.integers(0, 255),
    extreme=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_are_exact(run, m: int, k: int, n: int, zero: int, extreme: bool, seed: int) -> None:
    make = maker(seed)
    codes = make.codes(m, k).view(torch.uint8)
    weight = make.weight(n, k)
    if extreme:
        codes = torch.full_like(codes, 255)
        weight = weight._replace(codes=torch.full_like(weight.codes, -128))
        weight = weight._replace(colsum=weight.codes.sum(1, dtype=torch.int32))
    expected = (codes.long() - zero) @ weight.codes.long().t()
    assert torch.equal(PackedLinear(weight, None).product(codes, zero), expected.float())


@pytest.mark.parametrize("k", [1024, 1025, 4608])
def test_products_beyond_2_to_24_are_rounded_once(run, k: int) -> None:
    codes = torch.full((3, k), 255, dtype=torch.uint8)
    weight = maker(k).weight(5, k)
    weight = weight._replace(codes=torch.full_like(weight.codes, 127) - torch.eye(5, k).to(torch.int8))
    weight = weight._replace(colsum=weight.codes.sum(1, dtype=torch.int32))
    expected = (codes.long() - 3) @ weight.codes.long().t()
    assert expected.abs().max() > 2**24
    assert torch.equal(PackedLinear(weight, None).product(codes, 3), expected.float())


@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 40), fours=st.integers(1, 80), n=st.integers(1, 150),
    zero=st.integers(-128, 127), extreme=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fused_products_are_exact(fast, batch, tokens, fours, n, zero: int, extreme: bool, seed: int) -> None:
    """The accumulators themselves: scales and gate 1, bias and residual 0."""
    make = maker(seed)
    codes, weight = make.codes(batch, tokens, 4 * fours), make.weight(n, 4 * fours)
    if extreme:
        codes, weight = torch.full_like(codes, 127), weight._replace(codes=torch.full_like(weight.codes, -128))
    one = torch.ones(1, 1, 1)
    source = OperandParams(Grid.UNIFORM, 8, one, torch.full((1, 1, 1), zero, dtype=torch.int32), one)
    layer = fast.prepare(WeightParams(weight.codes, torch.ones(1)), None)
    x = torch.zeros(batch, tokens, n)
    out = fast.linear_residual(given_codes(fast, codes, source), source, layer, torch.ones(batch, n), x)
    assert torch.equal(out, ((codes.long() - zero) @ weight.codes.long().t()).float())
    if isinstance(layer, PanelLinear):
        assert torch.equal(layer.unpacked(), weight.codes)


# Operations ---------------------------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("lead", [False, True])
def test_norm_quantize(run, batch: int, tokens: int, width: int, heads: int, lead: bool) -> None:
    make = maker(0)
    x = make.values(batch, tokens, width) * 3 + 1
    modulation = make.values(batch, 6 * width)  # its chunks are rows of a wider tensor
    shift, scale, *_ = modulation.chunk(6, dim=1)
    target = make.params(lead=batch if lead else 1)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = normal * (1 + scale.double()[:, None]) + shift.double()[:, None]
    actual = found_codes(run, run.norm_quantize(x, shift, scale, 1e-6, target))
    assert_equal_up_to_ties(actual, value, target)
    expected = REFERENCE.norm_quantize(x, shift, scale, 1e-6, target)
    assert (actual != expected).float().mean() < 0.01
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(found_codes(run, run.norm_quantize(strided, shift, scale, 1e-6, target)), actual)


@each_shape
@pytest.mark.parametrize("lead", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_qkv_is_equal(run, batch: int, tokens: int, width: int, heads: int, lead: bool, per_channel: bool) -> None:
    make = maker(1)
    codes, source = make.codes(batch, tokens, width), make.params(lead=batch if lead else 1)
    weight, bias = make.weight(3 * width, width, per_channel), make.values(3 * width)
    params = make.attention(heads, Grid.UNIFORM, batch if lead else 1)
    expected = REFERENCE.qkv(codes, source, REFERENCE.prepare(weight, bias), params)
    actual = run.qkv(given_codes(run, codes, source), source, run.prepare(weight, bias), params)
    assert torch.equal(found_codes(run, actual), expected.int())


@each_shape
@each_softmax
def test_attention(run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool) -> None:
    make = maker(2, bits)
    params, target = make.attention(heads, grid, batch, merged), make.params(lead=batch, reach=2.0)
    qkv = make.codes(batch, tokens, 3 * width)
    expected = REFERENCE.attention(qkv, params, target)
    given = given_codes(run, qkv, params.query)
    if not isinstance(run, NativeCpu):
        assert torch.equal(run.attention(given, params, target), expected)
        return
    trace = torch.empty(batch, heads, tokens, tokens, dtype=torch.int8)
    actual = run.attention(given, params, target, trace)
    codes = traced(trace, params.softmax)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = dequantize(q, params.query).double() @ dequantize(k, params.key).double().transpose(-1, -2)
    assert_equal_up_to_ties(codes.int(), (scores * q.shape[-1] ** -0.5).softmax(-1), params.softmax)
    attended = REFERENCE.values(codes, params.softmax, v, params.value).transpose(1, 2).flatten(2)
    assert torch.equal(found_codes(run, actual), quantize(attended, target).int())  # P V is exact
    assert (found_codes(run, actual) != expected).float().mean() < 0.01


def traced(trace: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Codes as the reference has them, from the trace of a merged grid, where a fine code is the value itself."""
    if params.shift is None:
        return trace
    value = trace.int() + SIGN
    top = (1 << (params.bits - 1)) - 1
    return torch.where(value <= top, -value, value >> params.shift).to(torch.int8)


@each_shape
@each_gelu
@pytest.mark.parametrize("lead", [False, True])
def test_linear_gelu(
    run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool, lead: bool
) -> None:
    make = maker(3, bits)
    count = batch if lead else 1
    codes, source, target = (
        make.codes(batch, tokens, width),
        make.params(lead=count),
        make.params(grid, count, merged=merged),
    )
    weight, bias = make.weight(2 * width + 1, width), make.values(2 * width + 1)
    layer = REFERENCE.prepare(weight, bias)
    value = torch.nn.functional.gelu(REFERENCE.linear(codes, source, layer).double(), approximate="tanh")
    actual = run.linear_gelu(given_codes(run, codes, source), source, run.prepare(weight, bias), target)
    actual = found_codes(run, actual, target)
    assert_equal_up_to_ties(actual, value, target)
    assert (actual != REFERENCE.linear_gelu(codes, source, layer, target)).float().mean() < 0.01


@each_shape
@each_gelu
@pytest.mark.parametrize(("lead", "stream"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_linear_residual_is_equal(
    run, batch: int, tokens: int, width: int, heads: int, grid: Grid, bits: int, merged: bool, lead: bool, stream
) -> None:
    make = maker(4, bits)
    depth = 4 * width if lead else 3 * width + 2  # a multiple of four, and not
    codes = make.codes(batch, tokens, depth)
    source = make.params(grid, batch if lead else 1, merged=merged)
    weight, bias = make.weight(width, depth), make.values(width)
    gate, x = make.values(batch, 6 * width).chunk(6, dim=1)[2], make.values(batch, tokens, width).to(stream)
    before = x.clone()
    expected = REFERENCE.linear_residual(codes, source, REFERENCE.prepare(weight, bias), gate, x)
    actual = run.linear_residual(given_codes(run, codes, source), source, run.prepare(weight, bias), gate, x)
    assert torch.equal(actual, expected)
    assert torch.equal(x, before)


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


# Threads, batches, copies ------------------------------------------------------------------------------------------


def every_operation(run, make: Maker, batch: int, members: slice = slice(None)) -> list[torch.Tensor]:
    """The seven calls of a block, on some members of a batch whose samples have grids of their own."""
    tokens, width, heads = 21, 40, 2
    x, modulation = make.values(batch, tokens, width)[members], make.values(batch, 6, width)[members]
    layers = [
        run.prepare(make.weight(out, inner), make.values(out))
        for out, inner in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    ]
    sources = [member(make.params(lead=batch), members) for _ in range(3)]
    gelu = member(make.params(Grid.MRQ_GELU, batch), members)
    params = make.attention(heads, Grid.MRQ_SOFTMAX, batch)
    params = params._replace(**{n: member(getattr(params, n), members) for n in ("query", "key", "value", "softmax")})
    found = [run.norm_quantize(x, modulation[:, 0], modulation[:, 1], 1e-6, sources[0])]
    found.append(run.qkv(found[-1], sources[0], layers[0], params))
    found.append(run.attention(found[-1], params, sources[1]))
    found.append(run.linear_residual(found[-1], sources[1], layers[1], modulation[:, 2], x))
    codes = run.norm_quantize(found[-1], modulation[:, 3], modulation[:, 4], 1e-6, sources[2])
    found.append(run.linear_gelu(codes, sources[2], layers[2], gelu).movedim(-3, 0))  # planes, if any, after the batch
    found.append(run.linear_residual(found[-1].movedim(0, -3), gelu, layers[3], modulation[:, 5], found[3]))
    return found


def member(params: OperandParams, members: slice) -> OperandParams:
    return OperandParams(*(x[members] if isinstance(x, torch.Tensor) else x for x in params))


def test_batch_split_changes_nothing(fast) -> None:
    together = every_operation(fast, maker(6), 5)
    parts = [every_operation(fast, maker(6), 5, slice(i, i + 2)) for i in (0, 2, 4)]
    for index, whole in enumerate(together):
        assert torch.equal(whole, torch.cat([part[index] for part in parts]))


def test_one_head_among_many_threads(fast) -> None:
    """A head is split by query rows when there are fewer heads than threads."""
    make = maker(9)
    params, target = make.attention(1, Grid.MRQ_SOFTMAX), make.params(reach=2.0)
    qkv = given_codes(fast, make.codes(1, 100, 3 * 24), params.query)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            results.append(found_codes(fast, fast.attention(qkv, params, target)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert len(results[0].unique()) > 50


def test_threads_change_nothing(fast) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(every_operation(fast, maker(7), 3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("samples", "parameters of 2 entries for 3 samples of 1"),
        ("depth", "codes of depth 32 for a layer of depth 64"),
        ("modulation", r"modulation \(2, 16\) for 3 samples of width 16"),
        ("dtype", "need torch.float32 on the CPU; a tensor is torch.float64"),
        ("meta", "need torch.float32 on the CPU; a tensor is torch.float32 on meta"),
        ("fake", "need items in memory; a FakeTensor has none"),
        ("planes", "1 planes of codes for a grid of mrq_gelu"),
        ("update", r"an update \(3, 5, 16\) of hidden states \(3, 5, 20\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(fast, wrong: str, message: str) -> None:
    """Pointers know no shapes: what does not fit must not reach them."""
    make = maker(10)
    x, layer = make.values(3, 5, 20 if wrong == "update" else 16), fast.prepare(make.weight(16, 64), None)
    gate, depth = make.values(2 if wrong == "modulation" else 3, 16), 32 if wrong == "depth" else 64
    source = make.params(lead=2 if wrong == "samples" else 3)
    codes = given_codes(fast, make.codes(3, 5, depth), source)
    if wrong == "planes":
        source = make.params(Grid.MRQ_GELU, 3)
    if wrong == "dtype":
        gate = gate.double()
    if wrong == "meta":
        gate = gate.to("meta")
    if wrong == "fake":
        gate = FakeTensorMode().from_tensor(gate)
    with pytest.raises(InputError, match=message):
        fast.linear_residual(codes, source, layer, gate, x)


@pytest.mark.parametrize("heads", [0, -1, 3, 2.0, True])
def test_heads_that_do_not_fit_are_refused(fast, heads: object) -> None:
    """Columns that are no heads, and parameters of another number of heads, would be read beyond their end."""
    make = maker(11)
    params = make.attention(2, Grid.UNIFORM)._replace(heads=heads)
    with pytest.raises(InputError, match="the CPU kernels"):
        fast.attention(make.codes(1, 4, 3 * 8 * 3).view(torch.uint8), params, make.params())


@pytest.mark.parametrize("eps", [0, 1, True, 0.0, 1e-6])
def test_eps_is_a_float_for_the_kernel_whatever_it_is_here(fast, eps: float) -> None:
    """An int in the place of a C float would shift every argument behind it by one register."""
    make = maker(12)
    x, shift, scale, target = make.values(2, 3, 24), make.values(2, 24), make.values(2, 24), make.params()
    found = found_codes(fast, fast.norm_quantize(x, shift, scale, eps, target))
    assert (found != REFERENCE.norm_quantize(x, shift, scale, float(eps), target)).float().mean() < 0.02
    with pytest.raises((TypeError, ValueError)):
        fast.norm_quantize(x, shift, scale, "tiny", target)


def test_every_function_of_the_library_is_declared(fast) -> None:
    """Against the C sources: as many arguments, floats and integers where C has them."""
    sources = "".join(path.read_text() for path in native.SOURCES.glob("*.h"))
    found = re.findall(r'extern "C" (\w+) tqdit_(\w+)\(([^)]*)\)', sources)
    assert {name for _, name, _ in found} == set(FUNCTIONS)
    for result, name, arguments in found:
        function = getattr(native.library(), f"tqdit_{name}")
        assert function.restype is (ctypes.c_int64 if result == "int64_t" else None), name
        given = [argument for argument in arguments.split(",") if argument.strip()]
        assert len(given) == len(FUNCTIONS[name]), name
        for text, declared in zip(given, FUNCTIONS[name], strict=True):
            pointer = declared is ctypes.c_void_p or hasattr(declared, "contents")
            expected = "*" in text, "int64_t " in text and "*" not in text, "float " in text and "*" not in text
            assert (pointer, declared is ctypes.c_int64, declared is ctypes.c_float) == expected, (name, text)


# Probes and fallbacks ----------------------------------------------------------------------------------------------


def test_kernel_names_say_what_runs(run, request: pytest.FixtureRequest) -> None:
    way = request.node.callspec.params["run"]
    compiled, vnni = isinstance(run, NativeCpu), isinstance(run, NativeCpu) and native.has_vnni()
    onednn_runs = onednn.reason() is None
    assert compiled == (way not in ("torch", "nothing"))
    assert not (way == "generic" and vnni)
    assert vnni or way != "panels"
    product = "onednn u8 x s8" if onednn_runs else "int8 in fp32, exact"
    assert run.kernel("linear") == ("fused, avx512-vnni u8 x s8" if vnni else product)
    assert ("fused attention" in run.kernel("scores")) == compiled
    assert isinstance(run.prepare(maker(0).weight(5, 8), None), PanelLinear) == vnni
    assert not isinstance(run.prepare(maker(0).weight(5, 7), None), PanelLinear)  # no multiple of four


def test_a_processor_without_vnni_is_found_out() -> None:
    """oneDNN's sums saturate there; the probe must see it, and the products must be exact all the same."""
    code = (
        "import torch\n"
        "from tqdit.backends import onednn\n"
        "from operands import maker\n"
        "layer = onednn.PackedLinear(maker(0).weight(7, 300), None)\n"
        "codes = torch.full((4, 300), 255, dtype=torch.uint8)\n"
        "exact = (codes.long() - 3) @ maker(0).weight(7, 300).codes.long().t()\n"
        "assert torch.equal(layer.product(codes, 3), exact.float())\n"
        "print(onednn.reason())\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "saturate" in done.stdout or "no oneDNN" in done.stdout


def test_a_missing_operation_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_pointwise'")

    monkeypatch.setattr(onednn, "_qlinear", missing)
    assert "no oneDNN integer matmul" in str(onednn.reason.__wrapped__())


def test_signed_codes_and_their_products_agree_with_the_oracle() -> None:
    """The helper of this file against `int_matmul`, so that both cannot be wrong alike."""
    make = maker(8)
    codes, weight = make.codes(4, 50), make.weight(6, 50)
    unsigned = codes.view(torch.uint8) ^ SIGN
    assert torch.equal(PackedLinear(weight, None).product(unsigned, SIGN), int_matmul(codes, weight.codes.t()).float())
