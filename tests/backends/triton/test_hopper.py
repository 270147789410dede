"""The linear kernel for Hopper: where it runs, what it compiles to, and on a Hopper GPU its results."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from layouts import compiled_for_hopper, from_projected, padded, read, to
from operands import maker
from ties import assert_equal_up_to_ties

from poisoned import PoisonedTorch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tqdit.backends.triton import candidates, flat, hopper, launch, operators, tuning
from tqdit.backends.triton.backend import TritonBackend
from tqdit.backends.triton.layouts import HEADS_OF, Config
from tqdit.errors import InputError
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, Residual
from tqdit.spec import Grid

REFERENCE = Reference()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
TILE = Config(128, 128, 128, stages=4, piece=64, hopper=1)


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "processors", lambda device: 4)


def every_candidate() -> list[tuple[str, Config]]:
    """All of every epilogue, at one size with many rows and one with few."""
    return [
        (epilogue, config)
        for epilogue, columns in (
            ("residual", 1152),
            ("residual bfloat16", 1152),
            ("residual-ungated", 1152),
            ("heads", 3456),
            ("query-heads", 1152),
            ("gelu", 4608),
        )
        for config in dict.fromkeys(
            candidates.hopper_linear(epilogue, 16384, columns, 128)
            + candidates.hopper_linear(epilogue, 512, columns, 128)
        )
    ]


@pytest.mark.long
def test_every_candidate_compiles_without_spills(tmp_path: Path) -> None:
    """For sm_90a, with the compilers that Triton brings; no GPU is needed."""
    asked = [(epilogue, c.block_m, c.block_n, c.stages, c.piece) for epilogue, c in every_candidate()]
    asked += [
        ("plain", 128, 128, 6, 16),
        ("context-heads", 128, 128, 6, 64),
        ("gelu merged", 128, 128, 6, 64),
        ("gelu two", 128, 128, 6, 64),
    ]
    found = compiled_for_hopper("linear", asked, tmp_path)
    assert len(found) > 15
    for kernel in found:
        assert not kernel["spilled"], kernel
        assert not kernel["warnings"], kernel  # products one after another, say
        assert kernel["shared"] <= hopper.SHARED_MEMORY, kernel
        assert 0 < kernel["registers"]["multiplies"] <= 240, kernel
        assert 0 < kernel["registers"]["copies"] <= 24, kernel


def test_no_other_device_runs_it() -> None:
    assert hopper.processors(CPU) == 0
    assert hopper.rows_of_tile(CPU, 256, 8, False) == 0
    if torch.cuda.is_available():
        assert (hopper.processors(torch.device("cuda:0")) > 0) == HOPPER


@pytest.mark.parametrize(
    ("tokens", "bits", "two", "head_dim", "rows"),
    [
        (256, 8, False, 72, 128), (64, 8, False, 72, 64), (320, 8, False, 72, 64), (100, 8, False, 72, 0),
        (256, 6, False, 72, 0), (256, 8, True, 72, 0), (256, 8, False, 36, 0),
    ],
)  # fmt: skip
def test_what_it_takes(four_processors, tokens: int, bits: int, two: bool, head_dim: int, rows: int) -> None:
    """One product of 8-bit weights; tiles whose rows are of one sample; heads of whole groups of 8 columns."""
    assert hopper.rows_of_tile(CPU, tokens, bits, two, head_dim) == rows


def test_tiles_it_takes() -> None:
    assert hopper.supports_product(TILE, 128, 1152)
    assert not hopper.supports_product(TILE, 64, 1152)
    assert not hopper.supports_product(TILE, 0, 1152)
    assert not hopper.supports_product(TILE, 128, 64)
    assert hopper.supports_product(TILE._replace(block_n=64), 128, 64)
    for changed in ({"block_m": 32}, {"block_n": 256}, {"block_k": 64}, {"piece": 8}, {"piece": 48}, {"stages": 1}):
        assert not hopper.supports_product(TILE._replace(**changed), 128, 1152 * 2)


def test_candidates_are_whole_tiles_that_run(four_processors) -> None:
    assert all(hopper.supports_product(config, 128, 1152) and config.hopper for _, config in every_candidate())
    assert candidates.hopper_linear("heads", 16384, 3456, 0) == []
    assert candidates.hopper_linear("plain", 16384, 1152, 128)
    for parts, name in HEADS_OF.items():
        assert all(c.block_n == 64 for c in candidates.hopper_linear(name, 512, parts * 192, 128))
    few, small = (candidates.hopper_linear("gelu", rows, 4608, tile) for rows, tile in ((512, 128), (16384, 64)))
    assert {c.block_m for c in few} == {64, 128}
    assert {c.block_m for c in small} == {64}
    assert all(c.block_n == 64 for c in candidates.hopper_linear("heads", 512, 3 * 192, 128))
    assert candidates.hopper_linear("residual", 512, 96, 128) == []
    assert not any(config.hopper for two in (False, True) for config in candidates.linear(512, two, 8))


def test_it_is_tried_under_a_key_of_its_own(four_processors, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that configurations found without it, or for ragged tiles, are neither taken nor replaced."""
    asked = {}

    def choose(keys, device, candidates, run):
        return asked.setdefault(keys[0], candidates())[0]

    monkeypatch.setattr(tuning, "choose", choose)
    make = maker(0)
    layer = flat.weight(*weights(TritonBackend().prepare(make.weight(128, 64), None)))

    def config(tokens: int, grid: Grid = Grid.UNIFORM) -> Config:
        source = make.params(grid)
        return operators._linear_config("residual", make.codes(1, tokens, 64), layer, source, lambda config: None)

    assert config(128).hopper
    assert config(64).hopper
    assert not config(96).hopper
    assert not config(128, Grid.MRQ_GELU).hopper
    assert len(asked) == 4
    assert "linear residual 128x128x64, 8 bits, 1 products" in asked  # of 96 tokens, as in older files
    monkeypatch.setattr(hopper, "processors", lambda device: 0)
    asked.clear()
    assert not config(128).hopper
    assert list(asked) == ["linear residual 128x128x64, 8 bits, 1 products"]


def weights(layer) -> tuple[list[torch.Tensor], list[int]]:
    return [layer.codes, layer.scale, layer.bias, layer.sums], [layer.shape[1], layer.bits]


def test_asking_for_it_where_it_cannot_run_is_an_error() -> None:
    make = maker(1)
    layer = flat.weight(*weights(TritonBackend().prepare(make.weight(128, 128), None)))
    source = make.params()
    with pytest.raises(InputError, match="compute capability"):
        launch.plain(make.codes(1, 128, 128), source, layer, TILE)


class Recorded:
    """In the place of a kernel: binds its arguments."""

    def __init__(self, kernel):
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid):
        def call(*arguments, num_warps, enable_fp_fusion):
            self.grid, self.given = grid, self.signature.bind(*arguments).arguments

        return call


def test_what_the_kernel_is_given(four_processors, monkeypatch: pytest.MonkeyPatch) -> None:
    make, batch, tokens, width, heads = maker(2), 2, 128, 256, 4
    params = make.attention(heads, Grid.UNIFORM, batch)
    targets = params.projections
    layer = flat.weight(*weights(TritonBackend().prepare(make.weight(3 * width, 320), None)))
    kernel = Recorded(hopper.kernels().linear.hopper_linear_kernel)
    monkeypatch.setattr(hopper.kernels().linear, "hopper_linear_kernel", kernel)
    codes = make.codes(batch, tokens, 320)
    launch.project(codes, make.params(), layer, TILE, targets, heads)
    given = kernel.given
    assert kernel.grid == (4,)
    assert (given["M"], given["width"], given["K"], given["TOKENS"]) == (256, 256, 320, 128)
    assert given["a"].block_shape == given["b"].block_shape == [128, 128]
    assert given["b"].shape == [768, 320]
    assert given["TARGET_STRIDES"] == (8 * heads,) * 3
    assert (given["HEAD_DIM"], given["STAGES"], given["PIECE"]) == (64, 4, 64)
    assert (given["PARTS"], given["GATED"]) == (3, False)
    launch.project(codes, make.params(), layer, TILE._replace(piece=0), targets, heads)
    assert kernel.given["PIECE"] == 128
    key = make.attention(6, Grid.UNIFORM, batch).key
    launch.project(codes, make.params(), layer, TILE, (key, key), 6)
    assert (kernel.given["PARTS"], kernel.given["width"], kernel.given["HEAD_DIM"]) == (2, 384, 64)
    few = make.params()
    launch.activation(codes[:1], make.params(), layer, TILE, few)
    assert kernel.grid == (4,)
    assert kernel.given["width"] == 768
    x, gate = make.values(batch, tokens, 768), make.values(batch, 768)
    out = launch.residual(codes, make.params(), layer, TILE, Residual(x, gate))
    given = kernel.given
    assert (given["x"].base is x, given["out"].base is out) == (True, True)
    for blocks in (given["x"], given["out"]):
        assert (blocks.shape, blocks.strides, blocks.block_shape) == ([256, 768], [768, 1], [128, 32])
    assert (given["PIECE"], given["X_BLOCKS"]) == (32, 5)
    launch.residual(codes, make.params(), layer, TILE, Residual(x.bfloat16(), gate))
    assert kernel.given["x"].block_shape == kernel.given["out"].block_shape == [128, 64]
    assert (kernel.given["PIECE"], kernel.given["X_BLOCKS"]) == (64, 4)
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)  # copies cannot start there
    launch.residual(codes, make.params(), layer, TILE, Residual(odd))
    assert not kernel.given["GATED"]
    assert torch.equal(kernel.given["x"].base, x)


@pytest.mark.parametrize(
    ("size", "blocks"),
    [
        ((128, 128, 4, 32), 5), ((128, 128, 5, 32), 3), ((128, 128, 6, 32), 1), ((128, 128, 2, 32), 8),
        ((128, 64, 8, 32), 2), ((64, 128, 8, 32), 3), ((64, 64, 12, 32), 4), ((128, 128, 4, 64), 4),
        ((128, 64, 8, 64), 2), ((64, 64, 12, 64), 2),
    ],
)  # fmt: skip
def test_blocks_of_the_residual_stream(size: tuple[int, int, int, int], blocks: int) -> None:
    """What is left of shared memory, and not more than two tiles."""
    assert hopper.x_blocks(*size) == blocks


# On a GPU. batch, tokens, depth, width, heads, programs (0: one per multiprocessor): one tile; odd numbers of tiles in
# one program and in three; 1, 9 and 36 blocks of depth; depths that end within a block; more tiles than programs. From
# one block of the residual stream in shared memory, with six stages, to those of two tiles.
WIDE, DEEP, WHOLE = (1, 128, 1152, 384, 4, 1), (2, 256, 4608, 128, 1, 1), (2, 256, 1152, 1152, 16, 0)
SHAPES = [(1, 128, 128, 128, 2, 0), (1, 128, 100, 896, 8, 3), (3, 128, 448, 640, 8, 1), WIDE, DEEP, WHOLE]
FLAT = (3, 128, 128, 640, 8, 1)
SHORT, MANY = (2, 64, 320, 192, 2, 1), (5, 64, 1152, 1152, 16, 7)  # samples of 64 tokens
CASES = [(TILE, *shape) for shape in SHAPES]
CASES += [(TILE._replace(stages=2, piece=16, band=1), *shape) for shape in (WIDE, DEEP, WHOLE)]
CASES += [(TILE._replace(stages=5, piece=32), *shape) for shape in (FLAT, WIDE, DEEP, WHOLE)]
CASES += [(TILE._replace(stages=6, piece=16), *shape) for shape in (FLAT, DEEP)]
CASES += [(Config(128, 64, 128, stages=8, piece=32, hopper=1), *shape) for shape in (WIDE, DEEP)]
CASES += [(Config(64, 128, 128, stages=8, piece=32, hopper=1), *shape) for shape in (WIDE, MANY)]
CASES += [(Config(64, 64, 128, stages=12, hopper=1), *shape) for shape in (SHORT, MANY, WHOLE)]
ORDINARY = Config(64, 64, 128, 8, 4, 3, 32)
NAMES = ("config", "batch", "tokens", "depth", "width", "heads", "programs")
each_case = pytest.mark.parametrize(
    NAMES, CASES, ids=["x".join(map(str, (*c[:2], c.stages))) + "-" + "-".join(map(str, shape)) for c, *shape in CASES]
)


def one_of_each_config(cases: list[tuple]) -> list[tuple]:
    """The last case of every configuration: other forms of an epilogue are compiled for these alone."""
    return list({case[0]: case for case in cases}.values())


def with_forms(cases: list[tuple], first: object, others: Sequence[object], some: list[tuple]) -> list[tuple]:
    """Every case in the first form, and `some` in each of the others."""
    return [(*case, first) for case in cases] + [(*case, form) for form in others for case in some]


