"""`tqdit compare --out` and `tqdit report`, of a described model with images and of a traced one on recorded calls."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from zoo import ZOO

import tqdit
from tiny_called import decoder, write_flux
from tqdit import recorded, workflow
from tqdit.calibration.calls import Calls
from tqdit.calibration.pipeline_calls import Recording
from tqdit.cli.main import main
from tqdit.errors import InputError
from tqdit.quality import run_file
from tqdit.report import page
from tqdit.report.page import render

FLUX = "FluxTransformer2DModel"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `tqdit ARGS`: exit code, standard output, last line of standard error."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err.strip().rpartition("\n")[2]

    return call


@pytest.fixture(scope="module")
def artifact(pipeline, tiny_recipe, tmp_path_factory) -> Path:
    recipe, out = tiny_recipe("plus"), tmp_path_factory.mktemp("artifact") / "w8a8"
    prepared = workflow.prepare(pipeline, recipe)
    workflow.save(workflow.solve_prepared(prepared, recipe)[0], prepared.source, out)
    return out


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny FLUX, its calls and an artifact of it."""
    root = tmp_path_factory.mktemp("flux")
    model = ZOO[FLUX].build(0).to(torch.bfloat16)
    model.save_pretrained(root / "float")
    made = []
    for number in range(4):
        call = ZOO[FLUX].call(seed=number, batch=1)
        call["timestep"] = call["timestep"] * (0.2 + 0.3 * number)
        made.append(call)
    Recording({"transformer": Calls.of(model, made)}).save(root / "calls.safetensors")
    recipe = tqdit.Recipe("plus", samples=1, groups=2, rounds=0, rows=32, input_grid="uniform")
    recorded.quantize_folder(root / "float", root / "plus", recipe, calls=root / "calls.safetensors", device="cpu")
    return root


@pytest.fixture
def _few_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "TOP", 1)


@pytest.mark.usefixtures("_few_charts")
def test_a_comparison_is_saved_and_becomes_a_page(run: Command, pipeline: Path, artifact: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "run.safetensors", tmp_path / "report.html"
    code, said, error = run(
        "compare", pipeline, artifact, "-n", 3, "--steps", 3, "--samples", 1, "--no-cost", "-q", "-o", saved
    )
    assert (code, error) == (0, "")
    assert f"run: {saved}; `tqdit report {saved}` makes a page of it" in said
    found, images = run_file.read(saved)
    (part,) = found.parts
    assert found.command.startswith("tqdit compare ")
    assert part.protocol["steps"] == 3
    assert [row.name for row in part.models] == ["w8a8"]
    assert part.models[0].sites_in_all == len(part.models[0].sites) > 20
    assert {boxes.block for boxes in part.boxes} == {0, 1}
    assert part.captions == ["class 0", "class 1", "class 2"]
    assert [pixels.shape for pixels in images.values()] == [(3, 1, 8, 8)] * 2
    assert run("report", saved, "-o", out) == (0, f"report: {out}\n", "")
    text = out.read_text()
    assert "The most sensitive sites" in text
    assert "Box plots of post-softmax maxima of block 1" in text
    assert str(artifact) in text, "the command that made it"


@pytest.mark.usefixtures("_few_charts")
def test_recorded_calls_make_a_page_without_images(run: Command, flux: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "run.safetensors", tmp_path / "report.html"
    calls = flux / "calls.safetensors"
    code, *_ = run("compare", flux / "float", flux / "plus", "--calls", calls, "--samples", 1, "-q", "-o", saved)
    assert code == 0
    found, images = run_file.read(saved)
    (part,) = found.parts
    assert (found.kind, images) == ("calls", {})
    bfloat16, plus = part.models
    assert (bfloat16.name, bfloat16.sites) == ("bfloat16", [])
    assert plus.sites_in_all > len(plus.sites) / 2 > 10
    assert plus.recipe["input_grid"] == "uniform"
    assert plus.size_bytes == (flux / "plus" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert run("report", saved, "-o", out)[0] == 0
    text = out.read_text()
    assert "some of the recorded calls" in text
    assert "<h2>Images" not in text


@pytest.mark.usefixtures("_few_charts")
def test_images_of_a_pipeline_are_saved(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pipe = DiffusionPipeline.from_pretrained(write_flux(tmp_path / "float", decoder()))
    pipe.set_progress_bar_config(disable=True)
    with tqdit.record(pipe) as calls:
        pipe("a b", num_inference_steps=2, height=32, width=32, output_type="latent")
    tqdit.quantize(tmp_path / "float", tmp_path / "dynamic", tqdit.Recipe("dynamic"), device="cpu")
    size = {"height": 32, "width": 32, "num_inference_steps": 1}
    made = tqdit.compare(
        tmp_path / "float", tmp_path / "dynamic", calls=calls, samples=1, prompts=["a b", "c"], options=size, sites=True
    )
    made.save(tmp_path / "run.safetensors")
    found, images = run_file.read(tmp_path / "run.safetensors")
    (part,) = found.parts
    assert [pixels.shape for pixels in images.values()] == [(2, 3, 32, 32)] * 2
    assert part.captions == ["a b", "c"]
    assert part.models[-1].psnr_db == made.images[0].mean_db
    assert images[0].double().std() > 1
    assert (images[0].int() - images[1].int()).abs().max() <= 2, "the figures say 80 dB"
    assert "In reading order: a b · c." in render([(found, images)])


def test_wrong_files_and_outputs_are_named_before_any_work(run: Command, pipeline, artifact, tmp_path: Path) -> None:
    assert run("compare", pipeline, artifact, "-o", "run.json")[::2] == (
        2, "tqdit: a run is saved as a .safetensors file, got 'run.json'",
    )  # fmt: skip
    missing = tmp_path / "none.safetensors"
    assert run("report", missing, "-o", tmp_path / "page.html")[::2] == (
        2, f"tqdit: {missing} is missing; `tqdit compare --out` writes runs",
    )  # fmt: skip
    (tmp_path / "text").write_text("no run")
    for other, problem in (
        (tmp_path, "is not a regular file"),
        (tmp_path / "text", "is truncated or damaged: Error .*"),
    ):
        said = run("report", other, "-o", tmp_path / "page.html")[2]
        assert re.fullmatch(f"tqdit: {other} {problem}; `tqdit compare --out` writes runs", said)
    (tmp_path / "text").unlink()
    assert run("report", missing, "-o", tmp_path)[2] == f"tqdit: output {tmp_path} is a folder; give a file"
    weights = artifact / "transformer" / "diffusion_pytorch_model.safetensors"
    assert "is no run that `tqdit compare --out` saved" in run("report", weights, "-o", tmp_path / "page.html")[2]
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_without_sites_cannot_be_saved(pipeline: Path, artifact: Path, tmp_path: Path) -> None:
    made = tqdit.compare(pipeline, artifact, num=2, sampling=tqdit.Sampling(steps=2), samples=1, cost=False)
    with pytest.raises(InputError, match="call compare with sites=True"):
        made.save(tmp_path / "run.safetensors")
    with pytest.raises(InputError, match="sites must be True or False, got 1"):
        tqdit.compare(pipeline, artifact, sites=1)
