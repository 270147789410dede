"""Reading with clear errors; writing whole files or nothing."""

import errno
import os
import shutil

import pytest

from tqdit.errors import InputError
from tqdit.system.files import read_json, read_tensors, write_bytes, write_text


def test_file_is_written_whole(tmp_path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "grün")
    write_bytes(path, b"again")
    assert path.read_bytes() == b"again"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b'"text"', b"\xff\xfe", b""])
def test_bad_json_names_the_file(tmp_path, content: bytes) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"settings\.json"):
        read_json(path)


def test_missing_json_says_what_it_is_for(tmp_path) -> None:
    with pytest.raises(InputError, match=r"a\.json is missing; every model has one"):
        read_json(tmp_path / "a.json", "every model has one")


def test_directory_instead_of_a_file(tmp_path) -> None:
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path)
    with pytest.raises(InputError, match="not a regular file"):
        read_tensors(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="missing"):
        read_tensors(tmp_path / "a.safetensors")
