"""Run one job in several processes that torchrun started: join them, and divide the work.

A process that torchrun did not start, or started alone, is a world of size 1, where everything here costs nothing.
torch is imported where it is needed: the command line asks this module before it knows whether there is work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from tqdit.errors import InputError
from tqdit.system.torchrun import launched, threads_of_each
from tqdit.system.world import World, together

if TYPE_CHECKING:
    import torch

# Shares differ by one batch: ranks of like speed wait minutes, or hours where a large model is calibrated on CPUs.
# torchrun ends a job whose process dies; this is for a machine that falls silent.
TIMEOUT = {"cpu": timedelta(hours=12), "cuda": timedelta(hours=2)}
_current = World()


def current() -> World:
    """Return the world that `joined` has opened, else this process alone."""
    return _current


def chosen_device(device: "str | torch.device" = "auto") -> str:
    """Return the name of a device. "auto" means a GPU where torch finds one, else the CPU."""
    if device != "auto":
        return str(device)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def joined(device: "str | torch.device" = "auto") -> Iterator[World]:
    """Join the processes that torchrun started; until the block ends, `current` is their world.

    `device`: as in `chosen_device`. With several processes, device "cuda" is the GPU of this process's LOCAL_RANK;
    tensors on GPUs travel by NCCL, those on CPUs by gloo. torch takes as many threads as `threads_of_each` says. Every
    rank must leave the block: the end waits for none.
    Raises `InputError` for a device that processes would have to share, and as `launched` does.
    """
    global _current  # noqa: PLW0603 - torch's own process group is global, too
    rank, size, local_rank = launched()
    device = chosen_device(device)
    world = World(rank, size, _own_device(device, local_rank) if size > 1 else device)
    if size > 1:
        _start_group(world)
    _current = world
    try:
        with _own_threads(size):
            yield world
    finally:
        _current = World()
    if size > 1:  # not after an error: this would wait for ranks that do not know of it
        from torch import distributed as dist

        dist.destroy_process_group()


@contextmanager
def _own_threads(size: int) -> Iterator[None]:
    """Let torch take this process's share of the cores, where it is one of several."""
    wanted = threads_of_each() if size > 1 else None
    if wanted is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(count: int, size: int) -> list[range]:
    """Divide the numbers below `count` into runs of `size`; every world gets the same division."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _own_device(device: str, local_rank: int) -> str:
    """Return `device` for this process alone."""
    if device.startswith("cuda:"):
        raise InputError(f"device '{device}' is one GPU for several processes; give cuda, each takes its own")
    if device != "cuda":
        return device
    import torch

    if local_rank >= (found := torch.cuda.device_count()):
        raise InputError(f"device 'cuda': process {local_rank + 1} of this machine finds {found} GPUs; start fewer")
    return f"cuda:{local_rank}"


def _start_group(world: World) -> None:
    import torch
    from torch import distributed as dist

    backend = "gloo"
    if world.device.startswith("cuda"):
        torch.cuda.set_device(world.device)  # NCCL and Triton work on the current device
        backend = "cpu:gloo,cuda:nccl"
    with together():
        dist.init_process_group(backend, timeout=TIMEOUT[world.device.partition(":")[0]])
