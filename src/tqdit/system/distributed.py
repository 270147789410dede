"""Run one job in several processes that torchrun started: who does what, and how results come together.

A process that torchrun did not start, or started alone, is a world of size 1, where everything here costs nothing.
torch is imported where it is needed: the command line asks this module before it knows whether there is work.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdit.errors import InputError

if TYPE_CHECKING:
    import torch

    from tqdit.system.parcels import Form, Named

Items = TypeVar("Items", bound=Sequence[Any])
# Shares differ by one batch: ranks of like speed wait minutes, or hours where a large model is calibrated on CPUs.
# torchrun ends a job whose process dies; this is for a machine that falls silent.
TIMEOUT = {"cpu": timedelta(hours=12), "cuda": timedelta(hours=2)}
THREADS = "TQDIT_THREADS"  # the variable that says how many threads of torch each of several processes has


@dataclass(frozen=True)
class World:
    """This process among `size`: its `rank`, and the `device` whose memory it works and exchanges tensors in."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Say whether this process speaks for all: it prints and writes the job's single output."""
        return self.rank == 0

    def share(self, items: Items) -> Items:
        """Return this rank's part of a sequence: every `size`-th item, so that no rank has two more than another."""
        return items[self.rank :: self.size]  # type: ignore[return-value]

    def owner(self, item: int) -> int:
        """Return the rank whose share of a sequence has the item number `item`."""
        return item % self.size

    def gather(self, parts: "Sequence[torch.Tensor]", count: int) -> "list[torch.Tensor]":
        """Return one tensor for each of `count` items, in their order, on every rank.

        `parts` are the tensors of this rank's share. The tensors may differ in shape and dtype. They travel by NCCL
        where the world's device is a GPU, one at a time, and end in the kind of memory they came from. Raises
        `ConnectionError` if another rank is gone.
        """
        assert len(parts) == len(self.share(range(count)))
        if self.size == 1:
            return list(parts)
        import torch
        from torch import distributed as dist

        forms: list[list[tuple[torch.Size, torch.dtype, str]]] = [[] for _ in range(self.size)]
        gathered = []
        with _together():
            dist.all_gather_object(forms, [(part.shape, part.dtype, part.device.type) for part in parts])
            for item in range(count):
                place, owner = divmod(item, self.size)
                shape, dtype, home = forms[owner][place]
                travelling = torch.empty(shape, dtype=dtype, device=self.device)
                if owner == self.rank:
                    travelling.copy_(parts[place])
                dist.broadcast(travelling, owner)
                gathered.append(travelling.cpu() if home == "cpu" else travelling)
        return gathered

    def gather_named(
        self, parts: "Iterable[Named]", count: int, reader: Callable[[str], int | None] = lambda _: None
    ) -> "list[Named]":
        """Return named CPU tensors for each of `count` items, in their order.

        `parts` are the tensors of this rank's share, on the CPU or on the world's device. `reader`: the rank that a
        tensor is for, by its name; None: every rank. An item comes without those for others. One part of each rank is
        taken and travels at a time, so `parts` may be made on the way; besides what is returned, memory holds one part
        and what is sent and received of it. From GPU to GPU nothing goes through the host. Raises `ConnectionError` if
        another rank is gone, `ValueError` if there are not as many parts as the share has items.
        """
        from tqdit.system.parcels import on_cpu

        if self.size == 1:
            return list(map(on_cpu, parts))
        gathered: list[Named] = []
        remaining = iter(parts)
        own = len(self.share(range(count)))
        for turn in range(-(-count // self.size)):
            gathered += self._exchange(self._parcels(remaining, turn, own, reader))
        if next(remaining, None) is not None:
            raise ValueError(f"rank {self.rank} has more parts than its share of {own}")
        return gathered[:count]

    def _parcels(
        self, parts: "Iterator[Named]", turn: int, own: int, reader: Callable[[str], int | None]
    ) -> "list[Named]":
        """Take the next part and sort its tensors by the rank that they are for."""
        part = next(parts, None) if turn < own else {}
        if part is None:
            raise ValueError(f"rank {self.rank} has {turn} parts, its share is {own}")
        return [{n: t for n, t in part.items() if reader(n) in (None, rank)} for rank in range(self.size)]

    def _exchange(self, parcels: "Sequence[Named]") -> "list[Named]":
        """Send parcels[r] to rank r; return what every rank has for this one, in the order of the ranks, on the CPU.

        A rank's parcel for itself is copied too, so that the copy does not keep what the parcel is a view of. What is
        on a GPU is packed and sent there; only what this rank will read is copied to the host, once.
        """
        import torch
        from torch import distributed as dist

        from tqdit.system.parcels import copied, form, home, length, on_host, pack, unpacked

        sent = [{} if rank == self.rank else parcel for rank, parcel in enumerate(parcels)]
        forms = [form(parcel) for parcel in sent]
        told: list[list[Form]] = [[] for _ in range(self.size)]
        with _together():
            dist.all_gather_object(told, forms)
        expected = [of_rank[self.rank] for of_rank in told]
        lengths, own_lengths = (list(map(length, each)) for each in (expected, forms))
        outgoing = torch.empty(sum(own_lengths), dtype=torch.uint8, device=home(*sent))
        for flat, parcel in zip(outgoing.split(own_lengths), sent, strict=True):
            pack(flat, parcel)
        incoming, outgoing = torch.empty(sum(lengths), dtype=torch.uint8, device=self.device), outgoing.to(self.device)
        with _together():
            dist.all_to_all_single(incoming, outgoing, lengths, own_lengths)
        del outgoing
        flats = (on_host(incoming) if incoming.is_cuda else incoming).split(lengths)
        received: list[Named] = [unpacked(*pair) for pair in zip(flats, expected, strict=True)]
        received[self.rank] = copied(parcels[self.rank])
        return received

    def wait(self) -> None:
        """Wait until every rank has come here. Raises `ConnectionError` if another rank is gone."""
        if self.size > 1:
            import torch

            self.add(torch.zeros(1))

    def add(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of every rank's `tensor`, on every rank.

        A sum of floats is rounded in a way that depends on the number of ranks. Raises `ConnectionError` if another
        rank is gone.
        """
        if self.size == 1:
            return tensor
        from torch import distributed as dist

        total = tensor.detach().to(self.device, copy=True)
        with _together():
            dist.all_reduce(total)
            return total.to(tensor.device)


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


def launched() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) that torchrun gave this process; (0, 1, 0) without torchrun.

    Raises `InputError` naming a variable of the environment that is missing, no number, or beyond what it counts.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0
    values = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise InputError(f"WORLD_SIZE asks for several processes, but {name} is '{text}'; start them with torchrun")
        values.append(int(text))
    rank, size, local_rank = values
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value >= size:
            raise InputError(f"{name} is {value}; with WORLD_SIZE {size} it must be below {size}")
    return rank, size, local_rank


def threads_of_each() -> int | None:
    """Return the threads of torch in each of several processes on this machine; None: as many as torch has.

    They are those that TQDIT_THREADS names, or this process's cores over the processes of the machine
    (LOCAL_WORLD_SIZE). torchrun sets OMP_NUM_THREADS to 1 where it is not set, so a 1 says nothing; any other number is
    the user's and stays. Raises `InputError` for a TQDIT_THREADS that is no number from 1 on.
    """
    from tqdit.system.environment import cores

    asked = os.environ.get(THREADS)
    if asked is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise InputError(f"{THREADS} is the number of threads of each process, from 1 on, got '{asked}'")
        return int(asked)
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores() // max(1, int(here) if here.isdecimal() else launched()[1]))


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


def check_alone(command: str) -> None:
    """Raise `InputError` if torchrun started several processes of a command that is the work of one."""
    if (size := launched()[1]) > 1:
        raise InputError(f"'{command}' runs in one process, torchrun started {size}; run it without torchrun")


def batches(count: int, size: int) -> list[range]:
    """Divide the numbers below `count` into runs of `size`; every world gets the same division."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def speaker() -> str:
    """Return 'rank 1 of 2: ', to put before a message of one of several processes; "" for a process alone."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "" if size == "1" else f"rank {os.environ.get('RANK', '?')} of {size}: "


def tells(message: str) -> bool:
    """Say whether this process is the first to have `message` for the user: ranks that fail alike speak once.

    torchrun's own store keeps the count; where there is none, or it does not answer, every process speaks.
    """
    if not speaker() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"tqdit/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def leave_reason(message: str) -> None:
    """Leave the last words of this process where torchrun looks for them; torchrun ends its own message with them.

    Without torchrun nothing is written.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": reason}), encoding="utf-8")


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
    with _together():
        dist.init_process_group(backend, timeout=TIMEOUT[world.device.partition(":")[0]])


@contextmanager
def _together() -> Iterator[None]:
    """Turn torch's error that another rank is gone into a `ConnectionError` of one line."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # errors of this process itself
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"another process of the job has ended or cannot be reached: {reason}") from error
