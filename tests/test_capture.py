"""CUDA graphs of a denoiser. Without a GPU a graph is imitated: a replay computes from what is in the static inputs."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tqdit.system.capture import WARM_UP, CudaGraphed, recording


class Denoiser(nn.Module):
    """Another output for every input; the storage of the output is always the same, as that of a graph is."""

    config = SimpleNamespace(num_layers=1)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Size] = []
        self.outputs: dict[torch.Size, torch.Tensor] = {}

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor]:
        self.calls.append(x.shape)
        output = self.outputs.setdefault(x.shape, torch.empty_like(x))
        scale = timestep.to(x.dtype) + 1000 * class_labels.to(x.dtype)
        return (output.copy_(x * scale[:, None]),)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda without a device: `graph` keeps the static inputs that the captured call was given."""

    class Graph:
        replay: Callable[[], object]

    @contextmanager
    def graph(graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
        given: list = []
        forward = Denoiser.forward

        def spy(self: Denoiser, x: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor]:
            given.extend([self, (x, *named.values())])
            return forward(self, x, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Denoiser, "forward", spy)
            yield
        model, inputs = given

        def replay() -> None:
            forward(model, *inputs)
            model.calls.pop()

        graph.replay = replay

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream, "current_stream": lambda device=None: stream,
        "stream": lambda _: nullcontext(), "device": lambda _: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


def inputs(batch: int, t: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(batch, 3), "timestep": torch.full((batch,), t),
        "class_labels": torch.arange(batch),
    }  # fmt: skip


def expected(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return Denoiser()(*given.values())[0]


def test_every_call_gets_its_own_result(imitated) -> None:
    graphed = CudaGraphed(Denoiser())
    calls = [inputs(batch, t) for batch, t in ((4, 10), (4, 20), (2, 30), (4, 40), (2, 50))]
    outputs = [graphed(**given, return_dict=False)[0] for given in calls]
    for given, output in zip(calls, outputs, strict=True):
        assert torch.equal(output, expected(given)), "a later replay leaves it alone"


def test_one_capture_for_each_shape(imitated) -> None:
    model = Denoiser()
    graphed = CudaGraphed(model)
    for batch, t in ((4, 10), (2, 30), (4, 40), (2, 50), (4, 60)):
        graphed(**inputs(batch, t))
    assert [shape[0] for shape in model.calls] == [4] * (WARM_UP + 1) + [2] * (WARM_UP + 1)


def test_callers_inputs_are_theirs(imitated) -> None:
    graphed = CudaGraphed(Denoiser())
    first, second = inputs(4, 10), inputs(4, 20)
    before = first["hidden_states"].clone()
    graphed(**first)
    graphed(**second)
    assert torch.equal(first["hidden_states"], before)


class Told(nn.Module):
    """A denoiser whose arguments are nested, with a constant among them."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, size: dict) -> tuple[torch.Tensor]:
        scaled = x * timestep[:, None] + text
        return (scaled if size["width"] is None else scaled + size["width"],)


def test_nested_arguments_and_constants() -> None:
    """Without a device a graph is imitated by the call that it would record."""
    captured: list[int] = []

    class Recorded:
        def __init__(self, call, inputs, device) -> None:
            captured.append(len(inputs))
            self.call = call

        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.call(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqdit.system.capture.Captured", Recorded)
        graphed = CudaGraphed(Told())
        for width in (None, torch.full((2, 1), 5.0), None, torch.full((2, 1), 7.0)):
            given = {"timestep": torch.tensor([1, 2]), "text": torch.randn(2, 3), "size": {"width": width}}
            x = torch.randn(2, 3)
            assert torch.equal(graphed(x, **given, return_dict=False)[0], Told()(x, **given)[0])
    assert captured == [3, 4], "one for each structure; the number of its tensors"


@pytest.mark.parametrize("enabled", [True, False])
def test_no_cycle_is_collected_during_a_capture(imitated, enabled: bool) -> None:
    found = []

    def forward() -> None:
        found.append(gc.isenabled())
        raise RuntimeError("of the captured call")

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="of the captured call"), recording():
            forward()
        assert (found, gc.isenabled()) == ([False], enabled)
    finally:
        (gc.enable if before else gc.disable)()


def test_config_is_the_models(imitated) -> None:
    assert CudaGraphed(Denoiser()).config.num_layers == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    """Two models and two shapes in turn."""
    graphs = [CudaGraphed(Layer(seed)).cuda() for seed in range(2)]
    kept = []
    for batch, t in ((4, 10), (2, 30), (4, 40), (2, 50)):
        given = {name: x.cuda() for name, x in inputs(batch, t).items()}
        kept += [(graph.module(*given.values())[0], graph(**given)[0]) for graph in graphs]
    for eager, replayed in kept:
        assert torch.equal(eager, replayed)


class Layer(nn.Module):
    """Something with a product, hence a workspace."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(3, 3)

    @torch.inference_mode()
    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(x) * timestep[:, None] + class_labels[:, None],)
