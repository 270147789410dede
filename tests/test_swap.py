"""Locks, and files and folders that take their place whole: what killed and simultaneous processes leave."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tqdit.errors import InputError, RepairWarning
from tqdit.system import locks, outputs, swap
from tqdit.system.files import write_bytes
from tqdit.system.locks import BusyError, holding
from tqdit.system.outputs import replacing
from tqdit.system.swap import beside, exchange, rename_new

ARTIFACT = '{"quantization_config": {"quant_method": "tqdit"}}'


def fill(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(ARTIFACT)
    (folder / "README.md").write_text(content)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    return target


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot exchange two folders."""
    monkeypatch.setattr(swap, "_renameat2", lambda *_: False)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)


def put(target: Path, content: str = "new", overwrite: bool = True) -> None:
    with replacing(target, overwrite) as folder:
        fill(folder, content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Locks ---------------------------------------------------------------------------------------------------------------


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holding(lock, tmp_path / "out") as there:
        assert there
        assert lock.read_text() == str(os.getpid())
        with pytest.raises(BusyError, match=r"this process is writing .*out"), holding(lock, tmp_path / "out"):
            pytest.fail("the lock was taken twice")
    assert names(tmp_path) == []
    with holding(lock, tmp_path / "out"):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from tqdit.system.locks import holding
with holding(Path(sys.argv[1]), Path("out")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=rf"another process \(pid {other.pid}\) is writing out"):
            holding(lock, Path("out")).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert names(tmp_path) == ["lock"], "nobody could remove it"
    with holding(lock, Path("out")):
        pass
    assert names(tmp_path) == []


def test_one_of_many_threads_has_the_lock(tmp_path: Path) -> None:
    inside, most, count = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, count
        for _ in range(100):
            try:
                with holding(tmp_path / "lock", tmp_path):
                    with guard:
                        inside += 1
                        most, count = max(most, inside), count + 1
                    with guard:
                        inside -= 1
            except BusyError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert count >= 1
    assert names(tmp_path) == []


def test_a_file_system_without_locks(tmp_path: Path, without_locks: None) -> None:
    with holding(tmp_path / "lock", tmp_path) as there:
        assert not there
    assert names(tmp_path) == []


def test_another_lock_file_of_the_same_name_is_not_removed(tmp_path: Path) -> None:
    """Whoever opened a lock file before it was removed tries again."""
    lock = tmp_path / "lock"
    with open(lock, "a+b") as stale:
        lock.unlink()
        lock.touch()
        assert not locks.is_at(stale, lock)


# Renames -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Linux exchanges")
def test_exchange(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "x").read_text() == "b"
    with pytest.raises(FileNotFoundError, match="nothing"):
        exchange(tmp_path / "a", tmp_path / "nothing")


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
def test_rename_new_takes_nothing_away(tmp_path: Path, request, fallback: bool, kind: str) -> None:
    if fallback:
        request.getfixturevalue("without_exchange")
    (tmp_path / "new").mkdir()
    target = tmp_path / "out"
    if kind == "file":
        target.touch()
    elif kind == "link":
        target.symlink_to("nothing")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "x").touch()
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "new", target)
    assert names(tmp_path) == ["new", "out"]


def test_what_came_meanwhile_is_kept(tmp_path: Path) -> None:
    """Without `overwrite`, and with -O too: no assertion decides it."""

    def late() -> None:
        with replacing(tmp_path / "out") as folder:
            fill(folder, "new")
            (tmp_path / "out").mkdir()
            fill(tmp_path / "out", "of another")

    with pytest.raises(InputError, match="exists"):
        late()
    assert (tmp_path / "out" / "README.md").read_text() == "of another"
    assert names(tmp_path) == ["out"]


def test_what_came_at_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    place = swap.Place(tmp_path / "out", True)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(swap.os.path, "lexists", lambda path: False)
    with pytest.raises(InputError, match="made by someone else"):
        place._put(tmp_path / "mine")
    assert names(tmp_path) == ["mine", "out"]


def test_a_foreign_file_that_came_meanwhile_is_kept(old: Path) -> None:
    def late() -> None:
        with replacing(old, overwrite=True) as folder:
            fill(folder, "new")
            (old / "notes.txt").write_text("precious")

    with pytest.raises(InputError, match=r"notes\.txt"):
        late()
    assert (old / "notes.txt").read_text() == "precious"
    assert (old / "README.md").read_text() == "old"


# Leftovers -----------------------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_run_are_removed(old: Path) -> None:
    for kind in ("partial", "old"):
        beside(old, kind).mkdir()
        (beside(old, kind) / "x").touch()
    beside(old, "lock").write_text("12345")
    neighbour = beside(old.with_name("output"), "partial")
    neighbour.mkdir()
    put(old)
    assert names(old.parent) == sorted([neighbour.name, "out"])
    assert (old / "README.md").read_text() == "new"


