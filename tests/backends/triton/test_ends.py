"""The kernels around the blocks, against float64: on a GPU, or in Triton's interpreter where there is none.

Cases and bounds are those of `end_cases`.
"""

import functools
from typing import Any

import end_cases
import pytest
import torch
from end_cases import EPS, UNIT, assert_embedded, assert_unembedded, each_dtype, each_stream
from layouts import to, without_gpu
from operands import maker
from torch.nn import functional as F

from poisoned import PoisonedTorch

pytest.importorskip("triton")

from tqdit.backends.triton import conditioning, ends, tuning
from tqdit.backends.triton.backend import PackedTritonBackend, TritonBackend
from tqdit.backends.triton.layouts import Config
from tqdit.ops.ends import EndLayer, Lookup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
each_weight = pytest.mark.parametrize("kind", ["float", "no bias", "int8", "packed"])
infinite = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def poisoned_and_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ends, conditioning):
        monkeypatch.setattr(module, "torch", PoisonedTorch())
    if DEVICE.type == "cuda":
        monkeypatch.setattr(tuning, "choose", lambda key, device, candidates, run: candidates()[0])


def layer_of(kind: str, columns: int, depth: int) -> end_cases.Made:
    """A layer on the device; its weight and bias in float64."""
    backend = PackedTritonBackend() if kind == "packed" else TritonBackend()
    layer, weight, bias = end_cases.layer_of(backend.prepare_float_input, kind, columns, depth)
    return EndLayer(*(None if held is None else held.to(DEVICE) for held in layer)), weight, bias


embed_case = functools.partial(end_cases.embed_case, layer_of)
unembed_case = functools.partial(end_cases.unembed_case, layer_of)


# Latents to tokens --------------------------------------------------------------------------------------------------


def assert_embeds(x, layer, position, exact, size, side: int, stream: torch.dtype) -> torch.Tensor:
    depth = x.shape[1] * side**2
    found = TritonBackend().embed(to(DEVICE, x), layer, to(DEVICE, position), side, stream)
    return assert_embedded(found, depth, exact, size, stream)


@each_weight
@pytest.mark.parametrize(
    ("batch", "channels", "size", "side", "width"),
    [(2, 4, (3, 5), 2, 24), (1, 1, (1, 1), 1, 16), (17, 3, (2, 9), 2, 40), without_gpu(3, 4, (16, 16), 2, 1152)],
)
def test_latents_become_tokens(batch: int, channels: int, size: tuple[int, int], side: int, width: int, kind) -> None:
    """Rows and columns that fill no tile, one sample, more samples than programs of several take."""
    assert_embeds(*embed_case(batch, channels, size, side, width, kind, torch.float32), side, torch.float32)


@each_dtype
@each_stream
def test_latents_and_stream_of_any_dtype(dtype: torch.dtype, stream: torch.dtype) -> None:
    assert_embeds(*embed_case(2, 4, (3, 4), 2, 24, "float", dtype), 2, stream)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_patches_of_any_depth(kind: str) -> None:
    """Deeper than a tile: 4 channels of 4 x 4, and 3 of 3 x 3."""
    assert_embeds(*embed_case(2, 4, (2, 3), 4, 24, kind, torch.float32), 4, torch.float32)
    assert_embeds(*embed_case(2, 5, (2, 3), 3, 24, kind, torch.bfloat16), 3, torch.bfloat16)


def test_latents_with_any_strides() -> None:
    """One sample for all, channels last, a part of wider latents: read where they are."""
    x, layer, position, exact, size = embed_case(3, 4, (3, 5), 2, 24, "float", torch.float32)
    wide = F.pad(x, (1, 3, 2, 0))[..., 2:, 1:-3]
    for given in (x.to(memory_format=torch.channels_last), wide):
        assert not given.is_contiguous()
        assert_embeds(given, layer, position, exact, size, 2, torch.bfloat16)
    one = slice(0, 1)
    assert_embeds(x[one].expand(3, -1, -1, -1), layer, position, exact[one], size[one], 2, torch.float32)


