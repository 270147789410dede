"""Finished pieces: made once, read from where they are, removed without taking anything else."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tqdit.calibration.store import SEAL, Forgetful, WorkFolder, discard
from tqdit.errors import InputError, RepairWarning
from tqdit.system import distributed
from tqdit.system.world import World


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


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def drop_a_tensor(path) -> None:
    with safe_open(path, framework="pt") as file:
        notes, kept = file.metadata(), {name: file.get_tensor(name) for name in file.keys() if name != "b"}  # noqa: SIM118
    save_file(kept, path, notes)


def of_another_name(path) -> None:
    WorkFolder(path.parent).once("y", piece)
    (path.parent / "y.safetensors").replace(path)


def of_other_settings(path) -> None:
    WorkFolder(path.parent.parent / "other").once("x", piece)
    (path.parent.parent / "other" / "x.safetensors").replace(path)


def without_checksums(path) -> None:
    save_file(load_file(path), path)


def with_strange_checksums(path) -> None:
    tensors = load_file(path)
    save_file(tensors, path, {SEAL: json.dumps({"piece": "work/x", "sha256": sorted(tensors)})})


DAMAGES = [
    lambda path: path.write_bytes(b"no"),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    flip_a_bit, drop_a_tensor, of_another_name, of_other_settings, without_checksums, with_strange_checksums,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_made_anew(tmp_path, damage) -> None:
    folder = WorkFolder(tmp_path / "work")
    whole = folder.once("x", piece)
    damage(whole.path)
    with pytest.warns(RepairWarning, match=r"x\.safetensors is damaged: .*; it is made anew"):
        again = folder.once("x", lambda: {"new": torch.ones(1)})
    assert again.read()["new"].tolist() == [1]
    assert list(folder.once("x", piece).read()) == ["new"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_piece_that_is_damaged_later_is_named(tmp_path, damage) -> None:
    """Or one that another process has made."""
    whole = WorkFolder(tmp_path / "work").once("x", piece)
    damage(whole.path)
    with pytest.raises(InputError, match=r"x\.safetensors is damaged: .*; remove it"):
        whole.read()


def test_every_flipped_bit_is_noticed(tmp_path) -> None:
    """But those of the JSON header that say the same in another way."""
    whole = WorkFolder(tmp_path / "work").once(
        "x", lambda: {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bool)}
    )
    expected, data = whole.read(), whole.path.read_bytes()
    noticed = 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        whole.path.write_bytes(flipped)
        try:
            found = whole.read()
        except InputError:
            noticed += 1
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert noticed > 0.95 * len(data)


def test_all_pieces_together_in_order(tmp_path) -> None:
    for store in (Forgetful(), WorkFolder(tmp_path)):
        mine = (store.once(name, lambda i=i: {"i": torch.tensor(i)}) for i, name in enumerate("zya"))
        found = store.together(mine, list("zya"), lambda _: 0)
        assert [int(piece.read()["i"]) for piece in found] == [0, 1, 2]


def test_a_folder_that_lacks_the_pieces_of_others_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "_current", World(0, 2))
    monkeypatch.setattr(World, "wait", lambda _: None)
    store = WorkFolder(tmp_path)
    with pytest.raises(InputError, match=r"y\.safetensors of another process is not there; resumable"):
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


def test_discard_keeps_a_link_and_its_folder(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    work = tmp_path / "out.work"
    work.symlink_to(tmp_path / "elsewhere")
    WorkFolder(work / f"search-{0:016x}").once("x", piece)
    discard(work, ["search"])
    assert work.is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []
