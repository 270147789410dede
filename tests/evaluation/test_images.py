"""The images of a job: what decides them, and a folder that fills up image by image."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tqdit import workflow
from tqdit.errors import InputError
from tqdit.imaging import generate, images
from tqdit.imaging.images import RUN, Images, check_folder, into_folder
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import ClassLabels, Sampling
from tqdit.sources.resolve import load_float, resolve

FAST = Sampling("ddim", 2, 1.5)


@pytest.fixture
def wanted(pipeline: Path) -> Images:
    return workflow.images_of(pipeline, ["3", "class 5"], 5, FAST, seed=7, batch=2)


@pytest.fixture
def module(wanted: Images) -> torch.nn.Module:
    return load_float(wanted.source)


def fill(wanted: Images, module: torch.nn.Module, folder: Path) -> int:
    return into_folder(wanted, wanted.run, module, folder, lambda _: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_labels_cycle_and_batches_cover(wanted: Images) -> None:
    assert wanted.labels == [3, 5, 3, 5, 3]
    assert wanted.batches == [range(2), range(2, 4), range(4, 5)]


def test_the_run_names_the_sampler_that_auto_means(wanted: Images) -> None:
    """A folder that was begun before "auto" continues."""
    named = {sampler: replace(wanted, sampling=Sampling(sampler, 4)).run for sampler in ("auto", "ddim", "ddpm")}
    assert named["auto"] == named["ddim"]
    assert named["ddpm"]["sampler"] == "ddpm"
    assert "conditions_sha256" not in named["auto"]


def test_the_run_names_its_conditions(wanted: Images) -> None:
    few, many, again = (replace(wanted, conditions=ClassLabels(count)).run for count in (10, 11, 10))
    assert few == again
    assert few["conditions_sha256"] != many["conditions_sha256"]


def test_conditions_that_are_given_are_drawn(wanted: Images, module: torch.nn.Module) -> None:
    """Class i is condition 9 - i."""

    class Reversed(ClassLabels):
        def rows(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().rows(9 - indices)

    other = replace(wanted, classes=[6, 4], conditions=Reversed(10))
    drawn = [images.gathered(each, module, lambda _: None) for each in (wanted, other)]
    assert torch.equal(*drawn)


def test_files_are_the_images(wanted: Images, module: torch.nn.Module, tmp_path: Path) -> None:
    told: list[float] = []
    assert into_folder(wanted, wanted.run, module, tmp_path / "new" / "out", told.append) == 5
    assert told == sorted(told)
    assert told[-1] == 1
    pixels = images.gathered(wanted, module, lambda _: None)
    assert torch.equal(pixels, workflow.sample_images(wanted))
    for i, image in enumerate(pixels):
        with Image.open(tmp_path / "new" / "out" / f"{i:06d}.png") as found:
            assert (found.size, found.mode) == ((8, 8), "L")
            assert found.tobytes() == bytes(((image[0] + 1) * 127.5).round().to(torch.uint8).flatten().tolist())


def test_what_is_there_is_not_drawn_again(
    wanted: Images, module: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch that lacks one image the whole batch is drawn, so that its rounding is the same."""
    fill(wanted, module, tmp_path)
    whole = contents(tmp_path)
    drawn: list[range] = []
    sample_batches = generate.sample_batches

    def watched(*args):
        drawn.extend(args[5])
        return sample_batches(*args)

    monkeypatch.setattr(generate, "sample_batches", watched)
    assert fill(wanted, module, tmp_path) == 0
    (tmp_path / "000003.png").unlink()
    assert fill(wanted, module, tmp_path) == 1
    assert drawn == [range(2, 4)]
    assert contents(tmp_path) == whole
    assert fill(replace(wanted, num=7), module, tmp_path) == 2, "more of the same run"


