"""Files that a job of one or several processes writes: kept from other jobs, seen by all processes of the job."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch

from tqdit.errors import InputError
from tqdit.system import distributed, outputs
from tqdit.system.locks import BusyError, holding
from tqdit.system.swap import Place, beside


def work_folder(out: Path) -> Path:
    """Return the folder of the finished work of an artifact `out`.

    Raises `InputError` if that path cannot be a folder.
    """
    work = work_of(out)
    if work.exists() and not work.is_dir():
        raise InputError(f"{work} is a file; finished work goes into a folder of this name")
    if work.is_symlink() and not work.exists():
        raise InputError(f"{work} is a symbolic link to nothing; finished work goes into a folder of this name")
    outputs.check_parent(work / "piece")
    return work


def work_of(out: Path) -> Path:
    """Return the path of the folder that may keep the finished work of an artifact `out`."""
    return out.absolute().with_name(f"{out.absolute().name}.work")


@contextlib.contextmanager
def reserved(out: Path) -> Iterator[Place | None]:
    """Keep other jobs from writing `out` and its work.

    Of several processes the first one does so, and yields the place. Raises `InputError`, in every process, if another
    job is writing one of them.
    """
    world, paths = distributed.current(), (out, work_of(out))
    holders, place = torch.zeros(len(paths), dtype=torch.int64), None
    with contextlib.ExitStack() as stack:
        if world.first:
            try:
                place = stack.enter_context(outputs.reserved(out))
            except BusyError as error:
                holders[0] = error.pid
            work = paths[1].resolve()
            if place and work.parent.is_dir():  # `work` may be a link to a folder of another output, too
                try:
                    stack.enter_context(holding(beside(work, "lock"), paths[1]))
                except BusyError as error:
                    holders[1] = error.pid
        for path, pid in zip(paths, world.add(holders).tolist(), strict=True):
            if pid:
                raise BusyError(path, pid)
        yield place


def check_shared(work: Path) -> None:
    """Raise `InputError` if several processes do not see the same folder `work`."""
    world = distributed.current()
    if world.size == 1:
        return
    work.mkdir(parents=True, exist_ok=True)
    token = int(world.add(torch.tensor(secrets.randbits(60) if world.first else 0)))
    mark = work / f"{token:x}.seen"
    if world.first:
        mark.touch()
    world.wait()
    seen = mark.exists()
    world.wait()
    if world.first:
        mark.unlink()
    if not seen:
        with contextlib.suppress(OSError):
            work.rmdir()  # this process has made it just now, on another disk
        raise InputError(f"resumable: {work} is not on a file system that all processes share; leave it out")
