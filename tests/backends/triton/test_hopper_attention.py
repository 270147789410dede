"""The attention kernel for Hopper: where it runs, what it compiles to, and on a Hopper GPU its results."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layouts import as_projected, compiled_for_hopper, read, to, traced
from operands import maker
from ties import assert_equal_up_to_ties

from poisoned import PoisonedTorch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tqdit.backends.triton import candidates, configurations, hopper, launch, naming
from tqdit.backends.triton.kernels.rounding import SOFTMAX, SOFTMAX_MERGED, UNIFORM
from tqdit.backends.triton.layouts import Config
from tqdit.errors import InputError
from tqdit.ops.composed import split_heads
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.reference import Reference
from tqdit.ops.tables import SCALE
from tqdit.spec import Grid

REFERENCE = Reference()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ONE, TWO = Config(64, 0, 128, stages=4, hopper=1), Config(256, 0, 64, stages=16, hopper=1)


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper, "processors", lambda device: 4)
    candidates.hopper_attention.cache_clear()
    yield
    candidates.hopper_attention.cache_clear()


@pytest.mark.long
def test_kernels_of_dit_xl_compile(four_processors, tmp_path: Path) -> None:
    """For sm_90a, at 256 and 1024 tokens and two other shapes: no products one after another, few spills."""
    asked = [
        (tokens, 72, mode.value, list(config), False, False)
        for tokens in (256, 1024)
        for mode in (UNIFORM, SOFTMAX, SOFTMAX_MERGED)
        for config in candidates.hopper_attention(CPU, tokens, 72, mode is SOFTMAX)
        if config.block_n == 0 and config.block_k == (64 if config.block_m == 256 else 128)
    ]
    asked += [(256, 72, SOFTMAX_MERGED.value, list(Config(64, 64, 64, stages=4, hopper=1)), False, False)]
    asked += [(256, 64, UNIFORM.value, list(ONE._replace(block_n=64)), True, True)]
    asked += [(512, 96, UNIFORM.value, list(Config(128, 0, 128, stages=4, hopper=1)), True, True)]
    found = compiled_for_hopper("attention", asked, tmp_path)
    assert len(found) > 8
    for kernel in found:
        programs = 2 if kernel["kernel"][3][0] == 64 else 1
        assert kernel["shared"] <= hopper.SHARED_MEMORY // programs - 1024, kernel
        assert kernel["spilled"] <= 1024, kernel  # bytes, of two products: scores fill half the registers
        assert not any("serialized" in warning for warning in kernel["warnings"]), kernel


@pytest.mark.parametrize(
    ("config", "tokens", "head_dim", "takes"),
    [
        (ONE, 256, 72, True), (ONE, 256, 64, True), (ONE, 128, 96, True), (ONE, 192, 72, False), (ONE, 256, 36, False),
        (ONE, 256, 128, False), (ONE._replace(block_n=64), 256, 72, True), (ONE._replace(block_n=96), 256, 72, False),
        (TWO, 1024, 72, True), (TWO, 512, 72, True), (TWO, 2048, 72, False), (TWO, 128, 72, False),
        (Config(128, 0, 128, stages=8, blocks=2, hopper=1), 384, 72, False),
        (Config(128, 0, 128, stages=8, blocks=4, hopper=1), 512, 72, False),
        (Config(128, 0, 128, stages=8, blocks=0, hopper=1), 512, 72, False),
        (Config(128, 0, 128, stages=8, hopper=1), 384, 72, True),
    ],
)  # fmt: skip
def test_what_it_takes(four_processors, config: Config, tokens: int, head_dim: int, takes: bool) -> None:
    """Whole tiles and slots; a head that fits shared memory; heads of 32 or 64 channels and 8, 16 or 32 more."""
    assert hopper.supports_attention(config, CPU, tokens, head_dim) == takes


def test_no_other_device_runs_it() -> None:
    assert not hopper.supports_attention(ONE, CPU, 256, 72)
    assert candidates.hopper_attention(CPU, 256, 72, False) == []
    make = maker(1)
    params, target = make.attention(2, Grid.UNIFORM), make.params()
    given = as_projected(make.codes(1, 128, 3 * 128), 3, 2)
    operands = (*params.projections, params.softmax, target)
    with pytest.raises(InputError, match="compute capability"):
        launch.attend(given, None, None, 2, operands, ONE)


def test_candidates_run_and_have_a_key_of_their_own(four_processors) -> None:
    for tokens in (64, 128, 256, 512, 1024):
        for two in (False, True):
            found = candidates.hopper_attention(CPU, tokens, 72, two)
            assert found
            assert all(config.hopper and hopper.supports_attention(config, CPU, tokens, 72) for config in found)
    assert candidates.hopper_attention(CPU, 100, 72, False) == []
    assert naming.attention_key(32, 256, 72, 0) != naming.attention_key(32, 256, 72, 0, True)


def test_what_the_kernel_is_given(four_processors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but running it; there is no GPU."""
    kernels = hopper.kernels()
    assert kernels
    signature = inspect.signature(kernels.attention.hopper_attention_kernel.fn)
    seen: list[tuple] = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *given, **options: seen.append((grid, signature.bind(*given).arguments, options))

    monkeypatch.setattr(kernels.attention, "hopper_attention_kernel", Recorded())
    make, batch, tokens, heads = maker(4), 3, 256, 5
    params, target = make.attention(heads, Grid.UNIFORM, batch), make.params(lead=batch)
    given = as_projected(make.codes(batch, tokens, 3 * heads * 72), 3, heads)
    operands = (*params.projections, params.softmax, target)
    out = launch.attend(given, None, None, heads, operands, ONE._replace(block_n=128))
    grid, arguments, options = seen[0]
    assert out.shape == (batch, tokens, 368)  # 360, padded to 16 bytes
    assert grid == (8,)  # two for each of four multiprocessors
    assert options == {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": False}
    assert arguments["q"].block_shape == [64, 64]
    assert arguments["k_rest"].block_shape == [128, 32]
    assert arguments["v_rest"].block_shape == [8, 128]
    assert arguments["v"].shape == [batch * heads * 72, tokens]
    names = (
        "sequences",
        "heads",
        "out_stride",
        "N",
        "PARTS",
        "D",
        "D_FIRST",
        "D_REST",
        "V_REST",
        "V_PAD",
        "SLOTS",
        "BK",
    )
    assert [arguments[name] for name in names] == [15, 5, 368, 256, 2, 72, 64, 32, 8, 16, 4, 128]
    assert (arguments["AT_ONCE"], arguments["Q_SLOTS"], arguments["WARPS"], arguments["TRACE"]) == (1, 2, 4, False)


def test_committed_configurations_run_what_they_are_for(four_processors) -> None:
    """Nothing looks at them again before a kernel is launched with them."""
    seen = 0
    for path in configurations.TUNED.glob("*.json"):
        for key, config in configurations.read(path).items():
            assert bool(config.hopper) <= ("Hopper" in key), key
            if config.hopper and key.startswith("attention"):
                _, tokens, head_dim = map(int, key.split()[1].strip(",").split("x"))
                assert hopper.supports_attention(config, CPU, tokens, head_dim), key
                seen += 1
            elif config.hopper:
                epilogue, columns = key.split()[1], int(re.search(r"x(\d+)x", key)[1])
                tile = int(key.split()[-2])
                assert hopper.supports_product(config, tile, columns // 3 if epilogue == "heads" else columns), key
                seen += 1
    assert seen > 10


MANY_HEADS = (2, 256, 72, 16, ONE)  # on few multiprocessors, so that a program has several


def few_programs_for_many_heads(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    """Few processors have several heads for each program, so that the reference takes seconds and not a minute."""
    if heads == MANY_HEADS[3]:
        monkeypatch.setattr(hopper, "processors", lambda device: 4)


# Sequences and tokens; every slot and tile size; heads of one, two and three parts of channels; parts of a head.
CASES = [
    (1, 128, 72, 2, ONE), (3, 256, 72, 4, ONE), MANY_HEADS, (2, 256, 72, 3, ONE._replace(block_n=64)),
    (2, 256, 72, 2, Config(64, 64, 64, stages=4, hopper=1)), (2, 192, 72, 3, Config(64, 0, 64, stages=4, hopper=1)),
    (1, 256, 72, 1, ONE), (2, 64, 72, 2, Config(64, 0, 64, stages=4, hopper=1)), (2, 256, 64, 2, ONE),
    (1, 128, 40, 3, ONE),
    (2, 256, 96, 2, Config(128, 0, 128, stages=8, hopper=1)), (1, 384, 72, 2, Config(128, 0, 128, stages=8, hopper=1)),
    (1, 512, 72, 3, Config(128, 128, 128, stages=8, blocks=2, hopper=1)), (1, 1024, 72, 2, TWO),
    (1, 512, 72, 2, TWO._replace(block_n=256)), (1, 1024, 72, 2, Config(128, 0, 128, stages=8, blocks=2, hopper=1)),
]  # fmt: skip
UNIFORM_8, UNIFORM_6 = (Grid.UNIFORM, 8, False), (Grid.UNIFORM, 6, False)
TWO_REGIONS, MERGED = (Grid.MRQ_SOFTMAX, 8, False), (Grid.MRQ_SOFTMAX, 6, True)
# Every case on one uniform grid and on two regions, merged where two products have too few registers (and there is no
# such candidate); a tile of rows, parts of a head and several slots on all grids. Time groups of samples take turns
# with one for all: the kernels are the same but for that.
FORMS = [(*case, UNIFORM_8) for case in CASES]
FORMS += [(*case, MERGED if case[-1].block_m == 256 else TWO_REGIONS) for case in CASES]
FORMS += [(*CASES[i], grid) for i in (1, 4, 12) for grid in (UNIFORM_6, MERGED)] + [(*CASES[13], UNIFORM_6)]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
class TestOnHopper:
    @pytest.mark.parametrize(
        ("batch", "tokens", "head_dim", "heads", "config", "of_probabilities", "by_sample"),
        [(*form, bool(number % 2)) for number, form in enumerate(FORMS)],
    )
    def test_codes(
        self, monkeypatch, batch, tokens, head_dim, heads, config: Config, of_probabilities: tuple, by_sample: bool
    ) -> None:
        """Of the probabilities up to ties; given those, P V and its codes exactly; the same three times."""
        grid, bits, merged = of_probabilities
        few_programs_for_many_heads(monkeypatch, heads)
        monkeypatch.setattr(hopper, "torch", PoisonedTorch())
        lead, width = batch if by_sample else 1, heads * head_dim
        make = maker(2, bits)
        params, target = make.attention(heads, grid, lead, merged), make.params(lead=lead, reach=2.0)
        qkv = make.codes(batch, tokens, 3 * width)
        trace = torch.full((batch, heads, tokens, tokens), 55, dtype=torch.int8, device=CUDA)
        operands = tuple(to(CUDA, p) for p in (*params.projections, params.softmax, target))
        given = as_projected(to(CUDA, qkv), 3, heads), None, None, heads, operands, config
        actual = launch.attend(*given, trace)
        for _ in range(3):
            assert torch.equal(launch.attend(*given)[..., :width], actual[..., :width])
        codes = traced(trace.cpu(), params.softmax)
        q, k, v = split_heads(qkv, 3, heads)
        scores = dequantize(q, params.query).double() @ dequantize(k, params.key).double().transpose(-1, -2)
        assert_equal_up_to_ties(codes.int(), (scores * head_dim**-0.5).softmax(-1), params.softmax)
        attended = REFERENCE.values(codes, params.softmax, v, params.value).transpose(1, 2).flatten(2)
        assert torch.equal(read(actual, width), quantize(attended, target).int())

    @pytest.mark.parametrize("config", [TWO, Config(128, 0, 128, stages=8, blocks=2, hopper=1)])
    def test_scores_far_above_those_of_the_first_keys(self, config: Config) -> None:
        """Sums of powers relative to the first slot's highest score overflow, and are made anew."""
        make, heads, tokens = maker(3), 2, 1024
        params, target = make.attention(heads, Grid.UNIFORM), make.params(reach=2.0)
        table = params.query.table.clone()
        table[..., SCALE] *= 200
        params = params._replace(query=params.query._replace(table=table))
        qkv = make.codes(1, tokens, 3 * heads * 72)
        operands = tuple(to(CUDA, p) for p in (*params.projections, params.softmax, target))
        given = as_projected(to(CUDA, qkv), 3, heads)
        trace = torch.full((1, heads, tokens, tokens), 55, dtype=torch.int8, device=CUDA)
        launch.attend(given, None, None, heads, operands, config, trace)
        q, k, _ = split_heads(qkv, 3, heads)
        scores = dequantize(q, params.query).double() @ dequantize(k, params.key).double().transpose(-1, -2)
        first = scores[..., : config.block_k].amax(-1)
        assert ((scores.amax(-1) - first) * 72**-0.5 > 100).any()
        assert_equal_up_to_ties(
            traced(trace.cpu(), params.softmax).int(), (scores * 72**-0.5).softmax(-1), params.softmax
        )
