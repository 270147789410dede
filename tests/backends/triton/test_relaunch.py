"""A kernel that was launched once is launched again as it was compiled."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from tqdit.backends.triton import relaunch


class Kernel:
    """A kernel of Triton that notes its launches."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.again: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: self.asked.append((grid, arguments, options)) or self

    def run(self, *arguments) -> None:
        self.again.append(arguments)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(relaunch, "NATIVE", True)
    monkeypatch.setattr(relaunch, "_COMPILED", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    return relaunch._COMPILED


def test_the_second_launch_takes_addresses_and_asks_nothing(compiled) -> None:
    kernel, x, y = Kernel(), torch.zeros(4), torch.zeros(5)
    for tensor in (x, y):
        relaunch.launch(kernel, "key", (3, 2), (tensor, x), (7, None), num_warps=4)
    assert kernel.asked == [((3, 2), (x, x, 7, None), {"num_warps": 4})]
    assert kernel.again == [
        (3, 2, 1, "stream", "function", "metadata", None, None, None, y.data_ptr(), x.data_ptr(), 7, None)
    ]
    assert relaunch.known("key")
    relaunch.launch(kernel, "other", (1, 1), (x,), ())
    assert len(kernel.asked) == 2


def test_without_a_key_triton_is_asked_every_time(compiled) -> None:
    kernel, x = Kernel(), torch.zeros(4)
    for _ in range(2):
        relaunch.launch(kernel, None, (1, 1), (x,), ())
    assert (len(kernel.asked), kernel.again, compiled) == (2, [], {})


def test_profilers_see_launches(compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches the kernel itself where a profiler has a hook, so that the profiler is told."""
    kernel, x = Kernel(), torch.zeros(4)
    relaunch.launch(kernel, "key", (1, 1), (x,), ())
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(
        relaunch, "knobs", SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=hook, launch_exit_hook=None))
    )
    relaunch.launch(kernel, "key", (1, 1), (x,), ())
    assert (len(kernel.asked), kernel.again) == (2, [])


def test_tensors_that_start_at_odd_places_are_seen() -> None:
    x = torch.zeros(64)
    assert relaunch.aligned(x)
    assert not relaunch.aligned(x, x[1:])
