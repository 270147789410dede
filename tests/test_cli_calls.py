"""`tqdit quantize | inspect | compare` with recorded calls, on tiny transformers and a tiny pipeline."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from torch import nn
from zoo import ZOO

import tqdit
from tqdit import recorded
from tqdit.calibration.calls import Calls
from tqdit.calibration.pipeline_calls import Recording
from tqdit.cli.main import main
from tqdit.errors import InputError
from tqdit.quality.metrics import sqnr_db
from tqdit.quality.traced_artifacts import compare_folders
from tqdit.recipe import Recipe
from tqdit.system.files import MANIFEST

FLUX = "FluxTransformer2DModel"
QUICK = ("--samples", "2", "--groups", "2", "--rounds", "0", "--set", "rows=32", "-q")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `tqdit ARGS`: exit code, standard output, standard error."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def make_calls(model: nn.Module, name: str, count: int = 6) -> Calls:
    entry, made = ZOO[name], []
    for number in range(count):
        call = entry.call(seed=number, batch=1)
        time = call[entry.timestep]
        call[entry.timestep] = (time * (0.2 + 0.3 * number)).to(time.dtype)
        made.append(call)
    return Calls.of(model, made)


def save_transformer(folder: Path, name: str = FLUX, seed: int = 0) -> nn.Module:
    model = ZOO[name].build(seed).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny FLUX, its calls, and artifacts of it."""
    root = tmp_path_factory.mktemp("flux")
    model = save_transformer(root / "float")
    calls = make_calls(model, FLUX)
    Recording({"transformer": calls}).save(root / "calls.safetensors")
    recipe = Recipe("plus", samples=2, groups=2, rounds=0, rows=32)
    recorded.quantize_folder(root / "float", root / "plus", recipe, calls=root / "calls.safetensors", device="cpu")
    return root


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of classes with a decoder, and the calls of its transformer."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    entry = ZOO["DiTTransformer2DModel"]
    model = replace(entry, config={**entry.config, "out_channels": 4}).build()  # the pipeline reads it
    labels = {number: f"class {number}" for number in range(10)}
    DiTPipeline(model, vae, DDIMScheduler(), labels).save_pretrained(root / "float")
    Recording({"transformer": make_calls(model, "DiTTransformer2DModel")}).save(root / "calls.safetensors")
    return root


def test_quantize_with_calls_reports_layers_sizes_and_time(run, flux, tmp_path) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    code, said, err = run(
        "quantize", flux / "float", "-o", out, "--calls", flux / "calls.safetensors", *QUICK, "--json", figures
    )
    assert (code, err) == (0, f"figures: {figures}\n")
    written = json.loads(figures.read_text())
    (part,) = written["transformers"]
    lines = said.splitlines()
    assert lines[0].startswith(f"{out}: float w8a8 plus, in ")
    assert lines[1] == f"transformer: {FLUX}, {part['parameters'] / 1e6:.3g} M parameters, calibrated on 4 calls"
    assert lines[2] == f"  {part['size_bytes'] / 1e6:.2f} MB, {part['size_ratio_bfloat16']:.3f} of bf16"
    assert lines[3].startswith(f"  linear layers: {part['integer']} in integers, {part['weight_only']} with integer")
    assert part["integer"] > 20
    assert part["size_bytes"] == (out / "diffusion_pytorch_model.safetensors").stat().st_size
    assert "| layers | " in (out / "README.md").read_text()


def test_load_runs_a_float_folder_and_its_artifact(flux) -> None:
    model, integer = tqdit.load(flux / "float"), tqdit.load(flux / "plus", device="cpu")
    call = ZOO[FLUX].call(seed=20)
    with torch.no_grad():
        expected, actual = model(**call, return_dict=False)[0], integer(**call, return_dict=False)[0]
    assert model.dtype is torch.float32
    assert 15 < sqnr_db(expected, actual) < 60


