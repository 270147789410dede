"""The kernels compiled to the integer instructions of other processors: the same codes and accumulators.

ARM kernels run in an emulator. AVX2 with VNNI runs in the encoding of AVX-512 where the processor has only that.
"""

import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest
import torch
from cpu_codes import found_codes, given_codes
from end_cases import DTYPES, EPS, assert_embedded, assert_unembedded, embed_case, layer_of, unembed_case
from operands import maker
from test_cpu_verbs import check_attention
from ties import assert_equal_up_to_ties
from torch.nn.functional import gelu
from ways import AVX2_VNNI, backend_that, forget

from tqdit.backends import instructions, native
from tqdit.backends.instructions import KNOWN, NAMES, available, target_flags
from tqdit.errors import InputError
from tqdit.ops.composed import Composed
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, Float, Norm, Residual
from tqdit.spec import Grid

REFERENCE = Reference()
WAYS = ("amx-int8", "avx2-vnni", "arm-i8mm", "arm-dotprod", "arm-generic")


# Products that AMX computes in tiles of 16 x 16: a last tile of few rows, of few columns, and of little depth.
IN_TILES = [(8, 64, 32), (9, 68, 48), (12, 128, 112), (23, 4, 80), (24, 188, 20), (32, 192, 96)]


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Composed]:
    yield backend_that(request.param, monkeypatch)
    monkeypatch.undo()
    forget()


# What the kernels compute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.ROW, Grid.MRQ_GELU])
def test_products_are_exact(run, grid: Grid) -> None:
    """The largest products there are, more depth than is multiplied at a time, and every number of rows of a tile."""
    make = maker(11)
    shapes = [(tokens, 12, 33) for tokens in range(1, 9)]
    for tokens, depth, columns in [*shapes, (1, 4, 1), (7, 516, 17), (71, 1500, 64), (5, 60, 190), *IN_TILES]:
        source, x = make.params(grid, 2), make.values(2, tokens, depth) * 3
        weight, bias = make.weight(columns, depth), make.values(columns)
        weight.codes[::2], x[:, ::3] = -128, 1e4
        weight = weight._replace(colsum=weight.codes.sum(1, dtype=torch.int32))
        layer, codes = run.prepare(weight, bias), run.quantize(x, source)
        expected = REFERENCE.linear(REFERENCE.quantize(x, source), source, REFERENCE.prepare(weight, bias))
        assert torch.equal(run.linear(codes, source, layer), expected)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(run.linear(codes, source, layer, Float(dtype)), expected.to(dtype))
        assert torch.equal(layer.unpacked(), weight.codes)


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_SOFTMAX, Grid.SOFTMAX_ROW])
@pytest.mark.parametrize(("tokens", "length", "dim"), [(1, 1, 1), (17, 77, 13), (21, 30, 24)])
def test_attention_is_exact_but_for_ties_of_exp(run, grid: Grid, tokens: int, length: int, dim: int) -> None:
    make = maker(2)
    attention, target = make.attention(2, grid, 2), make.params(lead=2, reach=2.0)
    check_attention(run, make.codes(2, tokens, 6 * dim), None, attention, target)
    check_attention(run, make.codes(2, tokens, 2 * dim), make.codes(2, length, 4 * dim), attention, target)


@pytest.mark.parametrize(("grid", "merged"), [(Grid.UNIFORM, False), (Grid.MRQ_GELU, False), (Grid.MRQ_GELU, True)])
def test_what_follows_a_product(run, grid: Grid, merged: bool) -> None:
    make = maker(3, 6 if merged else 8)
    codes, source, target = make.codes(2, 9, 24), make.params(lead=2), make.params(grid, 2, merged=merged)
    weight, bias, heads = make.weight(48, 24), make.values(48), [make.params(lead=2, units=3), make.params(units=3)]
    exact, layer, given = REFERENCE.prepare(weight, bias), run.prepare(weight, bias), given_codes(run, codes, source)
    projected = found_codes(run, run.project(given, source, layer, heads, 3))
    assert torch.equal(projected, REFERENCE.project(codes, source, exact, heads, 3).int())
    then = Residual(make.values(2, 9, 48), make.values(2, 48))
    assert torch.equal(run.linear(given, source, layer, then), REFERENCE.linear(codes, source, exact, then))
    value = gelu(REFERENCE.product(codes, source, exact).double(), approximate="tanh")
    coded = found_codes(run, run.linear(given, source, layer, Activation(target)), target)
    assert_equal_up_to_ties(coded, value, target)


