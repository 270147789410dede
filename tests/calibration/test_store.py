"""Finished pieces: made once, read from where they are, removed without taking anything else."""

import pytest
import torch

from tqdit import distributed
from tqdit.calibration.store import Forgetful, WorkFolder, discard
from tqdit.errors import InputError


def piece() -> dict[str, torch.Tensor]:
    return {"a/low": torch.randn(3, 4).t(), "b": torch.arange(5), "c": torch.zeros(0, 2)}


def test_a_work_folder_makes_a_piece_once(tmp_path) -> None:
    made = piece()
    WorkFolder(tmp_path / "work").once("x", lambda: made)
    found = WorkFolder(tmp_path / "work").once("x", lambda: pytest.fail("made again"))
    assert {name: tensor.tolist() for name, tensor in found.read().items()} == {
        name: tensor.tolist() for name, tensor in made.items()
    }


@pytest.mark.parametrize("folder", [True, False])
def test_only_the_wanted_tensors_that_there_are(tmp_path, folder: bool) -> None:
    store = WorkFolder(tmp_path) if folder else Forgetful()
    assert list(store.once("x", piece).read(["b", "unknown"])) == ["b"]


def test_an_error_leaves_no_piece(tmp_path) -> None:
    def fails() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WorkFolder(tmp_path).once("x", fails)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_piece_is_named(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        WorkFolder(tmp_path).once("x", piece).read()


def test_all_pieces_together_in_order(tmp_path) -> None:
    for store in (Forgetful(), WorkFolder(tmp_path)):
        mine = (store.once(name, lambda i=i: {"i": torch.tensor(i)}) for i, name in enumerate("zya"))
        found = store.together(mine, list("zya"), lambda _: 0)
        assert [int(piece.read()["i"]) for piece in found] == [0, 1, 2]


def test_a_folder_that_lacks_the_pieces_of_others_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "_current", distributed.World(0, 2))
    monkeypatch.setattr(distributed.World, "wait", lambda _: None)
    store = WorkFolder(tmp_path)
    with pytest.raises(InputError, match=r"y\.safetensors of another process is not there; --resumable"):
        store.together(iter([store.once("x", piece)]), ["x", "y"], lambda _: None)


def test_discard_takes_only_work(tmp_path) -> None:
    work = tmp_path / "out.work"
    WorkFolder(work / f"search-{0:016x}").once("x", piece)
    (work / "notes-1").mkdir()
    (work / "search-results").mkdir()
    discard(work, ["search"])
    assert sorted(p.name for p in work.iterdir()) == ["notes-1", "search-results"]
    (work / "notes-1").rmdir()
    (work / "search-results").rmdir()
    discard(work, ["search"])
    assert not work.exists()
    discard(work, ["search"])