def test_an_interrupt_keeps_finished_batches(wanted: Images, module: torch.nn.Module, tmp_path: Path) -> None:
    def interrupt(fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        into_folder(wanted, wanted.run, module, tmp_path, interrupt)
    assert sorted(contents(tmp_path)) == ["000000.png", "000001.png", RUN]


@pytest.mark.parametrize("keep", [0, 8, 40, -1])
def test_a_damaged_image_is_drawn_again(wanted: Images, module: torch.nn.Module, tmp_path: Path, keep: int) -> None:
    fill(wanted, module, tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "000002.png").write_bytes(whole["000002.png"][:keep])
    (tmp_path / ".000002.png.tqdit.partial").write_bytes(b"of a killed run")
    assert fill(wanted, module, tmp_path) == 1
    assert contents(tmp_path) == whole


def test_two_runs_do_not_mix(wanted: Images, module: torch.nn.Module, tmp_path: Path, monkeypatch) -> None:
    """Both find an empty folder; the second to say what it draws ends."""
    check, calls = images.check_folder, []

    def other_comes_first(folder: Path, run: dict) -> None:
        calls.append(folder)
        if len(calls) > 1:
            check(folder, run)
        else:
            (folder / RUN).write_text(json.dumps(replace(wanted, seed=8).run))

    monkeypatch.setattr(images, "check_folder", other_comes_first)
    with pytest.raises(InputError, match="seed was 8, now it is 7"):
        fill(wanted, module, tmp_path)
    assert list(contents(tmp_path)) == [RUN]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "seed was 7, now it is 8"),
        ({"sampling": Sampling("ddim", 3, 1.5)}, "steps was 2"),
        ({"sampling": Sampling("ddpm", 2, 1.5)}, "sampler was ddim"),
        ({"sampling": Sampling("ddim", 2, 2)}, "guidance was 1.5"),
        ({"classes": (3,)}, "classes was"),
        ({"batch": 1}, "batch was 2, now it is 1"),
    ],
)
def test_another_run_is_refused(wanted: Images, tmp_path: Path, change: dict, named: str) -> None:
    (tmp_path / RUN).write_text(json.dumps(wanted.run))
    check_folder(tmp_path, wanted.run)
    check_folder(tmp_path, replace(wanted, num=99).run)
    check_folder(tmp_path, {**wanted.run, "model": "renamed"})
    with pytest.raises(InputError, match=named):
        check_folder(tmp_path, replace(wanted, **change).run)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backend": "reference"}, r"backend was cpu\.scores.*, now it is reference\.scores\[int8\]"),
        ({"dtype": "bfloat16"}, "dtype was float32, now it is bfloat16"),
    ],
)
def test_another_backend_or_dtype_is_refused(solved, pipeline, tmp_path: Path, options: dict, named: str) -> None:
    """They round differently."""
    workflow.save(solved(), resolve(pipeline), tmp_path / "w8a8")
    few = workflow.images_of(tmp_path / "w8a8", ["3"], 1, FAST)
    assert workflow.sample_folder(few, tmp_path / "out") == 1
    assert workflow.sample_folder(few, tmp_path / "out", Target(backend="cpu")) == 0, "what auto stands for"
    with pytest.raises(InputError, match=named):
        workflow.sample_folder(few, tmp_path / "out", Target(**options))


def test_other_weights_or_schedule_are_another_run(own_pipeline: Path, wanted: Images, tiny_dit) -> None:
    own = replace(wanted, source=resolve(own_pipeline))
    assert own.run == wanted.run, "the same model elsewhere"
    scheduled = replace(own, source=replace(own.source, scheduler={"num_train_timesteps": 500}))
    tiny_dit(seed=1).save_pretrained(own_pipeline / "transformer")
    changed = replace(own)
    hashes = {each.run["model_sha256"] for each in (wanted, scheduled, changed)}
    assert len(hashes) == 3


def test_folder_of_something_else(wanted: Images, tmp_path: Path) -> None:
    check_folder(tmp_path / "new", wanted.run)
    (tmp_path / ".000000.png.x.partial").touch()
    check_folder(tmp_path, wanted.run)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match=rf"files but no {RUN}"):
        check_folder(tmp_path, wanted.run)
    with pytest.raises(InputError, match=r"thesis\.txt is not a folder"):
        check_folder(tmp_path / "thesis.txt", wanted.run)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "config.json").write_text('{"quantization_config": {"quant_method": "tqdit"}}')
    with pytest.raises(InputError, match="is inside the artifact"):
        check_folder(tmp_path / "artifact" / "images", wanted.run)
    (tmp_path / RUN).write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        check_folder(tmp_path, wanted.run)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num": 0}, "num"), ({"batch": 0}, "batch"), ({"sampling": Sampling("ddim", 1001)}, "at most the 1000")],
)
def test_bad_settings(wanted: Images, change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        replace(wanted, **change)


def test_folder_is_untouched_where_the_model_does_not_load(own_pipeline: Path, wanted: Images, tmp_path: Path) -> None:
    file = own_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        workflow.sample_folder(replace(wanted, source=resolve(own_pipeline)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
