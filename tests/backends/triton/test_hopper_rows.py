"""The kernels for Hopper with grids of rows, softmax rows and channel factors.

What they are given, what they compile to, and on a Hopper GPU their results.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layouts import as_projected, compiled_for_hopper, from_projected, padded, read, to, traced
from operands import maker
from ties import assert_equal_up_to_ties

from poisoned import PoisonedTorch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from test_hopper import MERGED, NAMES, UNIFORM, Runs, with_forms
from test_hopper import TWO as TWO_REGIONS
from test_hopper_attention import MANY_HEADS, few_programs_for_many_heads
from test_triton_rows import assert_near, exact_powers, row_operand, softmax_row

from tqdit.backends.triton import candidates, flat, hopper, launch, tuning
from tqdit.backends.triton.backend import TritonBackend
from tqdit.backends.triton.kernels.rounding import BY_ROW, SOFTMAX_ROW
from tqdit.backends.triton.layouts import Config
from tqdit.ops.composed import split_heads
from tqdit.ops.quantizer import quantize
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, Norm, Residual, RowCodes
from tqdit.ops.tables import SCALE
from tqdit.spec import Grid
from tqdit.system.capture import recording

REFERENCE = Reference()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
TILE = Config(128, 128, 128, stages=4, piece=64, hopper=1)
ONE, TWO = Config(64, 0, 128, stages=4, hopper=1), Config(256, 0, 64, stages=16, hopper=1)


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper, "processors", lambda device: 4)
    candidates.hopper_attention.cache_clear()
    yield
    candidates.hopper_attention.cache_clear()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, four_processors) -> list[dict]:
    """The arguments of the launches of both kernels, which do not run."""
    found: list[dict] = []
    kernels = hopper.kernels()
    for module, name in ((kernels.linear, "hopper_linear_kernel"), (kernels.attention, "hopper_attention_kernel")):

        class Recorded:
            signature = inspect.signature(getattr(module, name).fn)

            def __getitem__(self, grid):
                return lambda *given, **options: found.append(self.signature.bind(*given).arguments)

        monkeypatch.setattr(module, name, Recorded())
    return found


def row_codes(make, batch: int, tokens: int, width: int) -> RowCodes:
    return RowCodes(make.codes(batch, tokens, width), make.values(batch, tokens).abs() * 0.03 + 1e-3)


def on_gpu(codes: RowCodes) -> RowCodes:
    return RowCodes(padded(codes.codes).to(CUDA), codes.scale.to(CUDA))


def test_what_the_kernels_are_given(seen) -> None:
    make, batch, tokens, heads = maker(0), 2, 128, 4
    layer = TritonBackend().prepare(make.weight(768, 320), None)
    weight = flat.weight([layer.codes, layer.scale, layer.bias, layer.sums], [320, 8])
    codes, channels = row_codes(make, batch, tokens, 320), torch.ones(768)
    launch.plain(codes, row_operand(), weight, TILE)
    launch.plain(codes.codes, make.params(), weight, TILE)
    launch.activation(codes, row_operand(), weight, TILE, make.params()._replace(channels=channels))
    launch.residual(codes, row_operand(), weight, TILE, Residual(make.values(batch, tokens, 768)))
    assert [(given["ROWS"], given["CHANNELS"]) for given in seen] == [
        (True, False), (False, False), (True, True), (True, False),
    ]  # fmt: skip
    assert seen[0]["row_steps"] is codes.scale
    assert seen[2]["channels"] is channels
    seen.clear()
    params = make.attention(heads, Grid.UNIFORM)._replace(softmax=softmax_row())
    given = as_projected(make.codes(batch, tokens, 3 * heads * 72), 3, heads)
    out = launch.attend(given, None, None, heads, (*params.projections, params.softmax, make.params()), ONE)
    plain = launch.attend(given, None, None, heads, (*params.projections, params.softmax), ONE)
    assert (out.dtype, plain.dtype, plain.shape) == (torch.int8, torch.float32, (batch, tokens, heads * 72))
    assert [(given["MODE"], given["TARGET_BITS"]) for given in seen] == [(6, 8), (6, 0)]


@pytest.mark.long
def test_linear_kernels_compile_without_spills(tmp_path: Path) -> None:
    """Every epilogue that reads rows, in the configurations of DiT-XL/2."""
    asked = [
        (f"{name} rows", 128, 128, stages, piece)
        for name, stages, piece in (
            ("plain", 6, 16), ("residual", 4, 32), ("residual bfloat16", 5, 32), ("residual-ungated", 5, 32),
            ("heads", 6, 64), ("context-heads", 6, 64), ("query-heads", 6, 64), ("gelu", 6, 64),
        )
    ]  # fmt: skip
    asked += [(f"{name} channels", 128, 128, 6, 64) for name in ("gelu", "gelu rows", "gelu two", "gelu merged rows")]
    asked += [("heads rows", 64, 128, 8, 64), ("gelu rows channels", 64, 64, 12, 64)]
    for kernel in compiled_for_hopper("linear", asked, tmp_path):
        assert not kernel["spilled"], kernel
        assert not kernel["warnings"], kernel
        assert kernel["shared"] <= hopper.SHARED_MEMORY, kernel
        assert 0 < kernel["registers"]["multiplies"] <= 240, kernel


@pytest.mark.long
def test_attention_kernels_compile_without_spills(four_processors, tmp_path: Path) -> None:
    """Softmax rows: every candidate for 256, 512 and 1024 tokens of 72 channels, and results in fp32."""
    mode = SOFTMAX_ROW.value
    asked = [
        (tokens, 72, mode, list(config), False, False)
        for tokens in (256, 512, 1024)
        for config in candidates.hopper_attention(CPU, tokens, 72, False, True)
        if config.block_n == 0
    ]
    asked += [(256, 64, mode, list(ONE), True, True), (256, 72, mode, list(ONE), False, False, 0)]
    asked += [(1024, 72, mode, list(TWO), False, False, 0)]
    for kernel in compiled_for_hopper("attention", asked, tmp_path):
        programs = 2 if kernel["kernel"][3][0] == 64 else 1
        assert kernel["shared"] <= hopper.SHARED_MEMORY // programs - 1024, kernel
        assert kernel["spilled"] <= 64, kernel  # bytes, of sixteen warps
        assert not any("serialized" in warning for warning in kernel["warnings"]), kernel


@pytest.mark.long
def test_other_kernels_compile(tmp_path: Path) -> None:
    """The norm of whole rows without spills, twelve warps on a multiprocessor; what else reads or writes rows."""
    norms = dict.fromkeys(candidates.norm(512, 1152) + candidates.norm(16384, 1152))
    asked = [(stream, 1152, list(config), True) for stream in ("fp32", "bf16") for config in norms]
    for kernel in compiled_for_hopper("norm", asked, tmp_path):
        assert not kernel["spilled"], kernel
        assert kernel["of_a_thread"] <= launch.ROW_REGISTERS, kernel
    rows = [candidates.quantize_rows(width)._replace(block_n=width) for width in (1536, 3072, 12288, 15360)]
    asked = [("bf16", BY_ROW.value, list(config)) for config in rows]
    assert not any(kernel["spilled"] for kernel in compiled_for_hopper("quantize", asked, tmp_path))
    names = "plain rows", "residual rows", "heads rows", "gelu rows channels", "gelu two channels"
    asked = [(name, list(candidates.linear(rows, False, 8)[0])) for name in names for rows in (64, 16384)]
    asked_of_a_context = [
        (keys, 72, SOFTMAX_ROW.value, biased, list(candidates.attention(64, keys)[0]))
        for keys, biased in ((120, True), (77, False), (512, True))
    ]
    for which, forms in (("ordinary", asked), ("cross", asked_of_a_context)):
        for kernel in compiled_for_hopper(which, forms, tmp_path):
            assert kernel["shared"] <= hopper.SHARED_MEMORY, kernel


# On a GPU. batch, tokens, depth, width, heads, programs, as in `test_hopper`: one tile, odd numbers of tiles in one
# program and in three, a depth that ends within a block, tiles of 64 rows, whole models' sizes.
LINEARS = [
    (TILE, 1, 128, 128, 128, 2, 0), (TILE, 1, 128, 100, 896, 8, 3), (TILE, 3, 128, 448, 640, 8, 1),
    (TILE._replace(stages=6), 2, 256, 1152, 1152, 16, 0), (TILE._replace(stages=2, piece=16), 1, 128, 1152, 384, 4, 1),
    (TILE._replace(stages=5, piece=32), 2, 256, 4608, 128, 1, 1),
    (Config(64, 128, 128, stages=8, piece=32, hopper=1), 5, 64, 1152, 1152, 16, 7),
    (Config(128, 64, 128, stages=8, piece=32, hopper=1), 1, 128, 1152, 384, 4, 1),
    (Config(64, 64, 128, stages=12, hopper=1), 2, 64, 320, 192, 2, 1),
]  # fmt: skip
ORDINARY = Config(64, 64, 128, 8, 4, 3, 32)


FEW = [case for case in LINEARS if case[0] in (TILE._replace(stages=6), *(case[0] for case in LINEARS[-2:]))]
# The grid of the codes after GELU; whether what is read is on the grid of rows; whether there are channel factors.
FIRST = (*UNIFORM, True, True)
OTHERS = [(*of, *how) for of in (UNIFORM, MERGED, TWO_REGIONS) for how in ((True, True), (True, False), (False, True))]


class TestLinearOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize((*NAMES, "parts"), with_forms(LINEARS, 3, (2, 1), FEW))
    def test_heads(self, monkeypatch, config, batch, tokens, depth, width, heads, programs, parts: int) -> None:
        make = maker(1)
        codes, source = row_codes(make, batch, tokens, depth), row_operand()
        weight, bias = make.weight(parts * width, depth), make.values(parts * width)
        params = make.attention(heads, Grid.UNIFORM, batch)
        targets = params.projections[1:] if parts == 2 else params.projections[:parts]
        expected = REFERENCE.project(codes, source, REFERENCE.prepare(weight, bias), targets, heads)
        given = on_gpu(codes), to(CUDA, source), TritonBackend().prepare(weight, bias).to(CUDA)
        run, there = Runs(monkeypatch, programs), [to(CUDA, target) for target in targets]
        buffer = run(config, lambda backend: backend.project(*given, there, heads).codes)
        found = run.backend.project(*given, there, heads)._replace(codes=buffer)
        assert torch.equal(from_projected(found, parts, heads), expected.int())

    @pytest.mark.parametrize(NAMES, LINEARS)
    def test_residual_and_plain(self, monkeypatch, config, batch, tokens, depth, width, heads, programs) -> None:
        make = maker(2)
        codes, source = row_codes(make, batch, tokens, depth), row_operand()
        weight, bias = make.weight(width, depth), make.values(width)
        x, gate = make.values(batch, tokens, width), make.values(batch, 6 * width).chunk(6, dim=1)[2]
        given = on_gpu(codes), to(CUDA, source), TritonBackend().prepare(weight, bias).to(CUDA)
        plain, run = REFERENCE.prepare(weight, bias), Runs(monkeypatch, programs)
        for stream in (x, x.bfloat16()):
            for then in (Residual(stream, gate), Residual(stream)):
                out = run(config, lambda backend, then=then: backend.linear(*given, to(CUDA, then)))
                assert torch.equal(out.cpu(), REFERENCE.linear(codes, source, plain, then))
        out = run(config, lambda backend: backend.linear(*given))
        assert torch.equal(out.cpu(), REFERENCE.linear(codes, source, plain))

    @pytest.mark.parametrize((*NAMES, "form"), with_forms(LINEARS, FIRST, OTHERS[1:], FEW))
    def test_gelu(self, monkeypatch, config, batch, tokens, depth, width, heads, programs, form: tuple) -> None:
        grid, bits, merged, by_row, factors = form
        eight, make = maker(3), maker(4, bits)
        rows = row_codes(eight, batch, tokens, depth)
        codes, source = (rows, row_operand()) if by_row else (rows.codes, eight.params(lead=batch))
        target = make.params(grid, batch, merged=merged)
        if factors:
            target = target._replace(channels=eight.values(width).abs() + 0.2)
        weight, bias = eight.weight(width, depth), eight.values(width)
        here = on_gpu(rows) if by_row else to(CUDA, padded(rows.codes))
        given = here, to(CUDA, source), TritonBackend().prepare(weight, bias).to(CUDA), Activation(to(CUDA, target))
        run = Runs(monkeypatch, programs)
        found = run(config, lambda backend: backend.linear(*given))
        y = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias)).double()
        value = torch.nn.functional.gelu(y, approximate="tanh") * (target.channels.double() if factors else 1)
        assert_equal_up_to_ties(read(found, width, target), value, target)
        assert torch.equal(found, run(ORDINARY, lambda backend: backend.linear(*given)))


# Every slot and tile size, one slot, two and more: 64 to 1024 tokens; heads of one, two and three parts of channels.
ATTENTIONS = [
    (1, 128, 72, 2, ONE), (3, 256, 72, 4, ONE), MANY_HEADS, (2, 256, 72, 3, ONE._replace(block_n=64)),
    (2, 256, 64, 2, ONE), (2, 256, 72, 2, Config(64, 64, 64, stages=4, hopper=1)),
    (2, 192, 72, 3, Config(64, 0, 64, stages=4, hopper=1)), (2, 64, 72, 2, Config(64, 0, 64, stages=4, hopper=1)),
    (3, 256, 72, 4, TWO), (1, 256, 72, 2, Config(128, 0, 64, stages=16, hopper=1)),
    (1, 128, 40, 3, ONE), (2, 256, 96, 2, Config(128, 0, 128, stages=8, hopper=1)),
    (1, 384, 72, 2, Config(128, 0, 128, stages=8, hopper=1)), (2, 512, 64, 2, TWO),
    (1, 512, 72, 3, Config(128, 128, 128, stages=8, blocks=2, hopper=1)), (1, 1024, 72, 2, TWO),
    (1, 1024, 64, 2, TWO), (1, 512, 72, 2, TWO._replace(block_n=256)),
    (1, 1024, 72, 2, Config(128, 0, 128, stages=8, blocks=2, hopper=1)),
]  # fmt: skip


# One tile of rows, parts of a head, few and many slots of keys: bits and results in fp32 are compiled for these alone.
SOME_ATTENTIONS = [ATTENTIONS[i] for i in (1, 5, 8, 13, 15)]


class TestAttentionOnHopper:
    pytestmark = on_hopper

    # Whether there is a time group for each sample, whether the result is coded, by what queries are multiplied, bits.
    @pytest.mark.parametrize(
        ("batch", "tokens", "head_dim", "heads", "config", "form"),
        with_forms(ATTENTIONS, (True, True, 100, 8), [(False, True, 1, 8)], ATTENTIONS)
        + with_forms([], None, [(True, True, 100, 6), (False, False, 1, 8), (True, False, 100, 6)], SOME_ATTENTIONS),
    )
    def test_softmax_rows(
        self, monkeypatch, batch, tokens, head_dim, heads, config: Config, form: tuple[bool, bool, int, int]
    ) -> None:
        """Codes of the powers up to ties; given those, P V and its codes, or its fp32 values, exactly; three times."""
        by_sample, coded, sharp, bits = form
        few_programs_for_many_heads(monkeypatch, heads)
        monkeypatch.setattr(hopper, "torch", PoisonedTorch())
        lead, width, make = batch if by_sample else 1, heads * head_dim, maker(5)
        params = make.attention(heads, Grid.UNIFORM, lead)._replace(softmax=softmax_row(bits))
        table = params.query.table.clone()
        table[..., SCALE] *= sharp
        params = params._replace(query=params.query._replace(table=table))
        target = make.params(lead=lead, reach=2.0)
        qkv = make.codes(batch, tokens, 3 * width)
        trace = torch.full((batch, heads, tokens, tokens), 55, dtype=torch.int8, device=CUDA)
        operands = tuple(to(CUDA, p) for p in (*params.projections, params.softmax, *((target,) if coded else ())))
        given = as_projected(to(CUDA, qkv), 3, heads), None, None, heads, operands, config
        actual = launch.attend(*given, trace)
        for _ in range(3):
            assert torch.equal(launch.attend(*given)[..., :width], actual[..., :width])
        codes = traced(trace.cpu(), params.softmax)
        q, k, v = split_heads(qkv, 3, heads)
        half = 1 << (bits - 1)
        powers = exact_powers(q, k, params, head_dim)
        assert_near(codes.int(), powers * (2 * half - 1) - half, bits)
        attended = REFERENCE.values(codes, params.softmax, v, params.value).transpose(1, 2).flatten(2)
        if coded:
            assert torch.equal(read(actual, width), quantize(attended, target).int())
        else:
            assert torch.equal(actual.cpu(), attended)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
def test_a_block_of_rows_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm, projection, attention and GELU as a CUDA graph: what it computes again is what was computed."""
    make, run, heads = maker(6), TritonBackend(), 2
    width = heads * 72
    monkeypatch.setattr(tuning, "choose", lambda key, device, candidates, run: candidates()[0])
    rows, target = to(CUDA, row_operand()), to(CUDA, make.params(reach=2.0))
    attention = to(CUDA, make.attention(heads, Grid.UNIFORM)._replace(softmax=softmax_row()))
    norm = Norm(*make.values(2, 2, width).to(CUDA), 1e-6)
    qkv, out, up = (run.prepare(make.weight(n, width), None).to(CUDA) for n in (3 * width, width, 4 * width))
    x = make.values(2, 256, width).to(CUDA)
    then = Activation(target._replace(channels=make.values(4 * width).abs().to(CUDA) + 0.2))

    def block() -> torch.Tensor:
        projected = run.project(run.quantize(x, rows, norm), rows, qkv, attention.projections, heads)
        stream = run.linear(run.attend(projected, attention, target), target, out, Residual(x))
        by_row = run.attend(projected, attention, rows)
        stream = run.linear(by_row, rows, out, Residual(stream))
        return run.linear(run.quantize(stream, rows, norm), rows, up, then)

    expected = block().clone()
    with recording() as graph:
        found = block()
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