def test_rows_of_floats(run) -> None:
    make = maker(4)
    x, shift, scale = make.values(2, 7, 37) * 3, make.values(2, 37), make.values(2, 37)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for target in (make.params(lead=2), make.params(Grid.MRQ_GELU, 2), make.params(Grid.ROW, 2)):
            found, expected = run.quantize(x.to(dtype), target), REFERENCE.quantize(x.to(dtype), target)
            assert torch.equal(found_codes(run, found, target), found_codes(None, expected, target))
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    target, value = make.params(), normal * (1 + scale.double()[:, None]) + shift.double()[:, None]
    assert_equal_up_to_ties(found_codes(run, run.quantize(x, target, Norm(shift, scale, 1e-6))), value, target)


def test_layers_on_float_inputs(run) -> None:
    make = maker(5)
    for rows, columns, depth, dtype in [
        (1, 1, 1, None), (3, 33, 17, None), (9, 70, 130, None), (29, 129, 1028, torch.float32),
    ]:  # fmt: skip
        x, weight = make.values(rows, depth), make.weight(columns, depth)
        actual = run.float_input_linear(x, run.prepare_float_input(weight, None), dtype)
        value = weight.codes.double() * weight.scale.double()[:, None]
        bound = (depth + 4) * 2.0**-24 * (x.double().abs() @ value.abs().t())
        assert ((actual - x.double() @ value.t()).abs() <= bound).all()


def test_the_layers_around_the_blocks(run) -> None:
    """Vectors of columns that are not full, and floats of every type in memory."""
    make_layer = functools.partial(layer_of, run.prepare_float_input)
    for dtype, kind in zip(DTYPES, ("float", "int8", "no bias"), strict=True):
        for channels, side, width in [(4, 2, 40), (5, 1, 33), (1, 3, 7)]:
            x, layer, position, exact, size = embed_case(make_layer, 2, channels, (3, 5), side, width, kind, dtype)
            assert_embedded(run.embed(x, layer, position, side, dtype), channels * side**2, exact, size, dtype)
            x, modulation, layer, exact, bound = unembed_case(make_layer, 2, channels, (3, 5), side, width, kind, dtype)
            like = torch.empty(2, 1, 3 * side, 5 * side, dtype=dtype)
            assert_unembedded(run.unembed(x, modulation, EPS, layer, like, side), exact, bound, dtype)


def test_a_report_names_the_instructions(run, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["run"].removeprefix("arm-")
    assert native.instructions() == name
    assert native.has_products() == (name != "generic")
    assert run.kernel("scores") == f"fused attention, {name} u8 x s8"
    assert run.kernel("linear") == f"fused, {name} u8 x s8" or name == "generic"


# Which instructions ---------------------------------------------------------------------------------------------------


def test_names_have_the_numbers_of_the_sources() -> None:
    numbers = re.search(r"enum Instructions \{(.*?)\}", (native.SOURCES / "dots.h").read_text())
    assert numbers is not None
    found = {name.strip(): int(number) for name, number in (part.split("=") for part in numbers[1].split(","))}
    assert found == {name.upper().replace("-", "_"): number for number, name in enumerate(NAMES)}


@pytest.mark.skipif(platform.machine() not in instructions.X86, reason="no x86 compiler here")
@pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("g++") is None, reason="no g++ or objdump here")
def test_avx_vnni_is_256_bits_wide(tmp_path: Path) -> None:
    """The code for AVX-VNNI uses 256-bit registers. It is compiled and disassembled here, and not run."""
    path = tmp_path / "kernels.so"
    flags = (*native.FLAGS, "-O0", *AVX2_VNNI.split())
    subprocess.run(["g++", *flags, str(native.SOURCES / "kernels.cpp"), "-o", str(path)], check=True)
    text = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\{vex\}\s+vpdpbusd .*%ymm", text)
    assert "zmm" not in text


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """A function that makes this a processor of a kind, with features."""
    monkeypatch.delenv("TQDIT_INSTRUCTIONS", raising=False)
    monkeypatch.delenv("TQDIT_CXXFLAGS", raising=False)

    def become(machine: str, words: str) -> None:
        monkeypatch.setattr(instructions.platform, "machine", lambda: machine)
        monkeypatch.setattr(instructions, "features", lambda: frozenset(words.split()))
        monkeypatch.setattr(instructions, "tiles_permitted", lambda: "amx" in words)

    return become


