"""A kernel that was launched once is launched again as it was compiled."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from tqdit.backends.triton import relaunch
from tqdit.backends.triton.relaunch import Plan


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
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(relaunch, "NATIVE", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    return Kernel()


def test_the_second_launch_takes_addresses_and_asks_nothing(kernel: Kernel) -> None:
    plan, x, y = Plan(kernel, (3, 2), (7, None), num_warps=4), torch.zeros(4), torch.zeros(5)
    assert not plan.launched
    for tensor in (x, y):
        plan.launch((tensor, x), ("blocks",))
    assert plan.launched
    assert kernel.asked == [((3, 2), (x, x, "blocks", 7, None), {"num_warps": 4})]
    assert kernel.again == [
        (3, 2, 1, "stream", "function", "metadata", None, None, None, y.data_ptr(), x.data_ptr(), "blocks", 7, None)
    ]


def test_a_plan_that_another_thread_has_just_compiled_is_whole(kernel: Kernel) -> None:
    """Another thread may launch as soon as the kernel is known; here it does while the plan takes the kernel over."""
    x = torch.zeros(4)

    class Slow(Kernel):
        @property
        def packed_metadata(self) -> str:
            if not self.again and len(self.asked) == 1:
                plan.launch((x,))
            return "metadata"

    slow = Slow()
    plan = Plan(slow, (1, 1), ())
    plan.launch((x,))
    plan.launch((x,))
    assert len(slow.asked) + len(slow.again) == 3
    assert plan.launched


def test_another_plan_asks_triton(kernel: Kernel) -> None:
    for rows in (7, 8):
        Plan(kernel, (1, 1), (rows,)).launch((torch.zeros(4),))
    assert (len(kernel.asked), kernel.again) == (2, [])


def test_tensors_of_any_place_go_through_triton_every_time(kernel: Kernel) -> None:
    plan = Plan(kernel, (1, 1), ())
    for _ in range(2):
        plan.launch_any((torch.zeros(4),))
    assert (len(kernel.asked), kernel.again, plan.launched) == (2, [], False)


def test_profilers_see_launches(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches the kernel itself where a profiler has a hook, so that the profiler is told."""
    plan, x = Plan(kernel, (1, 1), ()), torch.zeros(4)
    plan.launch((x,))
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(
        relaunch, "knobs", SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=hook, launch_exit_hook=None))
    )
    plan.launch((x,))
    assert (len(kernel.asked), kernel.again) == (2, [])
    assert kernel.asked[1][0] == (1, 1, 1)


def test_tensors_that_start_at_odd_places_are_seen() -> None:
    x = torch.zeros(64)
    assert relaunch.aligned(x)
    assert not relaunch.aligned(x, x[1:])