@infinite
def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Nor on a sample that is not finite; each keeps what is not finite at its token."""
    x, layer, position, *_ = embed_case(33, 4, (2, 3), 2, 24, "float", torch.float32)
    position = to(DEVICE, position)
    x[5, 1, 2, 3], x[6, 0, 0, 0] = torch.nan, torch.inf
    together = TritonBackend().embed(to(DEVICE, x), layer, position, 2, torch.bfloat16)
    for i in (0, 5, 32):
        alone = TritonBackend().embed(to(DEVICE, x[i : i + 1]), layer, position, 2, torch.bfloat16)
        assert torch.equal(alone[0].nan_to_num(), together[i].nan_to_num())
    finite = together.isfinite().all(2)
    assert (~finite).nonzero().tolist() == [[5, 4], [6, 0]]


# Tokens to latents --------------------------------------------------------------------------------------------------


def assert_unembeds(x, modulation, layer, exact, bound, side: int, dtype: torch.dtype = torch.float32) -> None:
    like = torch.empty(len(x), 1, *exact.shape[2:], dtype=dtype, device=DEVICE)
    found = TritonBackend().unembed(to(DEVICE, x), to(DEVICE, modulation), EPS, layer, like, side)
    assert_unembedded(found, exact, bound, dtype)


@each_weight
@pytest.mark.parametrize(
    ("batch", "channels", "size", "side", "width"),
    [
        (2, 8, (3, 5), 2, 24), (1, 1, (1, 1), 1, 16), (3, 3, (2, 9), 2, 150), (1, 5, (2, 2), 4, 40),
        without_gpu(3, 8, (16, 16), 2, 1152), without_gpu(33, 8, (16, 16), 2, 1152),
    ],
)  # fmt: skip
def test_tokens_become_latents(batch: int, channels: int, size: tuple[int, int], side: int, width: int, kind) -> None:
    """Rows, columns and depth that fill no tile; several tiles of columns."""
    assert_unembeds(*unembed_case(batch, channels, size, side, width, kind, torch.float32), side)


@each_dtype
@each_stream
def test_a_stream_of_any_dtype(dtype: torch.dtype, stream: torch.dtype) -> None:
    assert_unembeds(*unembed_case(2, 8, (3, 4), 2, 72, "float", stream), 2, dtype)


@pytest.mark.parametrize("rows", [ends.FEW_ROWS, ends.SOME_ROWS], ids=str)
def test_tiles_of_many_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "FEW_ROWS", 0)
    monkeypatch.setattr(ends, "SOME_ROWS", 0 if rows == ends.SOME_ROWS else 8192)
    ends._unembed_config.cache_clear()
    assert_unembeds(*unembed_case(2, 8, (7, 10), 2, 72, "int8", torch.bfloat16), 2)
    ends._unembed_config.cache_clear()


@pytest.mark.parametrize(("mean", "spread"), [(1000.0, 1.0), (-30.0, 0.01), (0.0, 1e4)])
def test_the_variance_is_not_lost_beside_a_large_mean(mean: float, spread: float) -> None:
    """A sum of squares less a square would lose all digits of the first."""
    case = unembed_case(2, 2, (2, 3), 2, 300, "float", torch.float32, mean=mean, spread=spread)
    assert_unembeds(*case, 2)


@infinite
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_sample_that_is_not_finite_is_nan_as_a_whole(bad: float, kind: str) -> None:
    """In the stream or in the modulation; the other samples are as they were."""
    x, modulation, layer, exact, bound = unembed_case(5, 2, (4, 9), 2, 24, kind, torch.float32)
    x[1, 35, 7], modulation[3, 30] = bad, bad
    like = torch.empty(5, 1, 8, 18, device=DEVICE)
    found = TritonBackend().unembed(to(DEVICE, x), to(DEVICE, modulation), EPS, layer, like, 2)
    assert found is not None
    found = found.cpu()
    assert found[[1, 3]].isnan().all()
    rest = [0, 2, 4]
    assert ((found[rest].double() - exact[rest]).abs() <= bound[rest]).all()


def test_other_dtypes_are_left_to_torch() -> None:
    layer, *_ = layer_of("float", 16, 16)
    x = torch.zeros(1, 4, 2, 2, device=DEVICE, dtype=torch.float64)
    position, stream = torch.zeros(1, 16, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE)
    assert TritonBackend().embed(x, layer, position, 2, torch.float32) is None
    assert TritonBackend().unembed(stream, torch.zeros(1, 32, device=DEVICE), EPS, layer, x, 2) is None


# Layers of an embedder ----------------------------------------------------------------------------------------------


def embedder_case(rows: int, depth: int, columns: int, kind: str, index: torch.dtype) -> dict[str, Any]:
    make = maker(4)
    layer, weight, bias = layer_of(kind, columns, depth)
    table, classes = make.values(50, depth), make.values(11, columns)
    of_table = torch.arange(rows).mul(7).remainder(50).to(index)
    of_classes = torch.arange(rows).mul(3).remainder(11).to(index)
    x, added = table[of_table.long()].double(), classes[of_classes.long()].double()
    exact = x @ weight.t() + bias + added
    size = x.abs() @ weight.abs().t() + bias.abs() + added.abs()
    return {"layer": layer.codes, "table": table, "classes": classes, "of_table": of_table, "of_classes": of_classes,
            "exact": F.silu(exact), "bound": 1.1 * (depth + 4) * UNIT * size + 2.0**-20}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "index", "kind"),
    [
        (1, 40, 24, torch.int64, "int8"), (2, 300, 70, torch.int32, "int8"), (2, 130, 24, torch.int64, "packed"),
        (3, 64, 33, torch.uint8, "int8"), (40, 130, 24, torch.int64, "packed"), (40, 130, 24, torch.int32, "int8"),
    ],
)  # fmt: skip
def test_a_layer_with_lookups_and_silu(rows: int, depth: int, columns: int, index: torch.dtype, kind: str) -> None:
    """SiLU has a slope below 1.1, and takes an error of 2^-20 at most. Few rows and many, with tables and without."""
    case = embedder_case(rows, depth, columns, kind, index)
    table, classes = (case[name].to(DEVICE) for name in ("table", "classes"))
    of_table, of_classes = (case[name].to(DEVICE) for name in ("of_table", "of_classes"))
    run, added = TritonBackend(), Lookup(classes, of_classes)
    for given in (Lookup(table, of_table), table[of_table.long()]):
        found = run.activated(given, case["layer"], added)
        assert found is not None
        assert ((found.cpu().double() - case["exact"]).abs() <= case["bound"]).all()
    plain = run.activated(table[of_table.long()], case["layer"])
    zeros = run.activated(table[of_table.long()], case["layer"], Lookup(torch.zeros_like(classes), of_classes))
    assert torch.equal(plain, zeros)


@pytest.mark.parametrize("rows", [2, 5])
def test_one_timestep_for_all_samples(rows: int) -> None:
    """An index that is expanded, and one whose numbers are apart."""
    case = embedder_case(rows, 64, 24, "int8", torch.int64)
    table, t = case["table"].to(DEVICE), torch.tensor([3], device=DEVICE)
    expanded = TritonBackend().activated(Lookup(table, t.expand(rows)), case["layer"])
    apart = TritonBackend().activated(Lookup(table, torch.full((2 * rows,), 3, device=DEVICE)[::2]), case["layer"])
    whole = TritonBackend().activated(Lookup(table, t.repeat(rows)), case["layer"])
    assert torch.equal(expanded, whole)
    assert torch.equal(apart, whole)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("outside", [-1, 50, 2**40, -(2**40)])
def test_rows_that_a_table_does_not_have_are_nan(rows: int, outside: int) -> None:
    case = embedder_case(rows, 64, 24, "int8", torch.int64)
    table, classes = case["table"].to(DEVICE), case["classes"].to(DEVICE)
    of_table, of_classes = case["of_table"].to(DEVICE), case["of_classes"].to(DEVICE)
    expected = TritonBackend().activated(Lookup(table, of_table), case["layer"], Lookup(classes, of_classes))
    for index in (of_table, of_classes):
        before = int(index[1])
        index[1] = outside
        found = TritonBackend().activated(Lookup(table, of_table), case["layer"], Lookup(classes, of_classes))
        assert found[1].isnan().all()
        assert torch.equal(found[0], expected[0])
        index[1] = before


def test_a_configuration_changes_the_last_digits_alone() -> None:
    """Products with tensor cores, of either order of operands, and products without give the same within the bound."""
    case = embedder_case(2, 300, 70, "int8", torch.int64)
    table, of_table = case["table"].to(DEVICE), case["of_table"].to(DEVICE)
    given, added = Lookup(table, of_table), Lookup(case["classes"].to(DEVICE), case["of_classes"].to(DEVICE))
    for config in (Config(0, 8, 128), Config(16, 32, 64), Config(32, 32, 64)):
        out = torch.empty(2, 70, device=DEVICE)
        conditioning._launch(given, ends.weight_of(case["layer"]), added, out, config)
        assert ((out.cpu().double() - case["exact"]).abs() <= case["bound"]).all()
