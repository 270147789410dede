"""Building, keeping and loading the compiled kernels, and every reason why that can fail."""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ways import forget

from tqdit.backends import cpu, native

QUICK = (*native.FLAGS, "-O0")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered from other tests; what is built is built in little time."""
    monkeypatch.setattr(native, "FLAGS", QUICK)
    monkeypatch.setenv("TQDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget()


def fake_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, compiled quickly."""
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    compiler = next(filter(None, map(shutil.which, native.COMPILERS)))
    subprocess.run([compiler, *QUICK, str(native.SOURCES / "kernels.cpp"), "-o", str(path)], check=True)
    return path


@pytest.fixture
def copied(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes no time: it gives a copy of `library`."""
    script = f'case "$*" in *--version*) exit 0;; esac; for last; do :; done; cp {library} "$last"'
    monkeypatch.setenv("TQDIT_CXX", fake_compiler(tmp_path / "copier", script))
    forget()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@needs_compiler
def test_built_once_and_kept(cache: Path) -> None:
    assert native.reason() is None
    (name,) = files(cache)
    built = (cache / name).stat().st_mtime_ns
    forget()
    assert native.reason() is None
    assert files(cache) == [name]
    assert (cache / name).stat().st_mtime_ns == built
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_compiler
def test_other_flags_are_another_library(copied, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.reason() is None
    monkeypatch.setenv("TQDIT_CXXFLAGS", "-DANYTHING")
    forget()
    assert native.reason() is None
    assert len(files(cache)) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["cut off", "one bit", "empty", "other file"])
def test_a_damaged_library_is_built_again_before_it_is_loaded(copied, cache: Path, damage: str) -> None:
    """A library that was cut off is a bus error for whoever loads it, so this process would not survive a mistake."""
    assert native.reason() is None
    (name,) = files(cache)
    whole = (cache / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    content = {"cut off": whole[:60000], "one bit": bytes(flipped), "empty": b"", "other file": b"\x7fELF damaged"}
    (cache / name).unlink()  # a file of its own: this process has the old one mapped
    (cache / name).write_bytes(content[damage])
    forget()
    assert native.reason() is None
    assert files(cache) == [name]
    assert (cache / name).read_bytes() == whole


@needs_compiler
def test_what_killed_builds_left_goes_with_the_next_build(copied, cache: Path) -> None:
    cache.mkdir(mode=0o700)
    for name, age in (("tmpold.so", 2 * native.BUILD_SECONDS + 60), ("tmpnew.so", 0)):
        (cache / name).write_bytes(b"")
        os.utime(cache / name, (time.time() - age,) * 2)
    assert native.reason() is None
    assert len(files(cache)) == 2
    assert "tmpnew.so" in files(cache)


@needs_compiler
def test_what_a_link_points_to_is_left_alone(copied, cache: Path, tmp_path: Path) -> None:
    """Neither a cache folder nor a library in it is taken through a link, and nothing behind a link is removed."""
    assert native.reason() is None
    (name,) = files(cache)
    good = cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(good)
    forget()
    assert native.reason() is None  # in the temporary folder
    assert files(good) == [name]
    cache.unlink()
    cache.mkdir(mode=0o700)
    (cache / name).symlink_to(good / name)
    forget()
    assert native.reason() is None
    assert files(good) == [name]
    assert not (cache / name).is_symlink()


@needs_compiler
def test_a_cache_that_others_can_write_to_is_not_used(copied, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert native.reason() is None
    assert files(cache) == []


@needs_compiler
def test_nowhere_to_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TQDIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert "cannot keep or load the compiled kernels" in str(native.reason())


@pytest.mark.parametrize("named", ["", "no-such-compiler"])
def test_a_named_compiler_that_is_not_there(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDIT_CXX", named)
    assert native.reason() == f"TQDIT_CXX names no compiler: '{named}'"
    assert type(cpu.BACKEND()) is cpu.TorchCpu
    with pytest.raises(native.UnavailableError, match="names no compiler"):
        native.library()


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(native.reason()).startswith("no C++ compiler found")


def test_a_compiler_that_refuses(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo 'kernels.cpp:1: error: unknown target' >&2; exit 1"
    monkeypatch.setenv("TQDIT_CXX", fake_compiler(tmp_path / "cxx", script))
    assert "cannot build the kernels: kernels.cpp:1: error: unknown target" in str(native.reason())
    assert files(cache) == []  # nothing half written


def test_a_compiler_that_never_ends(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'case "$*" in *--version*) exit 0;; esac; exec sleep 60'
    monkeypatch.setenv("TQDIT_CXX", fake_compiler(tmp_path / "cxx", script))
    monkeypatch.setattr(native, "BUILD_SECONDS", 0.2)
    assert "took more than 0.2 s" in str(native.reason())
    assert files(cache) == []


def test_the_source_is_part_of_the_package() -> None:
    assert (native.SOURCES / "kernels.cpp").is_file()
