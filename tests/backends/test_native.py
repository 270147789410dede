"""Building, keeping and loading the compiled kernels, and every reason why that can fail."""

import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ways import forget

from tqdit.backends import cpu, native

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered from other tests."""
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
def test_other_flags_are_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.reason() is None
    monkeypatch.setenv("TQDIT_CXXFLAGS", "-DANYTHING")
    forget()
    assert native.reason() is None
    assert len(files(cache)) == 2


@needs_compiler
def test_a_damaged_library_is_built_again(cache: Path) -> None:
    assert native.reason() is None
    (name,) = files(cache)
    code = "from pathlib import Path; from tqdit.backends import native; native.library(); print('loaded')"
    (cache / name).unlink()  # a file of its own: this process has the old one mapped
    (cache / name).write_bytes(b"\x7fELF damaged")
    for _ in range(2):  # the first one throws it away, at the latest the second one has it
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "loaded", done.stderr
    assert (cache / name).stat().st_size > 1000


@needs_compiler
def test_a_cache_that_others_can_write_to_is_not_used(cache: Path) -> None:
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


@needs_compiler
def test_without_openmp_it_still_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = next(filter(None, map(shutil.which, native.COMPILERS)))
    script = f'case "$*" in *-fopenmp*) echo "error: unsupported option" >&2; exit 1;; esac; exec {compiler} "$@"'
    monkeypatch.setenv("TQDIT_CXX", fake_compiler(tmp_path / "cxx", script))
    assert native.reason() is None


def test_the_source_is_part_of_the_package() -> None:
    assert (native.SOURCES / "kernels.cpp").is_file()
