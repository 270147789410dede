"""Rules of where outputs may go, and folders that are replaced whole or not at all."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

from tqdit.errors import InputError
from tqdit.system import swap
from tqdit.system.outputs import check_file, check_space, check_target, foreign_file, replacing

ARTIFACT = {"quantization_config": {"quant_method": "tqdit"}}


def fill(folder, content: str) -> None:
    (folder / "config.json").write_text(json.dumps(ARTIFACT))
    (folder / "tqdit.json").write_text(json.dumps({"files": {"data": "", "scheduler/inner": ""}}))
    (folder / "data").write_text(content)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "inner").write_text(content)


@pytest.fixture
def old(tmp_path):
    """An artifact that is there already."""
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    return target


@pytest.fixture
def without_exchange(monkeypatch):
    """Act as a file system on which two folders cannot change places in one step."""
    monkeypatch.setattr(swap, "_renameat2", lambda *_: False)


def assert_intact(target, content: str) -> None:
    """`target` holds `content` and nothing is left beside it."""
    assert (target / "data").read_text() == (target / "scheduler" / "inner").read_text() == content
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_new_folder_appears_whole(tmp_path) -> None:
    target = tmp_path / "deep" / "out"
    with replacing(target) as folder:
        fill(folder, "new")
        assert not target.exists()
    assert_intact(target, "new")


def test_folder_is_readable_by_others(tmp_path) -> None:
    with replacing(tmp_path / "out") as folder:
        fill(folder, "new")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_overwrite_replaces_the_whole_folder(old) -> None:
    (old / "README.md").write_text("old")
    with replacing(old, overwrite=True) as folder:
        fill(folder, "new")
        assert (old / "data").read_text() == "old"
    assert_intact(old, "new")
    assert not (old / "README.md").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupt_midway_leaves_everything_as_it_was(tmp_path, old, error, exists: bool) -> None:
    target = old if exists else tmp_path / "other"

    def interrupted() -> None:
        with replacing(target, overwrite=True) as folder:
            fill(folder, "new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert_intact(old, "old")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_syncing(old, monkeypatch) -> None:
    monkeypatch.setattr(swap, "sync", no_space)
    with pytest.raises(OSError, match="No space"), replacing(old, overwrite=True) as folder:
        fill(folder, "new")
    assert_intact(old, "old")


@pytest.mark.parametrize("failing", [1, 2])
def test_failing_rename_puts_the_old_folder_back(old, without_exchange, monkeypatch, failing: int) -> None:
    rename, calls = Path.rename, []

    def flaky(path, target):
        calls.append(path)
        if len(calls) == failing:
            no_space()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", flaky)
    with pytest.raises(OSError, match="No space"), replacing(old, overwrite=True) as folder:
        fill(folder, "new")
    monkeypatch.undo()
    assert_intact(old, "old")


def test_existing_folder_needs_overwrite(old) -> None:
    with pytest.raises(InputError, match=r"exists; .*overwrite"), replacing(old):
        pytest.fail("the body must not run")
    assert_intact(old, "old")


def float_model(folder) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    (folder / "diffusion_pytorch_model.safetensors").write_text("precious")


def pipeline(folder) -> None:
    (folder / "model_index.json").write_text("{}")


def manifest_alone(folder) -> None:
    (folder / "tqdit.json").write_text(json.dumps({"files": {"tqdit.json": ""}}))


def documents(folder) -> None:
    (folder / "thesis.tex").write_text("precious")


@pytest.mark.parametrize("make", [float_model, pipeline, manifest_alone, documents])
def test_folder_that_is_not_an_artifact_is_never_overwritten(tmp_path, make) -> None:
    make(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match="not an artifact"):
        check_target(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="not an artifact"), replacing(tmp_path, overwrite=True):
        pytest.fail("the body must not run")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name", [".git/HEAD", "notes.txt", "scheduler/notes.txt", "lora.safetensors", "transformer/notes.txt", "x/y"]
)
def test_what_else_is_in_an_artifact_is_never_lost(old, name: str) -> None:
    (old / name).parent.mkdir(exist_ok=True)
    (old / name).write_text("precious")
    if name.startswith("transformer"):
        (old / "config.json").rename(old / "transformer" / "config.json")
    with pytest.raises(InputError, match=f"has '{name}', which is no part of the model and would be lost"):
        check_target(old, overwrite=True)
    with pytest.raises(InputError, match=name), replacing(old, overwrite=True):
        pytest.fail("the body must not run")
    assert (old / name).read_text() == "precious"


@pytest.mark.parametrize(
    "name", [".DS_Store", "scheduler/._inner", ".cache/huggingface/download/x.metadata", ".ipynb_checkpoints/x.json"]
)
def test_what_programs_leave_in_an_artifact_is_no_obstacle(old, name: str) -> None:
    (old / name).parent.mkdir(parents=True, exist_ok=True)
    (old / name).touch()
    check_target(old, overwrite=True)
    assert foreign_file(old) is None


def test_a_link_to_a_folder_in_an_artifact_is_never_lost(tmp_path, old) -> None:
    (old / "images").symlink_to(tmp_path)
    with pytest.raises(InputError, match="has 'images'"):
        check_target(old, overwrite=True)


def test_own_files_of_a_pipeline_without_a_seal(tmp_path) -> None:
    """diffusers writes none, and a model card."""
    names = ["README.md", "model_index.json", "scheduler/scheduler_config.json", "vae/config.json",
             "vae/diffusion_pytorch_model.safetensors", "transformer/config.json",
             "transformer/diffusion_pytorch_model.safetensors.index.json", "transformer/tqdit.json",
             "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"]  # fmt: skip
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(json.dumps(ARTIFACT))
    check_target(tmp_path / "out", overwrite=True)
    check_target(tmp_path / "out" / "transformer", overwrite=True, in_pipeline=True)
    with pytest.raises(InputError, match="is inside the artifact"):
        check_target(tmp_path / "out" / "transformer", overwrite=True)


@pytest.mark.parametrize("path", ["sub", "deep/sub", "transformer"])
@pytest.mark.parametrize("in_pipeline", [False, True])
def test_an_artifact_inside_another_is_refused(old, path: str, in_pipeline: bool) -> None:
    if in_pipeline and path == "transformer":
        return check_target(old / path, overwrite=False, in_pipeline=True)
    with pytest.raises(InputError, match=f"{path} is inside the artifact .*out; choose a place outside of it"):
        check_target(old / path, overwrite=False, in_pipeline=in_pipeline)
    return None


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a file system that is not writable even for root")
@pytest.mark.parametrize("check", [lambda path: check_target(path, overwrite=False), check_file])
def test_an_output_where_even_root_cannot_write(check) -> None:
    with pytest.raises(InputError, match="/proc is not writable"):
        check(Path("/proc/x/out"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Path("/dev/full").open("wb"))  # noqa: SIM115 - check_file closes it
    with pytest.raises(InputError, match=r"is not writable \(No space left on device\)"):
        check_file(tmp_path / "a.json")


def test_a_mount_point_is_refused(old, monkeypatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(InputError, match="is a mount point"):
        check_target(old, overwrite=True)


def test_space_is_compared_with_what_is_free(tmp_path) -> None:
    check_space(tmp_path / "new" / "out", 1)
    with pytest.raises(InputError, match=r"new/out takes about 10+\.0 MB, and .* has \d+\.\d MB free"):
        check_space(tmp_path / "new" / "out", 10**24)


def test_file_is_never_overwritten_by_a_folder(tmp_path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="is a file"):
        check_target(tmp_path / "out", overwrite=True)


def test_empty_folder_may_be_overwritten(tmp_path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with replacing(target, overwrite=True) as folder:
        fill(folder, "new")
    assert_intact(target, "new")


def test_link_to_an_artifact_stays(tmp_path, old) -> None:
    link = tmp_path / "link"
    link.symlink_to(old)
    with replacing(link, overwrite=True) as folder:
        fill(folder, "new")
    assert link.is_symlink()
    assert (old / "data").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]


@pytest.mark.parametrize("to", ["nowhere", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_dangling_link_is_no_target(tmp_path, to: str, overwrite: bool) -> None:
    (tmp_path / "link").symlink_to(tmp_path / to)
    with pytest.raises(InputError, match="symbolic link to nothing"):
        check_target(tmp_path / "link", overwrite)
    with pytest.raises(InputError, match="not a folder"):
        check_file(tmp_path / "link" / "out")


def test_circle_of_links_is_no_parent(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(InputError, match="not a folder"):
        check_target(tmp_path / "link" / "out", overwrite=False)


def check_new_target(path) -> None:
    check_target(path, overwrite=False)


@pytest.mark.parametrize("check", [check_new_target, check_file])
def test_output_that_cannot_be_made(tmp_path, monkeypatch, check) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(InputError, match="file is not a folder"):
            check(path)
    check(tmp_path / "new" / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(tempfile, "TemporaryFile", no_space)  # tests may run as root, who may write anywhere
    with pytest.raises(InputError, match="is not writable"):
        check(tmp_path / "new" / "out")


def test_folder_or_device_is_no_output_file(tmp_path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(InputError, match="not a regular file"):
        check_file(Path(os.devnull))
    (tmp_path / "a.json").write_text("old")
    check_file(tmp_path / "a.json")