def test_leftovers_are_removed_where_the_output_is_refused(old: Path) -> None:
    beside(old, "partial").mkdir()
    with outputs.reserved(old):
        assert not beside(old, "partial").exists()


@pytest.mark.parametrize("name", [".out.tqdit.old", ".out.a8_x0c1d.old"])
def test_an_artifact_that_was_taken_away_is_put_back(old: Path, name: str) -> None:
    """A run was killed between two renames, where a file system cannot exchange, or by an earlier version."""
    old.rename(old.with_name(name))
    with pytest.warns(RepairWarning, match="out was missing.*put back"), outputs.reserved(old):
        assert (old / "README.md").read_text() == "old"
    assert names(old.parent) == ["out"]


def test_what_is_no_artifact_is_not_put_back(tmp_path: Path) -> None:
    """A name of eight letters may be a user's."""
    backup = tmp_path / ".out.mybackup.old"
    backup.mkdir()
    (backup / "thesis.tex").write_text("precious")
    with outputs.reserved(tmp_path / "out"):
        assert names(tmp_path) == [".out.mybackup.old", ".out.tqdit.lock"]


def test_without_locks_nothing_is_put_back(old: Path, without_locks: None) -> None:
    """The process that took it away may be about to put the new one there."""
    old.rename(old.with_name(".out.a8_x0c1d.old"))
    with outputs.reserved(old):
        assert not old.exists()


def test_a_live_process_loses_nothing(old: Path) -> None:
    with replacing(old, overwrite=True) as folder:
        fill(folder, "new")
        with pytest.raises(BusyError):
            put(old, "another")
        assert (folder / "README.md").read_text() == "new"
    assert (old / "README.md").read_text() == "new"


def test_without_locks_nothing_of_others_is_removed(old: Path, without_locks: None) -> None:
    beside(old, "partial").mkdir()
    with replacing(old, overwrite=True) as folder:
        fill(folder, "first")
        put(old, "second")
    assert (old / "README.md").read_text() == "first"
    assert names(old.parent) == [".out.tqdit.partial", "out"]


def test_without_exchange(old: Path, without_exchange: None) -> None:
    put(old)
    assert (old / "README.md").read_text() == "new"
    assert names(old.parent) == ["out"]


def test_parents_that_stay_empty_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a" / "b" / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_cannot_be_removed_is_no_obstacle(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside(old, "partial").mkdir()
    monkeypatch.setattr(swap.shutil, "rmtree", lambda *_, **__: None)
    put(old)
    assert (old / "README.md").read_text() == "new"


def test_an_interrupt_waits_until_a_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rmtree, calls = tmp_path / "x", swap.shutil.rmtree, []
    folder.mkdir()

    def interrupted(*args: object, **options: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(*args, **options)

    monkeypatch.setattr(swap.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap.remove(folder)
    assert not folder.exists()


# Single files --------------------------------------------------------------------------------------------------------


def test_a_partial_file_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "000003.png"
    beside(path, "partial").write_bytes(b"longer than what follows")
    write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert names(tmp_path) == ["000003.png"]


def test_a_partial_file_of_a_live_process_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with swap.partial_file(path) as (partial, file):
        file.write(b"first")
        write_bytes(path, b"second")
        file.flush()
        assert path.read_bytes() == b"second"
        partial.replace(path)
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("planted", ["link", "hard link"])
def test_a_planted_partial_file_is_not_written_through(tmp_path: Path, planted: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("precious")
    if planted == "link":
        beside(path, "partial").symlink_to(victim)
    else:
        beside(path, "partial").hardlink_to(victim)
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert victim.read_text() == "precious"


def test_without_locks_a_file_is_written_whole(tmp_path: Path, without_locks: None) -> None:
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", ["ENOTSUP", "EOPNOTSUPP"])  # the same on Linux, not on macOS
def test_a_file_system_that_says_it_has_no_locks(number: str) -> None:
    assert getattr(errno, number) in locks.NO_LOCKS
    assert getattr(errno, number) in swap.UNSUPPORTED


@pytest.mark.parametrize("fallback", [True, False])
def test_a_file_that_is_there_may_stay(tmp_path: Path, request, fallback: bool) -> None:
    if fallback:
        request.getfixturevalue("without_exchange")
    for content in (b"first", b"second"):
        write_bytes(tmp_path / "run.json", content, replace=False)
    assert (tmp_path / "run.json").read_bytes() == b"first"
    assert names(tmp_path) == ["run.json"]
