"""The CPU backend in every way it can run: products, threads and batches, what is refused, probes and fallbacks.

`test_cpu_verbs` compares its verbs with the reference.
"""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch
from cpu_codes import found_codes, given_codes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import Maker, as_operand, gathered, maker
from torch._subclasses.fake_tensor import FakeTensorMode
from ways import OPTIMIZED

from tqdit.backends import native, onednn
from tqdit.backends.cpu import NativeCpu
from tqdit.backends.instructions import available
from tqdit.backends.onednn import SIGN, PackedLinear
from tqdit.backends.panels import PanelLinear
from tqdit.backends.signatures import FUNCTIONS
from tqdit.errors import InputError
from tqdit.ops.reference import Reference, int_matmul
from tqdit.ops.schema import Activation, AttentionParams, Norm, Residual, WeightParams
from tqdit.spec import Grid

REFERENCE = Reference()


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
    """The accumulators themselves: scales 1, bias 0."""
    make = maker(seed)
    codes, weight = make.codes(batch, tokens, 4 * fours), make.weight(n, 4 * fours)
    if extreme:
        codes, weight = torch.full_like(codes, 127), weight._replace(codes=torch.full_like(weight.codes, -128))
    source = as_operand(Grid.UNIFORM, 8, torch.ones(1, 1), torch.full((1, 1), zero, dtype=torch.int32))
    layer = fast.prepare(WeightParams(weight.codes, torch.ones(1), 8), None)
    out = fast.linear(given_codes(fast, codes, source), source, layer)
    assert torch.equal(out, ((codes.long() - zero) @ weight.codes.long().t()).float())
    if isinstance(layer, PanelLinear):
        assert torch.equal(layer.unpacked(), weight.codes)


# Threads, batches, copies ------------------------------------------------------------------------------------------


def every_operation(run, make: Maker, batch: int, members: slice = slice(None)) -> list[torch.Tensor]:
    """The calls of a block with cross-attention, on some members of a batch whose samples have grids of their own."""
    tokens, length, width, heads = 21, 30, 40, 2
    x, modulation = make.values(batch, tokens, width)[members], make.values(batch, 6, width)[members]
    prompt, bias = make.codes(batch, length, width)[members], make.values(batch, length)[members]
    shapes = ((3 * width, width), (width, width), (2 * width, width), (width, width), (4 * width, width))
    shapes = (*shapes, (width, 4 * width))
    qkv, q, kv, out, fc1, fc2 = (run.prepare(make.weight(out, inner), make.values(out)) for out, inner in shapes)
    first, second, third, fourth, text = (gathered(make.params(lead=batch), members) for _ in range(5))
    gelu = gathered(make.params(Grid.MRQ_GELU, batch), members)
    attention = make.attention(heads, Grid.MRQ_SOFTMAX, batch)
    attention = AttentionParams(*(gathered(params, members) for params in attention[:4]), heads)
    found = [run.quantize(x, first, Norm(modulation[:, 0], modulation[:, 1], 1e-6))]
    found.append(run.project(found[-1], first, qkv, attention.projections, heads))
    found.append(run.attend(found[-1], attention, second))
    found.append(run.linear(found[-1], second, out, Residual(x, modulation[:, 2])))
    codes = run.quantize(found[-1], third)
    found.append(run.project(codes, third, q, [attention.query], heads))
    found.append(run.project(prompt.view(torch.uint8) ^ SIGN, text, kv, [attention.key, attention.value], heads))
    found.append(run.attend(found[-2], attention, second, found[-1], bias))
    found.append(run.linear(found[-1], second, out, Residual(found[3])))
    codes = run.quantize(found[-1], fourth, Norm(modulation[:, 3], modulation[:, 4], 1e-6))
    found.append(run.linear(codes, fourth, fc1))
    planes = run.linear(codes, fourth, fc1, Activation(gelu))
    found.append(planes.movedim(-3, 0))  # planes, if any, after the batch
    found.append(run.linear(planes, gelu, fc2, Residual(found[7], modulation[:, 5])))
    return found


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
    short = given_codes(fast, make.codes(1, 13, 2 * 24), params.query)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            crossed = fast.attend(qkv[..., :24].contiguous(), params, target, short)
            results.append(found_codes(fast, torch.stack([fast.attend(qkv, params, target), crossed])))
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