V3 = " ".join(sorted(instructions.V3))
AVX512 = " ".join(sorted(instructions.AVX512))
AMX = f"{AVX512} avx512_bf16 amx_tile amx_int8"
MACHINES = [
    ("x86_64", AMX, ["amx-int8", "avx512-vnni", "avx2"]),
    ("x86_64", AVX512, ["avx512-vnni", "avx2"]),
    ("x86_64", f"{V3} avx_vnni", ["avx2-vnni", "avx2"]),
    ("x86_64", V3, ["avx2"]),
    ("x86_64", "avx2 fma", []),
    ("x86_64", "sse2", []),
    ("aarch64", "asimd asimddp i8mm", ["i8mm", "dotprod"]),
    ("aarch64", "asimd asimddp", ["dotprod"]),
    ("aarch64", "asimd", []),
    ("arm64", "", ["i8mm", "dotprod"]),  # macOS, which does not say
    ("ppc64le", "altivec", []),
]


@pytest.mark.parametrize(("machine", "words", "names"), MACHINES)
def test_a_processor_is_asked_what_it_has(processor, monkeypatch, machine: str, words: str, names: list[str]) -> None:
    processor(machine, words)
    assert available() == [*names, "generic"]
    if machine == "aarch64" and names:
        assert target_flags() == KNOWN[names[0]].flags
    elif machine.startswith("a"):
        assert target_flags() == ("-mcpu=native",)
    else:
        assert target_flags() == ("-march=native", *(() if words == AMX else ("-DTQDIT_NO_TILES",)))
    for name in names:
        monkeypatch.setenv("TQDIT_INSTRUCTIONS", name)
        assert target_flags() == KNOWN[name].flags
        monkeypatch.setenv("TQDIT_CXXFLAGS", "-g -O1")
        assert target_flags() == (*KNOWN[name].flags, "-g", "-O1")
        monkeypatch.delenv("TQDIT_INSTRUCTIONS")
        assert target_flags() == ("-g", "-O1")
        monkeypatch.delenv("TQDIT_CXXFLAGS")


def test_tiles_that_the_system_refuses_are_left_out(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    processor("x86_64", AMX)
    monkeypatch.setattr(instructions, "tiles_permitted", lambda: False)
    assert available() == ["avx512-vnni", "avx2", "generic"]
    assert target_flags() == ("-march=native", "-DTQDIT_NO_TILES")
    monkeypatch.setenv("TQDIT_INSTRUCTIONS", "amx-int8")
    with pytest.raises(InputError, match="'amx-int8', and this processor has avx512-vnni, avx2, generic"):
        target_flags()


def test_a_name_that_does_not_serve_is_one_error(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    processor("x86_64", V3)
    monkeypatch.setenv("TQDIT_INSTRUCTIONS", "avx3")
    with pytest.raises(InputError, match=f"'avx3', not one of {', '.join(NAMES)}"):
        target_flags()
    monkeypatch.setenv("TQDIT_INSTRUCTIONS", "avx2-vnni")
    with pytest.raises(InputError, match="'avx2-vnni', and this processor has avx2, generic"):
        native._load.__wrapped__()


def test_the_emulated_processor_refuses_newer_instructions(tmp_path: Path) -> None:
    """So what runs there was compiled to what it has."""
    if reason := emulated.missing():
        pytest.skip(reason)
    source, program = tmp_path / "newer.cpp", tmp_path / "newer"
    product = "vusdotq_s32(vdupq_n_s32(0), vdupq_n_u8(n), vdupq_n_s8(1))"
    source.write_text(f"#include <arm_neon.h>\nint main(int n, char**) {{ return vgetq_lane_s32({product}, 0); }}\n")
    flags = KNOWN["i8mm"].flags
    subprocess.run([emulated.COMPILER, "-static", *flags, str(source), "-o", str(program)], check=True)
    results = {}
    for name, processor in emulated.PROCESSORS.items():
        command = [emulated.EMULATOR, "-cpu", processor, str(program)]
        results[name] = subprocess.run(command, capture_output=True, check=False).returncode
    assert results["i8mm"] == 4
    assert results["dotprod"] < 0
    assert results["generic"] < 0
