"""Locks that end with their process: a killed process leaves no lock that a later one would have to break."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tqdit.errors import InputError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # a file system without locks
UNKNOWN = -1  # stands for the number of a process that has not written it


class BusyError(InputError):
    """Another process, or another thread of this one, has the lock; `pid` is the process, or `UNKNOWN`."""

    def __init__(self, what: Path, pid: int = UNKNOWN) -> None:
        self.pid = pid
        who = "this process" if pid == os.getpid() else f"another process (pid {pid})"
        super().__init__(f"{who if pid != UNKNOWN else 'another process'} is writing {what}; wait until it has ended")


def locked(file: IO[bytes]) -> bool | None:
    """Take the lock of an open file.

    Return False if another process has it, None where the file system has no locks. Closing the file gives the lock
    back, and so does the end of the process, however it ends.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def is_at(file: IO[bytes], path: Path) -> bool:
    """Say whether an open file still has this path: another process may have renamed or removed it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    own = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


@contextmanager
def holding(path: Path, what: Path) -> Iterator[bool]:
    """Hold a lock file while the block runs, and remove it afterwards. `what` is written under its protection.

    Yields whether the lock is really held: it is False where the file system has no locks. Raises `BusyError` if
    another process holds the lock.
    """
    file = _held(path, what)
    try:
        yield file is not None
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()  # while the lock is held: another process that has opened the file sees that it is gone
            file.close()


def _held(path: Path, what: Path) -> IO[bytes] | None:
    while True:
        file = open(path, "a+b", opener=_opened)  # noqa: SIM115 - a closed file holds no lock
        try:
            taken = locked(file)
            if taken is False:
                raise BusyError(what, _pid(file))
            if taken is None:
                path.unlink(missing_ok=True)
                file.close()
                return None
            if is_at(file, path):  # else the last holder of the lock has removed the file
                file.truncate(0)
                file.write(str(os.getpid()).encode())
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _opened(path: str, flags: int) -> int:
    """Open a lock file so that others who may write in the folder may lock the same file."""
    handle = os.open(path, flags | os.O_NOFOLLOW, 0o666)
    with suppress(PermissionError):
        os.fchmod(handle, 0o666)
    return handle


def _pid(file: IO[bytes]) -> int:
    file.seek(0)
    text = file.read(20)
    return int(text) if text.isdigit() else UNKNOWN