class Runs:
    """Calls of the backend with a given configuration, outputs poisoned, and the whole three times: races show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
        self.patch, self.backend = monkeypatch, TritonBackend()
        monkeypatch.setattr(launch, "torch", PoisonedTorch())
        if programs:
            monkeypatch.setattr(hopper, "processors", lambda device: programs)

    def __call__(self, config: Config, call):
        self.patch.setattr(tuning, "choose", lambda key, device, candidates, run: config)
        first, *others = [call(self.backend) for _ in range(3)]
        assert all(torch.equal(first, other) for other in others)
        return first


UNIFORM, MERGED, TWO = (Grid.UNIFORM, 8, False), (Grid.MRQ_GELU, 6, True), (Grid.MRQ_GELU, 8, False)


class TestOnHopper:
    pytestmark = gpu

    @pytest.mark.parametrize((*NAMES, "parts"), with_forms(CASES, 3, (2, 1), one_of_each_config(CASES)))
    def test_heads(self, monkeypatch, config, batch, tokens, depth, width, heads, programs, parts: int) -> None:
        make = maker(1)
        codes, source = make.codes(batch, tokens, depth), make.params(lead=batch)
        weight, bias = make.weight(parts * width, depth), make.values(parts * width)
        params = make.attention(heads, Grid.UNIFORM, batch)
        targets = params.projections[1:] if parts == 2 else params.projections[:parts]
        expected = REFERENCE.project(codes, source, REFERENCE.prepare(weight, bias), targets, heads)
        given = to(CUDA, padded(codes)), to(CUDA, source), TritonBackend().prepare(weight, bias).to(CUDA)
        run, there = Runs(monkeypatch, programs), [to(CUDA, target) for target in targets]
        buffer = run(config, lambda backend: backend.project(*given, there, heads).codes)
        found = run.backend.project(*given, there, heads)._replace(codes=buffer)
        assert torch.equal(from_projected(found, parts, heads), expected.int())

    @each_case
    def test_residual_and_plain(self, monkeypatch, config, batch, tokens, depth, width, heads, programs) -> None:
        make = maker(2)
        codes, source = make.codes(batch, tokens, depth), make.params(lead=batch)
        weight, bias = make.weight(width, depth), make.values(width)
        x, gate = make.values(batch, tokens, width), make.values(batch, 6 * width).chunk(6, dim=1)[2]
        layer = TritonBackend().prepare(weight, bias).to(CUDA)
        given = to(CUDA, padded(codes)), to(CUDA, source), layer
        run = Runs(monkeypatch, programs)
        for stream in (x, x.bfloat16()):
            for then in (Residual(stream, gate), Residual(stream)):
                expected = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias), then)
                out = run(config, lambda backend, then=then: backend.linear(*given, to(CUDA, then)))
                assert torch.equal(out.cpu(), expected)
        out = run(config, lambda backend: backend.linear(*given))
        assert torch.equal(out.cpu(), REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias)))

    @pytest.mark.parametrize(
        (*NAMES, "target_of"), with_forms(CASES, UNIFORM, (MERGED, TWO), one_of_each_config(CASES))
    )
    def test_gelu(
        self, monkeypatch, config, batch, tokens, depth, width, heads, programs, target_of: tuple[Grid, int, bool]
    ) -> None:
        grid, bits, merged = target_of
        eight, make = maker(3), maker(4, bits)
        codes, source = eight.codes(batch, tokens, depth), eight.params(lead=batch)
        target = make.params(grid, batch, merged=merged)
        weight, bias = eight.weight(width, depth), eight.values(width)
        given = to(CUDA, padded(codes)), to(CUDA, source), TritonBackend().prepare(weight, bias).to(CUDA)
        run = Runs(monkeypatch, programs)
        found = run(config, lambda backend: backend.linear(*given, Activation(to(CUDA, target))))
        hidden = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias)).double()
        value = torch.nn.functional.gelu(hidden, approximate="tanh")
        assert_equal_up_to_ties(read(found, width, target), value, target)
        ordinary = run(ORDINARY, lambda backend: backend.linear(*given, Activation(to(CUDA, target))))
        assert torch.equal(found, ordinary)


@pytest.mark.parametrize("tokens", [96, 200])
def test_a_tile_of_two_samples_is_the_other_kernels(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    make, batch = maker(5), 4
    codes, source, weight = make.codes(batch, tokens, 128), make.params(lead=batch), make.weight(128, 128)
    x, gate = make.values(batch, tokens, 128), make.values(batch, 128)
    chosen = []

    def choose(key, device, candidates, run):
        chosen.append(candidates()[0] if HOPPER else ORDINARY)
        return chosen[0]

    monkeypatch.setattr(tuning, "choose", choose)
    device = CUDA if torch.cuda.is_available() else CPU
    layer = TritonBackend().prepare(weight, None).to(device)
    then = Residual(x, gate)
    out = TritonBackend().linear(to(device, padded(codes)), to(device, source), layer, to(device, then))
    assert not chosen[0].hopper
    assert torch.equal(out.cpu(), REFERENCE.linear(codes, source, REFERENCE.prepare(weight, None), then))