def cross_case(fast, **changes) -> tuple:
    """Arguments of `attend` to a context; `changes` replace some by name."""
    make = maker(11)
    given = {
        "projected": make.codes(2, 4, 24).view(torch.uint8),
        "attention": make.attention(2, Grid.MRQ_SOFTMAX, 2),
        "target": make.params(lead=2),
        "context": make.codes(2, 7, 48).view(torch.uint8),
        "bias": make.values(2, 7),
    }
    return tuple((given | changes).values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("samples", "parameters of 2 samples of 1 for 3 samples of 1"),
        ("heads", "parameters of 3 samples of 2 for 3 samples of 1"),
        ("columns", r"a table of parameters \(3, 1, 7\)"),
        ("bits", "codes of 9 bits"),
        ("depth", "codes of depth 32 for a layer of depth 64"),
        ("gate", r"a gate \(2, 16\) for 3 samples of width 16"),
        ("dtype", "need torch.float32 on the CPU; a tensor is torch.float64"),
        ("table", "need torch.float32 on the CPU; a tensor is torch.float64"),
        ("meta", "need torch.float32 on the CPU; a tensor is torch.float32 on meta"),
        ("fake", "need items in memory; a FakeTensor has none"),
        ("planes", "1 planes of codes for a grid of mrq_gelu"),
        ("probabilities", "a linear layer on probabilities"),
        ("update", r"an update \(3, 5, 16\) of hidden states \(3, 5, 20\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(fast, wrong: str, message: str) -> None:
    """Pointers know no shapes: what does not fit must not reach them."""
    make = maker(10)
    x, layer = make.values(3, 5, 20 if wrong == "update" else 16), fast.prepare(make.weight(16, 64), None)
    gate, depth = make.values(2 if wrong == "gate" else 3, 16), 32 if wrong == "depth" else 64
    source = make.params(lead=2 if wrong == "samples" else 3, units=2 if wrong == "heads" else None)
    codes = given_codes(fast, make.codes(3, 5, depth), source)
    if wrong in ("planes", "probabilities"):
        source = make.params(Grid.MRQ_GELU if wrong == "planes" else Grid.MRQ_SOFTMAX, 3)
    if wrong == "columns":
        source = source._replace(table=source.table[..., :7].contiguous())
    if wrong == "table":
        source = source._replace(table=source.table.double())
    if wrong == "bits":
        source = source._replace(bits=9)
    if wrong == "dtype":
        gate = gate.double()
    if wrong == "meta":
        gate = gate.to("meta")
    if wrong == "fake":
        gate = FakeTensorMode().from_tensor(gate)
    with pytest.raises(InputError, match=message):
        fast.linear(codes, source, layer, Residual(x, gate))


@pytest.mark.parametrize("heads", [0, -1, 3, 2.0, True])
def test_heads_that_do_not_fit_are_refused(fast, heads: object) -> None:
    """Columns that are no heads, and parameters of another number of heads, would be read beyond their end."""
    make = maker(11)
    params = make.attention(2, Grid.UNIFORM)._replace(heads=heads)
    with pytest.raises(InputError, match="the CPU kernels"):
        fast.attend(make.codes(1, 4, 3 * 8 * 3).view(torch.uint8), params, make.params())
    source, layer = make.params(), fast.prepare(make.weight(24, 16), None)
    with pytest.raises(InputError, match="the CPU kernels"):
        fast.project(make.codes(1, 4, 16).view(torch.uint8), source, layer, params.projections, heads)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("context", torch.zeros(2, 7, 47, dtype=torch.uint8), r"a context \(2, 7, 47\) for 2 samples of width 24"),
        ("context", torch.zeros(1, 7, 48, dtype=torch.uint8), r"a context \(1, 7, 48\) for 2 samples of width 24"),
        ("context", torch.zeros(2, 48, dtype=torch.uint8), r"a context \(2, 48\) for 2 samples of width 24"),
        ("context", torch.zeros(2, 7, 48, dtype=torch.int8), "need torch.uint8 on the CPU"),
        ("context", torch.zeros(2, 48, 7, dtype=torch.uint8).mT, "not contiguous"),
        ("context", torch.zeros(2, 0, 48, dtype=torch.uint8), "need items in memory"),
        ("bias", torch.zeros(2, 8), r"a bias \(2, 8\) for 2 samples of width 7"),
        ("bias", torch.zeros(1, 7), r"a bias \(1, 7\) for 2 samples of width 7"),
        ("bias", torch.zeros(2, 7).bfloat16(), "need torch.float32 on the CPU"),
        ("target", maker(0).params(Grid.MRQ_GELU, 2), "a result of attention on the grid 'mrq_gelu'"),
        ("projected", torch.zeros(2, 4, 25, dtype=torch.uint8), "25 columns for 1 x 2 heads"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(fast, name: str, value: object, message: str) -> None:
    assert fast.attend(*cross_case(fast)).shape == (2, 4, 24)
    with pytest.raises(InputError, match=message):
        fast.attend(*cross_case(fast, **{name: value}))


def test_projections_that_do_not_fit_are_refused(fast) -> None:
    make = maker(20)
    codes, source, layer = (
        make.codes(1, 4, 16).view(torch.uint8),
        make.params(),
        fast.prepare(make.weight(24, 16), None),
    )
    head = make.params(units=2)
    for targets, message in (
        ([], "0 parts"),
        ([head] * 4, "4 parts"),
        ([head] * 5, "5 parts"),
        ([make.params(units=3)], "parameters of 1 samples of 3 for 1 samples of 2"),
        ([make.params(Grid.MRQ_GELU)], "heads on the grid 'mrq_gelu'"),
        ([make.params(Grid.ROW)], "heads on the grid 'row'"),
        ([head._replace(channels=torch.ones(24))], "heads on the grid 'uniform', or with channel factors"),
    ):
        with pytest.raises(InputError, match=message):
            fast.project(codes, source, layer, targets, 2)
    with pytest.raises(InputError, match="codes of probabilities"):
        fast.quantize(make.values(1, 4, 16), make.params(Grid.MRQ_SOFTMAX))
    with pytest.raises(InputError, match=r"hidden states \(4, 16\)"):
        fast.quantize(make.values(4, 16), source)


def test_a_shared_row_is_the_row_of_every_sample(fast) -> None:
    """Where the host knows the group of the whole batch, the pointer is into the table itself."""
    make = maker(21)
    target, x = make.params(lead=3), make.values(3, 4, 16)
    target = target._replace(group=torch.full((3,), 2))
    expected = fast.quantize(x, target)
    assert torch.equal(fast.quantize(x, target._replace(shared=2)), expected)
    assert torch.equal(fast.quantize(x, target._replace(group=target.group[:1])), expected)
    assert not torch.equal(fast.quantize(x, target._replace(shared=1)), expected)


@pytest.mark.parametrize("eps", [0, 1, True, 0.0, 1e-6])
def test_eps_is_a_float_for_the_kernel_whatever_it_is_here(fast, eps: float) -> None:
    make = maker(12)
    x, shift, scale, target = make.values(2, 3, 24), make.values(2, 24), make.values(2, 24), make.params()
    found = found_codes(fast, fast.quantize(x, target, Norm(shift, scale, eps)))
    expected = REFERENCE.quantize(x, target, Norm(shift, scale, float(eps)))
    assert (found != expected).float().mean() < 0.02
    with pytest.raises((TypeError, ValueError)):
        fast.quantize(x, target, Norm(shift, scale, "tiny"))


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
    compiled, own = isinstance(run, NativeCpu), isinstance(run, NativeCpu) and native.has_products()
    onednn_runs = onednn.reason() is None
    assert compiled == (way not in ("torch", "nothing"))
    assert not ("generic" in way and own)
    assert own or not way.startswith("panels")
    product = "onednn u8 x s8" if onednn_runs else "int8 in fp32, exact"
    assert run.kernel("linear") == (f"fused, {native.instructions()} u8 x s8" if own else product)
    if own:
        named = way.removesuffix(OPTIMIZED).removeprefix("arm-")
        best = {"panels": "generic", "native": available()[0], "no-onednn": available()[0]}.get(named, named)
        assert native.instructions() == best
    assert ("fused attention" in run.kernel("scores")) == compiled
    assert isinstance(run.prepare(maker(0).weight(5, 8), None), PanelLinear) == own
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
