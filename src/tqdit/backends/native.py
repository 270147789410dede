"""Compile `kernels/` for this processor at first use, keep the library in a cache folder, and call its C functions.

No compiler is needed to install the package. Where none is found, or it fails, `library` raises `UnavailableError` with
the reason, and the CPU backend runs the same operations through torch.

Settings, from the environment: TQDIT_CXX (the compiler; empty: none), TQDIT_CXXFLAGS (instead of the processor's own
instruction set), TQDIT_INSTRUCTIONS (see `instructions`), TQDIT_CACHE (the folder; default: tqdit in the user's cache
folder).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tqdit.backends.instructions import NAMES, description, target_flags
from tqdit.backends.signatures import declare

SOURCES = Path(__file__).with_name("kernels")
# No contraction: codes must not depend on where a compiler finds a fused multiply-add.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300  # the limit of a build


class UnavailableError(Exception):
    """The kernels cannot be built or loaded here; the message says why."""


def call(name: str, *arguments: object) -> None:
    """Run one function of the library.

    `signatures.FUNCTIONS` declares its arguments, and ctypes holds callers to that.
    """
    getattr(library(), f"tqdit_{name}")(*arguments)


def reason() -> str | None:
    """Return why the kernels cannot run here, or None if they can."""
    try:
        library()
    except UnavailableError as error:
        return str(error)
    return None


def has_products() -> bool:
    """Say whether the kernels' own integer matmul is fast here."""
    return bool(library().tqdit_has_products())


def has_bfloat16() -> bool:
    """Say whether the kernels were compiled to AVX-512 BF16, and so multiply bf16 twice as fast as fp32."""
    return bool(library().tqdit_has_bfloat16())


def instructions() -> str:
    """Return the name of the integer instructions to which the kernels were compiled, for reports."""
    return NAMES[library().tqdit_has_instructions()]


def library() -> ctypes.CDLL:
    """Return the compiled kernels, built on the first call. Raises `UnavailableError`."""
    loaded = _load()
    if isinstance(loaded, str):
        raise UnavailableError(loaded)
    return loaded


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or why there is none; either way a process tries only once."""
    try:
        return _built()
    except UnavailableError as error:
        return str(error)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"cannot build the kernels: {error}"


def _built() -> ctypes.CDLL:
    compiler = _compiler()
    flags = (*FLAGS, *target_flags())
    stem = f"kernels-{_key(compiler, flags)}"
    problem = ""
    for folder in _folders():
        try:
            _make_private(folder)
            path = _kept(folder, stem) or _compile(compiler, flags, folder, stem)
            return declare(ctypes.CDLL(str(path)))
        except OSError as error:
            problem = f"{folder}: {error}"
    raise UnavailableError(f"cannot keep or load the compiled kernels: {problem}")


def _kept(folder: Path, stem: str) -> Path | None:
    """Return the library that an earlier process built, whole: its name ends with the hash of its content.

    A file that was cut off would kill the process that loads it, not raise an error. One that is damaged is removed;
    a link is left alone, and what it points to as well.
    """
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            _check_private(path)
            whole = path.name == _name(stem, path.read_bytes())
        except OSError:
            continue
        if whole:
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compiler() -> str:
    if "TQDIT_CXX" in os.environ:
        named = os.environ["TQDIT_CXX"]
        found = shutil.which(named) if named else None
        if found is None:
            raise UnavailableError(f"TQDIT_CXX names no compiler: '{named}'")
        return found
    if sys.platform == "win32":
        raise UnavailableError("the kernels are written for GCC and Clang; set TQDIT_CXX to one of them")
    for candidate in COMPILERS:
        if found := shutil.which(candidate):
            return found
    raise UnavailableError(f"no C++ compiler found ({', '.join(COMPILERS)})")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Return a hash of everything that decides the binary: a cache folder may be shared by machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS, check=False).stdout
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file())
    parts = (sources, " ".join(flags).encode(), version, description().encode())
    return hashlib.sha256(b"\0".join((*parts, torch.__version__.encode()))).hexdigest()[:24]


def _folders() -> list[Path]:
    """Return where the library may be kept: the cache folder, or one that lasts until the machine restarts."""
    temporary = Path(tempfile.gettempdir()) / f"tqdit-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    if "TQDIT_CACHE" in os.environ:
        return [Path(os.environ["TQDIT_CACHE"]), temporary]
    with contextlib.suppress(RuntimeError):  # a user without a home
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqdit", temporary]
    return [temporary]


def _make_private(folder: Path) -> None:
    """Refuse a folder to which somebody else could write: code is loaded from it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)


def _check_private(path: Path) -> None:
    if hasattr(os, "getuid"):
        status = path.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"{path} can be written to by others")


def _compile(compiler: str, flags: tuple[str, ...], folder: Path, stem: str) -> Path:
    """Build into a file of this process's own and move the file into place, whole.

    Other processes may be building the same library.
    """
    _remove_leftovers(folder)
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", scratch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if done.returncode == 0:
            return _moved(Path(scratch), folder, stem)
        raise UnavailableError(f"{compiler} cannot build the kernels: {_last_line(done.stderr)}")
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{compiler} took more than {BUILD_SECONDS} s to build the kernels") from None
    finally:
        Path(scratch).unlink(missing_ok=True)


def _moved(scratch: Path, folder: Path, stem: str) -> Path:
    """Move a finished library to its name; it is on the disk before anyone can see it there."""
    with scratch.open("rb") as file:
        path = folder / _name(stem, file.read())
        os.fsync(file.fileno())
    os.replace(scratch, path)
    return path


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed builds left: files to which no build can still be writing."""
    for path in folder.glob("tmp*.so"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > 2 * BUILD_SECONDS:
                path.unlink()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0].strip() if lines else "no message"
