"""Finished pieces of a long run, by name: in memory, or in a work folder from which a later run continues."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tqdit import distributed
from tqdit.errors import InputError
from tqdit.files import write_bytes

HASH_DIGITS = 16  # of the name of a `WorkFolder`
Reader = Callable[[str], int | None]  # name of a tensor -> the rank that will read it; None: every rank


class Tensors(Protocol):
    """Named tensors of one piece."""

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Those of `names` that there are; all by default."""


class Store(Protocol):
    """Where pieces are kept."""

    def once(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        """The piece `name`, made now unless a former run has finished it. `make` gives CPU tensors."""

    def together(self, mine: Iterator[Tensors], names: Sequence[str], reader: Reader) -> list[Tensors]:
        """All pieces `names`, of which each process makes its share: `mine`, here, one after the other.

        Each process may read the tensors that `reader` says are for it. Every process must call this.
        """


@dataclass(frozen=True)
class InMemory:
    """A piece that lives as long as whoever holds it."""

    tensors: Mapping[str, torch.Tensor]

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        return {n: self.tensors[n] for n in (self.tensors if names is None else names) if n in self.tensors}


@dataclass(frozen=True)
class OnDisk:
    """A piece in a safetensors file, read again at each use: only what is in use takes memory."""

    path: Path

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Copies, so that no mapping of the file outlives the call. Raises `InputError` naming a damaged file."""
        try:
            with safe_open(self.path, framework="pt") as file:
                there = set(file.keys())
                return {
                    n: file.get_tensor(n).clone() for n in (sorted(there) if names is None else names) if n in there
                }
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} is damaged: {error}; remove the folder to start anew") from None


class Forgetful:
    """Keeps nothing for another run."""

    def once(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        return InMemory(make())

    def together(self, mine: Iterator[Tensors], names: Sequence[str], reader: Reader) -> list[Tensors]:
        """What is for this process is sent to it as the pieces are made, and nothing else is kept."""
        pieces = distributed.current().gather_named((piece.read() for piece in mine), len(names), reader)
        return [InMemory(piece) for piece in pieces]


@dataclass(frozen=True)
class WorkFolder:
    """Pieces as files of a folder, each written whole or not at all. The folder's name must say what they depend on.

    Several processes must see the same folder, on a file system that their machines share.
    """

    folder: Path

    def once(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        path = self._path(name)
        if not path.is_file():
            write_bytes(path, save({key: tensor.contiguous() for key, tensor in make().items()}))
        return OnDisk(path)

    def together(self, mine: Iterator[Tensors], names: Sequence[str], reader: Reader) -> list[Tensors]:
        """Whoever reads a piece finds it in the folder. Raises `InputError` if this process does not."""
        for _ in mine:
            pass
        distributed.current().wait()
        paths = [self._path(name) for name in names]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path} of another process is not there; --resumable needs a folder that all share")
        return [OnDisk(path) for path in paths]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def discard(work: Path, stages: Iterable[str]) -> None:
    """Remove the `WorkFolder`s "<stage>-<hash>" inside `work`, and it too unless it holds something else."""
    for stage in stages:
        for folder in work.glob(f"{stage}-" + HASH_DIGITS * "[0-9a-f]"):
            shutil.rmtree(folder)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()