def test_dynamic_needs_no_calls_and_takes_those_that_are_given(run, flux, tmp_path) -> None:
    code, said, _ = run(
        "quantize", flux / "float", "-o", tmp_path / "a", "--preset", "dynamic", "--calls", flux / "calls.safetensors",
        "-q",
    )  # fmt: skip
    assert code == 0
    assert "calibrated" not in said
    code, said, _ = run("quantize", flux / "float", "-o", tmp_path / "b", "--preset", "dynamic", "-q")
    assert code == 0
    integer = tqdit.load(tmp_path / "b", device="cpu")
    with torch.no_grad():
        assert integer(**ZOO[FLUX].call(), return_dict=False)[0].isfinite().all()


def test_a_class_without_calls_is_told_how_to_record(run, flux, tmp_path) -> None:
    code, out, err = run("quantize", flux / "float", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "run `tqdit record PIPELINE -o calls.safetensors`, then give --calls calls.safetensors" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--steps", "5"), "--steps is for models that are calibrated on their own samples"),
        (("--resumable",), "--resumable is for models that are calibrated on their own samples"),
        (("--dtype", "int8"), "dtype 'int8' is not one of"),
    ],
)
def test_options_that_calls_have_no_use_for_are_refused(run, flux, tmp_path, options, said) -> None:
    out = tmp_path / "out"
    code, _, err = run("quantize", flux / "float", "-o", out, "--calls", flux / "calls.safetensors", *options)
    assert code == 2
    assert said in err
    assert not out.exists()


def test_calls_of_another_model_leave_nothing(run, flux, pipeline, tmp_path) -> None:
    out = tmp_path / "out"
    code, _, err = run("quantize", flux / "float", "-o", out, "--calls", pipeline / "calls.safetensors", "-q")
    assert code == 2
    assert "these are calls of a DiTTransformer2DModel" in err
    assert not out.exists()


