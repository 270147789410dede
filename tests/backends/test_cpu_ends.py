"""The compiled kernels around the blocks, in every way the CPU runs, against float64.

Cases and bounds are those of `end_cases`.
"""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from end_cases import (
    DTYPES,
    EPS,
    assert_embedded,
    assert_unembedded,
    each_dtype,
    each_stream,
    embed_case,
    layer_of,
    unembed_case,
)
from operands import maker
from together import together
from torch import nn
from torch.nn import functional as F
from ways import backend_that, forget

from poisoned import PoisonedTorch
from tqdit.backends import cpu_ends
from tqdit.backends.cpu import NativeCpu
from tqdit.errors import InputError
from tqdit.ops.composed import Composed
from tqdit.ops.ends import EndLayer

BOTH = ["float", "int8"]
each_kind = pytest.mark.parametrize("kind", BOTH)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is rubbish, so that an item that a kernel does not write shows."""
    monkeypatch.setattr(cpu_ends, "torch", PoisonedTorch())


@pytest.fixture(params=["native", "generic"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Composed]:
    """The kernels for this processor, and for the oldest."""
    yield backend_that(request.param, monkeypatch)
    monkeypatch.undo()
    forget()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def latents_of(backend: Composed, *sizes, kind: str = "float", dtype: torch.dtype = torch.float32):
    return embed_case(functools.partial(layer_of, backend.prepare_float_input), *sizes, kind, dtype)


def stream_of(backend: Composed, *sizes, kind: str = "float", dtype: torch.dtype = torch.float32, **drawn):
    return unembed_case(functools.partial(layer_of, backend.prepare_float_input), *sizes, kind, dtype, **drawn)


def like(exact: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Latents of one channel, whose size and dtype a result shall have."""
    return torch.empty(len(exact), 1, *exact.shape[2:], dtype=dtype)


def assert_embeds(backend: Composed, x, layer, position, exact, size, side: int, dtype: torch.dtype) -> torch.Tensor:
    found = backend.embed(x, layer, position, side, dtype)
    return assert_embedded(found, x.shape[1] * side**2, exact, size, dtype)


def assert_unembeds(backend: Composed, x, modulation, layer, exact, bound, side: int, dtype=torch.float32) -> None:
    assert_unembedded(backend.unembed(x, modulation, EPS, layer, like(exact, dtype), side), exact, bound, dtype)


# Latents to tokens --------------------------------------------------------------------------------------------------


# batch, channels, rows and columns of patches, side, width: tasks of tokens and vectors of columns that are not full
SIZES = [
    (2, 4, (3, 5), 2, 40), (1, 1, (1, 1), 1, 1), (3, 3, (1, 9), 1, 7), (2, 5, (2, 2), 4, 33), (1, 2, (2, 3), 8, 24),
    (2, 5, (2, 3), 3, 24), (1, 4, (4, 4), 2, 1152),
]  # fmt: skip
KINDS = "float", "no bias", "int8", "packed"


@together(("sizes", "kind"), [(sizes, kind) for sizes in SIZES for kind in KINDS])
def test_latents_become_tokens(run, sizes, kind: str) -> None:
    case = latents_of(run, *sizes, kind=kind)
    if isinstance(run, NativeCpu):
        assert_embeds(run, *case, sizes[3], torch.float32)
    else:
        assert run.embed(*case[:3], sizes[3], torch.float32) is None


@each_dtype
@each_stream
@each_kind
def test_latents_and_stream_of_any_dtype(fast, dtype: torch.dtype, stream: torch.dtype, kind: str) -> None:
    assert_embeds(fast, *latents_of(fast, 2, 4, (3, 5), 2, 40, kind=kind, dtype=dtype), 2, stream)


def test_a_weight_that_several_threads_turn(fast) -> None:
    assert_embeds(fast, *latents_of(fast, 1, 4, (3, 3), 8, 200), 8, torch.float32)


def test_latents_with_any_strides(fast) -> None:
    """One sample for all, channels last, a part of wider latents: read where they are."""
    x, layer, position, exact, size = latents_of(fast, 3, 4, (3, 5), 2, 24)
    wide = F.pad(x, (1, 3, 2, 0))[..., 2:, 1:-3]
    for given in (x.to(memory_format=torch.channels_last), wide):
        assert not given.is_contiguous()
        assert_embeds(fast, given, layer, position, exact, size, 2, torch.bfloat16)
    one = slice(0, 1)
    assert_embeds(fast, x[one].expand(3, -1, -1, -1), layer, position, exact[one], size[one], 2, torch.float32)


