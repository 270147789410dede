"""`QuantizedLinear` and `Source`: a layer that is called as a float one, whose weight nobody writes to in vain."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.layers.clock import Clock
from tqdit.layers.dequantized import Dequantized
from tqdit.layers.quantized import QuantizedLinear
from tqdit.layers.shared_input import Source
from tqdit.ops.schema import WeightParams
from tqdit.quality.metrics import sqnr_db
from tqdit.spec import Granularity, Grid, GridParams, Role, SiteSpec
from tqdit.timegroups import TimeGroups

WIDTH = 64
ALWAYS = TimeGroups((), 0.0, 1.0, closed=True)


def source(readers: int = 1, groups: TimeGroups = ALWAYS) -> Source:
    if groups.num_groups == 1:
        spec = SiteSpec("input", Role.INPUT, 8, Grid.ROW, Granularity.PER_TENSOR)
        return Source(GridParams(spec, torch.full((1, 1), 1 / 127)), Clock(groups), readers)
    spec = SiteSpec("input", Role.INPUT, 8, Grid.UNIFORM, Granularity.PER_TENSOR, groups.num_groups)
    scale = torch.arange(1, groups.num_groups + 1).float()[:, None] * 0.05
    return Source(GridParams(spec, scale, torch.full_like(scale, 128, dtype=torch.int32)), Clock(groups), readers)


def layer(read: Source | None, seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (48, WIDTH), dtype=torch.int8, generator=generator)
    weight = WeightParams(codes, torch.rand(48, generator=generator) * 0.01 + 0.01, 8)
    return QuantizedLinear(weight, torch.randn(48, generator=generator) if bias else None, read, "auto", dtype)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 5, WIDTH), (5, WIDTH), (WIDTH,), (2, 3, 4, WIDTH), (0, 5, WIDTH)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("float_input", [False, True])
def test_is_called_as_a_float_layer(shape: tuple[int, ...], dtype: torch.dtype, float_input: bool) -> None:
    made = layer(None if float_input else source(), dtype=dtype)
    x = normal(*shape).to(dtype)
    found = made(x)
    assert (found.shape, found.dtype) == ((*shape[:-1], 48), dtype)
    if x.numel():
        weight = made.weight.as_subclass(torch.Tensor).float()
        assert sqnr_db(nn.functional.linear(x.float(), weight, made.layer.bias), found.float()) > 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
@pytest.mark.parametrize("float_input", [False, True])
def test_numbers_that_it_does_not_take(dtype: torch.dtype, float_input: bool) -> None:
    with pytest.raises(InputError, match=r"of 64 inputs in float32, .* was given \(2, 64\) of torch\."):
        layer(None if float_input else source())(torch.ones(2, WIDTH, dtype=dtype))


def test_another_width() -> None:
    with pytest.raises(InputError, match=r"a layer of 64 inputs .* was given \(2, 63\)"):
        layer(source())(torch.ones(2, 63))


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(source())(normal(2, WIDTH)).dtype is torch.bfloat16


def _assigned(name: str) -> Callable[[Any], Any]:
    return lambda made: setattr(made, name, nn.Parameter(torch.zeros(48)))


def _data(made: Any) -> None:
    made.weight.data = torch.zeros(48, WIDTH)


def _item(made: Any) -> None:
    made.weight[0] = 1


def _added(made: Any) -> None:
    made.weight.data += 1


WRITES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda made: made.weight.copy_(torch.zeros(48, WIDTH)),
    "data.add_": lambda made: made.weight.data.add_(1),
    "a view": lambda made: made.weight.detach().view(-1)[:3].zero_(),
    "transposed": lambda made: made.weight.T.zero_(),
    "nn.init": lambda made: nn.init.zeros_(made.weight),
    "bias": lambda made: made.bias.add_(1),
    "weight =": _assigned("weight"),
    "bias =": _assigned("bias"),
    "data =": _data,
    "[0] =": _item,
    "+=": _added,
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_a_copy_is_refused(write: str) -> None:
    made = layer(source())
    expected = made(normal(2, WIDTH))
    with pytest.raises(InputError, match="would be lost: keep an adapter beside the layer"):
        WRITES[write](made)
    assert torch.equal(made(normal(2, WIDTH)), expected)


def test_reading_gives_plain_tensors() -> None:
    made = layer(source(), dtype=torch.bfloat16)
    weight = made.weight
    assert isinstance(weight, Dequantized)
    assert (weight.shape, weight.dtype, weight.requires_grad) == ((48, WIDTH), torch.bfloat16, False)
    for computed in (weight + 1, weight.clone(), weight.float(), weight.norm(), weight @ weight.T, torch.cat([weight])):
        assert type(computed) is torch.Tensor
    weight.clone().zero_()
    assert torch.equal(copy.copy(made).weight, weight)
    assert "in_features=64, out_features=48, bits=8, row" in repr(made)
    with pytest.raises(InputError, match="cannot be drawn anew"):
        made.reset_parameters()


class TestSharing:
    @pytest.fixture
    def made(self, monkeypatch) -> tuple[list[QuantizedLinear], list[int]]:
        """Three layers on one source, and the list of the times that the source made codes."""
        read, times = source(readers=3), []
        codes = read.codes
        monkeypatch.setattr(read, "codes", lambda *arguments: times.append(1) or codes(*arguments))
        return [layer(read, seed) for seed in range(3)], times

    def test_codes_of_one_tensor_are_made_once(self, made) -> None:
        layers, times = made
        for turn in (1, 2):
            x = normal(2, 5, WIDTH)
            for each in layers:
                each(x)
            assert len(times) == turn
            assert layers[0].source._held is None

    def test_after_a_write_they_are_made_anew(self, made) -> None:
        layers, times = made
        x = normal(2, 5, WIDTH)
        first = layers[0](x)
        x.mul_(2)
        assert not torch.equal(layers[0](x), first)
        assert len(times) == 2

    def test_they_are_freed_with_the_tensor(self, made) -> None:
        layers, _ = made
        x = normal(2, 5, WIDTH)
        layers[0](x)
        assert layers[0].source._held is not None
        del x
        gc.collect()
        assert layers[0].source._held is None

    def test_in_threads(self, made) -> None:
        """Threads take turns at every layer, with tensors of their own."""
        layers, _ = made
        inputs = [normal(2, 5, WIDTH, seed=seed) for seed in range(4)]
        expected = [[layer(source(), seed)(x) for seed in range(3)] for x in inputs]
        turns, wrong = threading.Barrier(4), []

        def work(index: int) -> None:
            for _ in range(20):
                for which, each in enumerate(layers):
                    turns.wait()
                    if not torch.equal(each(inputs[index]), expected[index][which]):
                        wrong.append(index)

        together(work, 4)
        assert not wrong


def together(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class TestTimeGroups:
    GROUPS = TimeGroups((10.0,), 0.0, 20.0)

    def test_each_sample_has_its_own(self) -> None:
        made, x = layer(source(groups=self.GROUPS)), normal(2, 5, WIDTH)
        clock = made.source.clock
        with clock.during(torch.tensor([3.0, 15.0])):
            mixed = made(x)
        for index, t in enumerate((3.0, 15.0)):
            with clock.during(t):
                assert torch.equal(made(x[index : index + 1]), mixed[index : index + 1])
        with clock.during(torch.tensor([[3.0, 15.0], [3.0, 3.0]])):  # a time for each token
            tokens = made(x)
        with clock.during(torch.tensor([15.0, 3.0])):
            assert torch.equal(made(x), tokens)

    def test_frames_of_a_sample_are_in_its_group(self) -> None:
        made, x = layer(source(groups=self.GROUPS)), normal(4, 5, WIDTH)
        with made.source.clock.during(torch.tensor([3.0, 15.0])):
            frames, whole = made(x), made(x.reshape(2, 10, WIDTH))
        assert torch.equal(frames.reshape(whole.shape), whole)

    @pytest.mark.parametrize("t", [-1.0, 20.0, float("nan")])
    def test_a_time_outside(self, t: float) -> None:
        with pytest.raises(InputError, match=r"timestep .* is outside \[0, 20\)"):
            source(groups=self.GROUPS).clock.set(t)

    def test_a_call_keeps_other_threads_out(self) -> None:
        made, x, wrong = layer(source(groups=self.GROUPS)), normal(1, 5, WIDTH), []
        clock = made.source.clock
        expected = []
        for t in (3.0, 15.0):
            with clock.during(t):
                expected.append(made(x))

        def work(index: int) -> None:
            for _ in range(50):
                with clock.during((3.0, 15.0)[index % 2]):
                    if not torch.equal(made(x), expected[index % 2]):
                        wrong.append(index)

        together(work, 4)
        assert not wrong

    def test_is_copied_without_its_call(self) -> None:
        clock = source(groups=self.GROUPS).clock
        clock.set(3.0)
        for twin in (copy.deepcopy(clock), pickle.loads(pickle.dumps(clock))):
            assert twin.call is None
            with twin.during(15.0):
                assert int(twin.call.group) == 1