def test_a_pipeline_stays_one_that_diffusers_loads(run, pipeline, tmp_path) -> None:
    out = tmp_path / "out"
    code, _, err = run("quantize", pipeline / "float", "-o", out, "--calls", pipeline / "calls.safetensors", *QUICK)
    assert (code, err) == (0, "")
    source = pipeline / "float"
    assert (out / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()
    weights = Path("vae", "diffusion_pytorch_model.safetensors")
    assert (out / weights).samefile(source / weights)
    assert not (out / "vae" / "config.json").samefile(source / "vae" / "config.json")
    assert (out / "transformer" / MANIFEST).is_file()
    assert not (out / MANIFEST).exists()
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe.transformer).__name__ == "DiTTransformer2DModel"
    assert pipe.transformer.solution.graph is not None
    images = pipe([3], num_inference_steps=2, guidance_scale=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert run("quantize", source, "-o", out, "--calls", pipeline / "calls.safetensors", *QUICK, "--overwrite")[0] == 0
    assert (source / weights).is_file()  # replacing the copy leaves the original


def test_images_of_a_pipeline_are_compared_by_prompt(run, pipeline, tmp_path) -> None:
    out, prompts, figures = tmp_path / "w8a8", tmp_path / "prompts.txt", tmp_path / "figures.json"
    prompts.write_text("3\n\n7\n")
    calls = pipeline / "calls.safetensors"
    assert run("quantize", pipeline / "float", "-o", out, "--calls", calls, *QUICK)[0] == 0
    code, said, err = run(
        "compare", pipeline / "float", out, "--calls", calls, "--prompts", prompts, "--steps", "2", "--guidance", "1",
        "-q", "--json", figures,
    )  # fmt: skip
    assert (code, err) == (0, f"figures: {figures}\n")
    (row,) = json.loads(figures.read_text())["images"]
    assert len(row["each_db"]) == 2
    assert row["worst_db"] == min(row["each_db"])
    assert row["mean_db"] == pytest.approx(sum(row["each_db"]) / 2)
    assert 10 < row["worst_db"] < 80
    assert "PSNR dB" in said


def test_compare_shows_artifacts_side_by_side_on_calls_that_were_not_used(run, flux, tmp_path) -> None:
    other, figures, calls = tmp_path / "w4a8", tmp_path / "figures.json", flux / "calls.safetensors"
    assert run("quantize", flux / "float", "-o", other, "--calls", calls, *QUICK, "--bits", "w4a8")[0] == 0
    code, said, _ = run("compare", flux / "float", flux / "plus", other, "--calls", calls, "-q", "--json", figures)
    assert code == 0
    (part,) = json.loads(figures.read_text())["transformers"]
    found = part["comparison"]
    assert found["calls"] == 2  # of six, four calibrated both artifacts
    assert part["fresh"]
    rows = {row["name"]: row["sqnr_db"] for row in found["rows"]}
    assert list(rows) == ["bfloat16", "plus", "w4a8"]
    assert rows["w4a8"] + 3 < rows["plus"]
    assert all(len(row["by_group"]) == len(found["groups"]) for row in found["rows"])
    assert "2 calls that no calibration used" in said
    assert max(map(len, said.splitlines())) <= 80 + 60  # tables fit; the sentences below them wrap


def test_compare_refuses_artifacts_of_other_weights(run, flux, tmp_path) -> None:
    save_transformer(tmp_path / "other", seed=1)
    code, _, err = run("compare", tmp_path / "other", flux / "plus", "--calls", flux / "calls.safetensors", "-q")
    assert code == 2
    assert "was made from other weights ('float')" in err


def test_inspect_groups_sites_by_what_feeds_them(run, flux, tmp_path) -> None:
    figures = tmp_path / "figures.json"
    code, said, _ = run("inspect", flux / "plus", "--json", figures)
    assert code == 0
    result = json.loads(figures.read_text())
    assert result["traced"]["integer_layers"] + result["traced"]["weight_only_layers"] > 30
    feeds = {site["feed"] for site in result["sites"] if site["role"] in ("input", "gelu")}
    assert any("norm" in feed for feed in feeds)
    assert any("GELU" in feed for feed in feeds)
    words = set(said.split())
    assert all(word in words for feed in feeds for word in feed.split())  # a long cell wraps
    assert f"of the argument '{result['traced']['timestep']}'" in said
    for site in ("transformer_blocks.0.attn.to_q.input",):
        assert site not in said
        assert site in run("inspect", flux / "plus", "--sites")[1]


def test_each_transformer_of_a_pipeline_has_calls_of_its_own(flux, tmp_path) -> None:
    """A pipeline as Wan 2.2's has two transformers of one config; each is given its own calls."""
    root, model = tmp_path / "two", ZOO[FLUX].build().to(torch.bfloat16)
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.0", "scheduler": [None, None]}
    for name in ("transformer", "transformer_2"):
        shutil.copytree(flux / "float", root / name)
        index[name] = ["diffusers", FLUX]
    (root / "model_index.json").write_text(json.dumps(index))
    calls = make_calls(model, FLUX)
    recording = Recording({"transformer": calls[:2], "transformer_2": calls[2:5]})
    recipe = Recipe("plus", samples=8, groups=1, rounds=0, rows=32)
    summary = recorded.quantize_folder(root, tmp_path / "out", recipe, calls=recording, device="cpu")
    assert [(part.component, part.calls) for part in summary.transformers] == [("transformer", 2), ("transformer_2", 3)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "model_index.json", "transformer", "transformer_2",
    }  # fmt: skip
    only = Recording({"a": calls, "b": calls})
    with pytest.raises(InputError, match="transformer: calls of a, b suit this model"):
        recorded.quantize_folder(root, tmp_path / "none", recipe, calls=only, device="cpu")
    assert not (tmp_path / "none").exists()
    one = Recording({"transformer": calls[:2]})
    with pytest.raises(InputError, match="transformer_2: the recording has calls of transformer alone"):
        recorded.quantize_folder(root, tmp_path / "none", recipe, calls=one, device="cpu")
    assert not (tmp_path / "none").exists()


def test_a_transformer_outside_of_its_pipeline_is_refused(flux, tmp_path) -> None:
    """Its artifact would be written outside of the output."""
    root, outside = tmp_path / "float", "transformer/../../elsewhere"
    shutil.copytree(flux / "float", root / "transformer")
    shutil.copytree(flux / "float", tmp_path / "elsewhere")
    parts = {name: ["diffusers", FLUX] for name in ("transformer", outside)}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    with pytest.raises(InputError, match=f"names the component '{outside}', which is no folder of it"):
        recorded.quantize_folder(root, tmp_path / "deep" / "out", Recipe("dynamic"), device="cpu")
    assert not (tmp_path / "deep").exists()


def test_python_quantizes_a_folder_of_any_class(flux, tmp_path) -> None:
    recipe = Recipe("plus", samples=2, groups=2, rounds=0, rows=32)
    made = tqdit.quantize(flux / "float", tmp_path / "plus", recipe, calls=flux / "calls.safetensors", device="cpu")
    assert (made.transformers[0].kind, made.transformers[0].calls) == (FLUX, 4)
    assert (tmp_path / "plus" / MANIFEST).read_bytes() == (flux / "plus" / MANIFEST).read_bytes()
    with pytest.raises(InputError, match=r"calibrated from recorded calls: give calls, which tqdit\.record\(pipe\)"):
        tqdit.quantize(flux / "float", tmp_path / "none", recipe)
    tqdit.quantize(flux / "float", tmp_path / "dynamic", Recipe("dynamic"), device="cpu")
    assert tqdit.inspect(tmp_path / "dynamic")["preset"] == "dynamic"


def test_what_only_architectures_have_says_what_serves_other_classes(flux) -> None:
    for ask in (lambda: tqdit.sample(flux / "plus"), lambda: tqdit.compare(flux / "float", [flux / "plus"])):
        with pytest.raises(InputError, match="any other class of diffusers is quantized and compared by recorded cal"):
            ask()


def test_a_solution_of_recorded_calls_is_saved_without_a_scheduler(flux, tmp_path) -> None:
    solution = tqdit.load(flux / "plus", device="cpu").solution
    tqdit.save(solution, tmp_path / "again")
    assert tqdit.load(tmp_path / "again", device="cpu").solution.graph == solution.graph
    with pytest.raises(InputError, match="is its transformer alone, without scheduler and labels"):
        tqdit.save(solution, tmp_path / "other", scheduler=DDIMScheduler())
    assert not (tmp_path / "other").exists()


def test_calls_that_the_model_refuses_are_one_line(flux) -> None:
    model = ZOO[FLUX].build(0)
    call = ZOO[FLUX].call(seed=0, batch=1)
    call["img_ids"] = call["img_ids"][:1]
    with pytest.raises(InputError, match=f"the {FLUX} fails on the first recorded call: RuntimeError: "):
        tqdit.quantize(model, Recipe("plus"), calls=[call])


def test_prompts_are_refused_where_nothing_draws_images(flux, pipeline, tmp_path) -> None:
    calls = flux / "calls.safetensors"
    with pytest.raises(InputError, match="is a transformer alone; images are drawn by a pipeline"):
        compare_folders(flux / "float", [flux / "plus"], calls, prompts=["a"], device="cpu")
    shutil.copytree(pipeline / "float", tmp_path / "float")
    index = tmp_path / "float" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": [None, None]}))
    with pytest.raises(InputError, match="the pipeline 'float' has no vae to draw images with"):
        compare_folders(tmp_path / "float", [flux / "plus"], calls, prompts=["3"], device="cpu")


def test_damaged_weights_and_two_ways_at_once_are_one_line(flux, tmp_path) -> None:
    shutil.copytree(flux / "float", tmp_path / "float")
    weights = tmp_path / "float" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors is missing, truncated or damaged: "):
        tqdit.quantize(tmp_path / "float", tmp_path / "out", Recipe("dynamic"), device="cpu")
    with pytest.raises(InputError, match="give calls or scheduler"):
        tqdit.quantize(ZOO[FLUX].build(0), calls=flux / "calls.safetensors", scheduler=DDIMScheduler())