@each_kind
def test_a_sample_does_not_depend_on_its_batch_or_on_threads(fast, threads, kind: str) -> None:
    """Nor on a sample that is not finite; each keeps what is not finite at its token."""
    x, layer, position, *_ = latents_of(fast, 9, 4, (3, 5), 2, 40, kind=kind)
    x[5, 1, 2, 3], x[6, 0, 0, 0] = torch.nan, torch.inf
    together = fast.embed(x, layer, position, 2, torch.float32)
    for i in (0, 4, 5, 8):
        alone = fast.embed(x[i : i + 1], layer, position, 2, torch.float32)
        assert torch.equal(alone[0].nan_to_num(), together[i].nan_to_num())
    assert (~together.isfinite().all(2)).nonzero().tolist() == [[5, 6], [6, 0]]
    threads(3)
    assert torch.equal(fast.embed(x, layer, position, 2, torch.float32).nan_to_num(), together.nan_to_num())


# Tokens to latents --------------------------------------------------------------------------------------------------


LAST = [
    (2, 8, (3, 5), 2, 40), (1, 1, (1, 1), 1, 1), (3, 3, (1, 9), 1, 150), (1, 5, (2, 2), 4, 33), (2, 1, (2, 3), 8, 24),
    (2, 5, (2, 3), 3, 24), (1, 8, (4, 4), 2, 1152),
]  # fmt: skip


@together(("sizes", "kind"), [(sizes, kind) for sizes in LAST for kind in KINDS])
def test_tokens_become_latents(run, sizes, kind: str) -> None:
    x, modulation, layer, exact, bound = stream_of(run, *sizes, kind=kind)
    if isinstance(run, NativeCpu):
        assert_unembeds(run, x, modulation, layer, exact, bound, sizes[3])
    else:
        assert run.unembed(x, modulation, EPS, layer, like(exact), sizes[3]) is None


@each_dtype
@each_stream
@each_kind
def test_a_stream_of_any_dtype(fast, dtype: torch.dtype, stream: torch.dtype, kind: str) -> None:
    assert_unembeds(fast, *stream_of(fast, 2, 8, (3, 4), 2, 72, kind=kind, dtype=stream), 2, dtype)


@pytest.mark.parametrize(("mean", "spread"), [(1000.0, 1.0), (-30.0, 0.01), (0.0, 1e4)])
def test_the_variance_is_not_lost_beside_a_large_mean(fast, mean: float, spread: float) -> None:
    """A sum of squares less a square would lose all digits of the first."""
    assert_unembeds(fast, *stream_of(fast, 2, 2, (2, 3), 2, 300, mean=mean, spread=spread), 2)


def test_rows_that_are_not_adjacent(fast) -> None:
    """A stream and a modulation that are parts of wider tensors, and columns of a modulation that are apart."""
    x, modulation, layer, exact, bound = stream_of(fast, 2, 8, (3, 4), 2, 40)
    for given in (F.pad(modulation, (0, 5))[:, :80], modulation.t().contiguous().t()):
        assert not given.is_contiguous()
        assert_unembeds(fast, F.pad(x, (3, 0))[..., 3:], given, layer, exact, bound, 2)


@each_kind
def test_latents_do_not_depend_on_their_batch_or_on_threads(fast, threads, kind: str) -> None:
    """Tasks of 8 tokens begin at other tokens of a sample if it is alone."""
    x, modulation, layer, exact, _ = stream_of(fast, 5, 2, (3, 5), 2, 40, kind=kind)
    together = fast.unembed(x, modulation, EPS, layer, like(exact), 2)
    for i in range(5):
        alone = fast.unembed(x[i : i + 1], modulation[i : i + 1], EPS, layer, like(exact[:1]), 2)
        assert torch.equal(alone[0], together[i])
    threads(3)
    assert torch.equal(fast.unembed(x, modulation, EPS, layer, like(exact), 2), together)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_kind
def test_a_sample_that_is_not_finite_is_nan_as_a_whole(kernels, bad: float, kind: str, dtype: torch.dtype) -> None:
    """In the stream or in the modulation; the other samples are as they were."""
    x, modulation, layer, exact, _ = stream_of(kernels, 5, 2, (3, 5), 2, 24, kind=kind)
    clean = kernels.unembed(x, modulation, EPS, layer, like(exact, dtype), 2)
    x[1, 14, 7], modulation[3, 30] = bad, bad
    found = kernels.unembed(x, modulation, EPS, layer, like(exact, dtype), 2)
    assert found[[1, 3]].isnan().all()
    rest = [0, 2, 4]
    assert torch.equal(found[rest], clean[rest])


def test_a_number_that_fp16_does_not_have_is_inf(fast) -> None:
    """It was finite, so its sample is not NaN."""
    layer = EndLayer(torch.full((4, 16), 2e4), torch.zeros(4))
    x = torch.linspace(-1, 3, 16).square().expand(1, 1, 16)
    found = fast.unembed(x, torch.ones(1, 32), EPS, layer, torch.empty(1, 1, 2, 2, dtype=torch.float16), 2)
    assert (found == torch.inf).all()


