"""Fill files and folders beside their place and put them there whole; remove what killed processes left.

Beside `out` there may be `.out.tqdit.lock`, `.out.tqdit.partial` and, where a file system cannot exchange two folders,
`.out.tqdit.old`. Their names follow from that of `out`, so the next process that writes `out` finds them.
"""

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdit.errors import InputError, RepairWarning
from tqdit.system.locks import holding, is_at, locked

UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # the last two differ on macOS
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2  # Linux' constants
RANDOM_OLD = r"\.[a-z0-9_]{8}\.old"  # names used where there is no lock, and by earlier versions


@contextmanager
def partial_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open a new file beside `path`, to be filled and then renamed; it is removed if it was not renamed.

    Its name is that of `path`, unless another process is writing `path` now or the file system has no locks.
    """
    partial, file = _partial(path)
    try:
        with file:
            try:
                yield partial, file
            finally:
                if is_at(file, partial):
                    partial.unlink()
    except OSError as error:
        if error.errno:
            error.filename, error.filename2 = str(path), None  # the error may name the partial file, or no file
        raise


def _partial(path: Path) -> tuple[Path, IO[bytes]]:
    named = beside(path, "partial")
    try:
        handle = os.open(named, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ELOOP, errno.EISDIR):  # the file at this path is not ours
            raise
    else:
        file = os.fdopen(handle, "r+b")
        status = os.fstat(handle)
        if status.st_uid == os.geteuid() and status.st_nlink == 1:
            taken = locked(file)
            if taken and is_at(file, named):
                file.truncate(0)
                return named, file
            if taken is None:  # nobody writes a file of this name without locks: this process made it just now
                named.unlink(missing_ok=True)
        file.close()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    return Path(name), os.fdopen(handle, "r+b")


@dataclass(frozen=True)
class Place:
    """The path of a folder, without symbolic links, where this process alone may put something."""

    target: Path
    locked: bool  # False where the file system has no locks; then nothing that another process may have made is removed

    @contextmanager
    def filled(self, check: Callable[[], None]) -> Iterator[Path]:
        """Make a folder to fill. It takes the place of `target` if neither the block nor then `check` raises."""
        partial = self._free("partial")
        try:
            partial.mkdir(exist_ok=True)
            yield partial
            partial.chmod(0o755)
            sync_tree(partial)
            check()
            self._put(partial)
        except shutil.Error as error:  # an error of many files; the first is enough
            _, copy, reason = error.args[0][0]
            raise OSError(f"{copy} cannot be written: {reason}") from None
        finally:
            remove(partial)

    def repair(self, is_ours: Callable[[Path], bool]) -> None:
        """Put back what a killed process took away, and remove what that process left.

        `is_ours`: whether a folder is of the kind that is written to `target`; no other one is put there. Without
        locks nothing is done: a process that lives may be at work.
        """
        if not (self.locked and self.target.parent.is_dir()):
            return
        olds = [path for path in self._olds() if is_ours(path)]
        if olds and not os.path.lexists(self.target):
            olds[-1].rename(self.target)
            warnings.warn(
                f"{self.target} was missing, because a run that replaced it was killed; it is put back as it was",
                RepairWarning,
                stacklevel=2,
            )
        for leftover in (beside(self.target, "partial"), beside(self.target, "old")):
            remove(leftover)

    def _olds(self) -> list[Path]:
        pattern = re.compile(rf"\.{re.escape(self.target.name)}({RANDOM_OLD}|\.tqdit\.old)")
        found = [path for path in self.target.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
        return sorted((path for path in found if any(path.iterdir())), key=lambda path: path.stat().st_mtime_ns)

    def _free(self, kind: str) -> Path:
        """Return a path beside the target for a folder.

        The path has a random name where another process may use the known one.
        """
        path = beside(self.target, kind)
        if self.locked and not os.path.lexists(path):
            return path
        return Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=f".{kind}", dir=self.target.parent))

    def _put(self, partial: Path) -> None:
        try:
            if not os.path.lexists(self.target):
                rename_new(partial, self.target)
            elif not exchange(partial, self.target):
                self._put_in_two_steps(partial)
        except FileExistsError:
            raise InputError(f"output {self.target} was made by someone else meanwhile; it is kept") from None
        sync(self.target.parent)

    def _put_in_two_steps(self, partial: Path) -> None:
        """Put a folder in place by two renames.

        A process killed between them leaves no target; `repair` puts the old one back.
        """
        old = self._free("old")
        try:
            self.target.rename(old)  # an empty folder may be at `old`
            rename_new(partial, self.target)
        except BaseException:
            if not os.path.lexists(self.target):
                old.rename(self.target)
            raise
        remove(old)


@contextmanager
def reserved(target: Path, is_ours: Callable[[Path], bool]) -> Iterator[Place]:
    """Lock a path for this process, and repair what killed ones left there. Missing parents are made.

    `is_ours`: as in `Place.repair`. Raises `locks.BusyError` if another process has it. Parents that stay empty are
    removed again.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with holding(beside(target, "lock"), target) as lock:
            place = Place(target, lock)
            place.repair(is_ours)
            yield place
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def beside(path: Path, kind: str) -> Path:
    """Return the hidden path next to `path` for what is written, kept or locked on its behalf."""
    return path.with_name(f".{path.name}.tqdit.{kind}")


def exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step, so that there is no moment without either.

    Return False if that is not possible here.
    """
    return _renameat2(a, b, RENAME_EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder. Raises `FileExistsError` if there is something at `target`, whatever it is."""
    if not _renameat2(source, target, RENAME_NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    if (number := ctypes.get_errno()) in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def sync_tree(folder: Path) -> None:
    """Flush a folder, all its files and all its folders to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in UNSUPPORTED):  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Remove a folder, if it is there, with all its content, as far as possible.

    An interrupt waits until it is removed.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
