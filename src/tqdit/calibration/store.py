"""Keep finished pieces of a long run by name: in memory, or in a work folder from which a later run continues."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tqdit.errors import InputError, RepairWarning
from tqdit.system import distributed
from tqdit.system.files import write_bytes
from tqdit.system.parcels import on_cpu

SEAL = "tqdit.seal"  # the entry of a piece's file that has the piece's name and checksums
HASH_DIGITS = 16  # digits of a hash in the name of a `WorkFolder`
Reader = Callable[[str], int | None]  # name of a tensor -> the rank that will read it; None: every rank


class Tensors(Protocol):
    """The named tensors of one piece."""

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Return those tensors of `names` that the piece has; by default all that it has."""


class Store(Protocol):
    """A place where finished pieces are kept."""

    def once(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        """Return the piece `name`, made now unless a former run has finished it.

        `make` returns tensors on the CPU or on a GPU.
        """

    def together(self, mine: Iterator[Tensors], names: Sequence[str], reader: Reader) -> list[Tensors]:
        """Return all pieces `names`, of which each process makes its share, on the CPU.

        `mine` makes this process's pieces, one after the other. Each process may read the tensors that `reader` says
        are for it. Every process must call this.
        """


@dataclass(frozen=True)
class InMemory:
    """A piece that is kept in memory as long as this object."""

    tensors: Mapping[str, torch.Tensor]

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        return {n: self.tensors[n] for n in (self.tensors if names is None else names) if n in self.tensors}


@dataclass(frozen=True)
class OnDisk:
    """A piece in a safetensors file, read again at each use: only what is in use takes memory.

    The file has the `piece`'s name and the sha256 of every tensor: what is read is compared with them.
    """

    path: Path
    piece: str

    @classmethod
    def write(cls, path: Path, piece: str, tensors: Mapping[str, torch.Tensor]) -> "OnDisk":
        """Write the tensors as the file `path`, whole or not at all."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        digests = {name: _digest(tensor) for name, tensor in sorted(contiguous.items())}
        seal = json.dumps({"piece": piece, "sha256": digests})  # one entry, since several have no fixed order
        write_bytes(path, save(contiguous, metadata={SEAL: seal}))
        return cls(path, piece)

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Return copies, so that no mapping of the file outlives the call.

        Raises `InputError` naming a damaged file.
        """
        return dict(self._tensors(names))

    def check(self) -> None:
        """Read all of the file, a tensor at a time. Raises `InputError` as `read` does."""
        for _ in self._tensors(None):
            pass

    def _tensors(self, names: Iterable[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            with safe_open(self.path, framework="pt") as file:
                there = set(file.keys())
                seal = json.loads((file.metadata() or {}).get(SEAL, "{}"))
                digests = seal.get("sha256", {})
                if seal.get("piece") != self.piece or set(digests) != there:
                    raise ValueError(f"it does not hold the piece {self.piece}")
                for name in sorted(there) if names is None else [name for name in names if name in there]:
                    tensor = file.get_tensor(name).clone()
                    if _digest(tensor) != digests[name]:
                        raise ValueError(f"tensor '{name}' was changed")
                    yield name, tensor
        except (OSError, SafetensorError, ValueError, AttributeError, TypeError, KeyError, RuntimeError) as error:
            raise InputError(f"{self.path} is damaged: {error}; remove it, and it is made anew") from None


def _digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of dtype, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _all_of(piece: Tensors) -> dict[str, torch.Tensor]:
    return piece.read()


class Forgetful:
    """A store that keeps nothing for another run."""

    def once(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        """Make the piece; it stays on the device where it was made."""
        return InMemory(make())

    def together(self, mine: Iterator[Tensors], names: Sequence[str], reader: Reader) -> list[Tensors]:
        """Send each process its tensors as the pieces are made; nothing else is kept."""
        # `map` holds no piece while the next one is made, which a loop would.
        pieces = distributed.current().gather_named(map(_all_of, mine), len(names), reader)
        return [InMemory(piece) for piece in pieces]


@dataclass(frozen=True)
class WorkFolder:
    """A store in a folder, each piece a file that is written whole or not at all.

    The folder's name must say what the pieces depend on. Several processes must see the same folder, on a file system
    that their machines share.
    """

    folder: Path

    def once(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        """Return the piece, made now unless a former run has finished it and nothing has changed it since."""
        piece = self._piece(name)
        if piece.path.is_file():
            try:
                piece.check()
                return piece
            except InputError as error:
                warnings.warn(f"{str(error).partition('; remove')[0]}; it is made anew", RepairWarning, stacklevel=2)
        return OnDisk.write(piece.path, piece.piece, on_cpu(make()))

    def together(self, mine: Iterator[Tensors], names: Sequence[str], reader: Reader) -> list[Tensors]:
        """Return all pieces once every process has written its own.

        Raises `InputError` if this process does not see one of them in the folder.
        """
        for _ in mine:
            pass
        distributed.current().wait()
        pieces = [self._piece(name) for name in names]
        for piece in pieces:
            if not piece.path.is_file():
                raise InputError(
                    f"{piece.path} of another process is not there; resumable work needs a folder that all share"
                )
        return list(pieces)

    def _piece(self, name: str) -> OnDisk:
        return OnDisk(self.folder / f"{name}.safetensors", f"{self.folder.name}/{name}")


def discard(work: Path, stages: Iterable[str]) -> None:
    """Remove the `WorkFolder`s "<stage>-<hash>" inside `work`, and `work` too unless it holds something else.

    `work` may be a symbolic link to a folder: both stay.
    """
    for stage in stages:
        for folder in work.glob(f"{stage}-" + HASH_DIGITS * "[0-9a-f]"):
            shutil.rmtree(folder)
    if work.is_dir() and not work.is_symlink() and not any(work.iterdir()):
        work.rmdir()