# What the kernels do not take ---------------------------------------------------------------------------------------


def test_other_dtypes_are_left_to_torch(fast) -> None:
    layer, position, modulation = EndLayer(torch.ones(16, 16)), torch.zeros(1, 16), torch.zeros(1, 32)
    x, stream = torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 16)
    assert fast.embed(x.double(), layer, position, 2, torch.float32) is None
    assert fast.embed(x, layer, position, 2, torch.float64) is None
    assert fast.unembed(stream.double(), modulation, EPS, layer, x, 2) is None
    assert fast.unembed(stream, modulation, EPS, layer, x.double(), 2) is None
    for changed in (EndLayer(torch.ones(16, 16).half()), EndLayer(torch.ones(16, 16), torch.ones(16).double())):
        assert fast.embed(x, changed, position, 2, torch.float32) is None
        assert fast.unembed(stream, modulation, EPS, changed, x, 2) is None


LATENTS, POSITION, STREAM, MODULATION = (2, 4, 4, 6), (6, 24), (2, 6, 16), (2, 32)  # of a layer (24, 16), side 2


@pytest.mark.parametrize(
    ("x", "position", "side", "message"),
    [
        ((4, 4, 6), POSITION, 2, "latents"), ((2, 4, 5, 6), POSITION, 2, "in patches of 2 x 2"),
        ((2, 4, 4, 5), POSITION, 2, "in patches"), (LATENTS, POSITION, 0, "in patches of 0 x 0"),
        (LATENTS, POSITION, -2, "whole number"), ((2, 3, 4, 6), POSITION, 2, "3 x 2 x 2 for a layer of depth 16"),
        (LATENTS, (1, 6, 24), 2, "positions"), (LATENTS, (7, 24), 2, "for 6 tokens of width 24"),
        (LATENTS, (6, 25), 2, "positions"), ((0, 4, 4, 6), POSITION, 2, "items in memory"),
    ],
)  # fmt: skip
def test_shapes_of_latents_are_checked(fast, x, position, side: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fast.embed(torch.ones(x), EndLayer(torch.ones(24, 16)), torch.ones(position), side, torch.float32)


@pytest.mark.parametrize(
    ("stream", "modulation", "columns", "x", "message"),
    [
        ((2, 5, 16), MODULATION, 24, LATENTS, "hidden states"), ((2, 6, 17), MODULATION, 24, LATENTS, "width 16"),
        ((1, 6, 16), MODULATION, 24, LATENTS, "for 2 x 6 tokens"), (STREAM, (2, 31), 24, LATENTS, "modulation"),
        (STREAM, (1, 32), 24, LATENTS, "for 2 samples of width 16"), (STREAM, MODULATION, 23, LATENTS, "23 columns"),
        (STREAM, MODULATION, 24, (2, 4, 4, 7), "in patches"), (STREAM, MODULATION, 0, LATENTS, "without weights"),
    ],
)  # fmt: skip
def test_shapes_of_a_stream_are_checked(fast, stream, modulation, columns: int, x, message: str) -> None:
    layer = EndLayer(torch.ones(columns, 16))
    with pytest.raises(InputError, match=message):
        fast.unembed(torch.ones(stream), torch.ones(modulation), EPS, layer, torch.ones(x), 2)


def test_what_lies_elsewhere_is_refused(fast) -> None:
    """Other dtypes of positions, modulation, codes; tensors of another device."""
    x, layer, stream = torch.ones(LATENTS), EndLayer(torch.ones(24, 16)), torch.ones(STREAM)
    codes: nn.Module = fast.prepare_float_input(maker(9).weight(24, 16), None)
    with pytest.raises(InputError, match=r"torch\.float32 on the CPU; a tensor is torch\.float64"):
        fast.embed(x, layer, torch.ones(POSITION).double(), 2, torch.float32)
    with pytest.raises(InputError, match=r"a tensor is torch\.float32 on meta"):
        fast.embed(x.to("meta"), layer, torch.ones(POSITION), 2, torch.float32)
    with pytest.raises(InputError, match="need 24 items"):
        fast.embed(x, EndLayer(torch.ones(24, 16), torch.ones(23)), torch.ones(POSITION), 2, torch.float32)
    with pytest.raises(InputError, match=r"a tensor is torch\.bfloat16"):
        fast.unembed(stream, torch.ones(MODULATION).bfloat16(), EPS, EndLayer(codes=codes), x, 2)
    assert all(fast.embed(x, EndLayer(codes=codes), torch.ones(POSITION), 2, d).dtype is d for d in DTYPES)
