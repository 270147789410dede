"""The processes of one job, and the tensors that they exchange.

In a world of one process everything here costs nothing. torch is imported where it is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    from tqdit.system.parcels import Form, Named

Items = TypeVar("Items", bound=Sequence[Any])


@dataclass(frozen=True)
class World:
    """A process of a job: its `rank` among `size`, and the `device` whose memory it works and exchanges tensors in."""

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
        with together():
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
        with together():
            dist.all_gather_object(told, forms)
        expected = [of_rank[self.rank] for of_rank in told]
        lengths, own_lengths = (list(map(length, each)) for each in (expected, forms))
        outgoing = torch.empty(sum(own_lengths), dtype=torch.uint8, device=home(*sent))
        for flat, parcel in zip(outgoing.split(own_lengths), sent, strict=True):
            pack(flat, parcel)
        incoming, outgoing = torch.empty(sum(lengths), dtype=torch.uint8, device=self.device), outgoing.to(self.device)
        with together():
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
        with together():
            dist.all_reduce(total)
            return total.to(tensor.device)


@contextmanager
def together() -> Iterator[None]:
    """Turn torch's error that another rank is gone into a `ConnectionError` of one line."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # errors of this process itself
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"another process of the job has ended or cannot be reached: {reason}") from error
