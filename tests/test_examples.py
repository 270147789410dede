"""Every example runs to a model that the product loads; sizes and steps are tiny."""

import gzip
import importlib.util
import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

import tqdit
from tiny_pipelines import write_pixart, write_prompts
from tqdit.quality import features
from tqdit.sources.resolve import load_float, resolve

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRAINING = {
    "train_fashion_dit.py", "train_colour_dit.py", "train_small_models.py", "small_models.py", "colour_data.py",
    "dit_training.py",
}  # fmt: skip
TINY = {"groups": 2, "samples": 2, "steps": 6, "rounds": 1, "candidates": 12, "rows": 64, "queries": 64}


def imported(name: str) -> ModuleType:
    """An example as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The training example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return imported("train_fashion_dit")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example as a user does, but with a tiny recipe and on the CPU; returns its standard output."""

    def call(name: str, *arguments: str | Path, **constants: object) -> str:
        module = imported(name)
        constants = {"RECIPE": tqdit.Recipe("plus", "w8a8", **TINY), "DEVICE": "cpu", **constants}
        for constant in constants.keys() & vars(module).keys():
            monkeypatch.setattr(module, constant, constants[constant])
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


def test_quantizing_in_memory(run: Callable[..., str], pipeline: Path, tmp_path: Path) -> None:
    said = run("quantize_in_memory", pipeline, tmp_path / "w8a8")
    (error,) = re.findall(r"relative error of the output: (\S+)", said)
    assert 0 < float(error) < 0.1
    assert "loaded by diffusers, the same output" in said
    assert tqdit.inspect(tmp_path / "w8a8")["bits"] == "w8a8"
    assert resolve(tmp_path / "w8a8").scheduler["_class_name"] == "DDIMScheduler"


def test_calibrating_on_own_states(run: Callable[..., str], pipeline: Path, tmp_path: Path) -> None:
    said = run("own_calibration_states", pipeline, tmp_path / "own", IMAGES=4, STEPS=4)
    assert said.count("DiTTransformer2DModel") == 2
    for bits in ("w8a8", "w6a6"):
        assert tqdit.inspect(tmp_path / f"own-{bits}")["bits"] == bits
        assert resolve(tmp_path / f"own-{bits}").scheduler["_class_name"] == "DPMSolverMultistepScheduler"


def test_quantizing_a_whole_pipeline(run: Callable[..., str], tmp_path: Path) -> None:
    model, prompts = write_pixart(tmp_path / "tiny-pixart"), write_prompts(tmp_path / "prompts.safetensors")
    said = run("whole_pipeline", model, prompts, tmp_path / "w8a8", STEPS=2)
    assert "2 images" in said
    assert [Image.open(tmp_path / f"w8a8-{i}.png").size for i in range(2)] == [(16, 16)] * 2


def test_examples_are_short_and_use_the_public_interface() -> None:
    names = [path for path in EXAMPLES.glob("*.py") if path.name not in TRAINING]
    assert len(names) == 3
    for path in names:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 60
        assert "from tqdit" not in text
        assert "import tqdit." not in text


def write_split(folder: Path, split: str, count: int) -> None:
    """Images and labels in the four original files' idx format."""
    pixels = torch.randint(0, 256, (count, 28 * 28), dtype=torch.uint8).numpy().tobytes()
    labels = (torch.arange(count) % 10).to(torch.uint8).numpy().tobytes()
    images = struct.pack(">IIII", 2051, count, 28, 28) + pixels
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">II", 2049, count) + labels))


@pytest.mark.long
def test_training_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # would outlive the test
    monkeypatch.setattr(script, "BUNDLED", replace(script.BUNDLED, batch=2))
    monkeypatch.setattr(script, "SAMPLINGS", (("DDIM", 1, 1.5), ("DDPM", 1, 1.5)))
    data = tmp_path / "data"
    data.mkdir()
    write_split(data, "train", 40)
    write_split(data, "t10k", 40)
    report, picture = tmp_path / "report.json", tmp_path / "grid.png"
    arguments = ["--steps", "3", "--classifier-epochs", "1", "--samples", "80", "--device", "cpu"]
    places = ["--data", data, "--out", tmp_path / "out", "--report", report, "--picture", picture]
    monkeypatch.setattr(script, "SAMPLING_BATCH", 80)
    monkeypatch.setattr(sys, "argv", ["train_fashion_dit.py", *arguments, *map(str, places)])
    script.main()

    found = json.loads(report.read_text())
    assert found["training"]["steps"] == 3
    assert [row["sampler"] for row in found["samples"]] == ["DDIM", "DDPM"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    model = load_float(resolve(tmp_path / "out" / "fashion-dit"))
    assert model.config.out_channels == 2
    copies = [block.norm1.emb.timestep_embedder.linear_1.weight for block in model.transformer_blocks]
    assert all(torch.equal(copy, copies[0]) for copy in copies), "one embedder, as published DiT has"
    features.load_fashion_classifier("cpu", tmp_path / "out" / "fashion-classifier" / "classifier.safetensors")


def test_training_a_published_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> None:
    monkeypatch.setattr(script, "SHORT", replace(script.SHORT, batch=2))
    write_split(tmp_path, "train", 40)
    out = tmp_path / "out"
    arguments = ["--shape", "DiT-S/8", "--steps", "3", "--device", "cpu", "--data", tmp_path, "--out", out]
    monkeypatch.setattr(sys, "argv", ["train_fashion_dit.py", *map(str, arguments)])
    script.main()

    report = json.loads((out / "training.json").read_text())
    assert (report["shape"], report["steps"], report["batch"]) == ("DiT-S/8", 3, 2)
    source = resolve(out)
    assert source.labels[9] == "ankle boot"
    model = load_float(source)
    assert (len(model.transformer_blocks), model.config.patch_size, model.config.in_channels) == (12, 8, 1)
    assert {block.norm1.emb.time_proj.downscale_freq_shift for block in model.transformer_blocks} == {0}
    assert model.proj_out_2.weight.abs().max() > 0, "it was trained"


def train_sit(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, steps: int, *arguments: str) -> Path:
    """The folder of a flow-matching model after some steps."""
    data = out.with_name("data")
    data.mkdir()
    write_split(data, "train", 40)
    places = ["--steps", str(steps), "--device", "cpu", "--data", str(data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_fashion_dit.py", *arguments, *places])
    script.main()
    return out


def test_training_by_flow_matching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> None:
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 8}
    monkeypatch.setattr(script, "MODEL", {**script.MODEL, **sizes})
    monkeypatch.setattr(script, "FLOW", replace(script.FLOW, batch=4))
    out = train_sit(script, monkeypatch, tmp_path / "out", 3, "--objective", "flow")

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
    assert (scheduler.config.shift, scheduler.config.num_train_timesteps) == (1.0, 1000)
    report = json.loads((out / "training.json").read_text())
    assert (report["objective"], report["steps"], report["batch"]) == ("flow", 3, 4)
    assert sorted(path.name for path in out.iterdir()) == ["id2label.json", "scheduler", "training.json", "transformer"]
    source = resolve(out)
    assert source.labels[9] == "ankle boot"
    model = load_float(source)
    assert (len(model.transformer_blocks), model.config.out_channels) == (2, 1)
    assert model.proj_out_2.weight.abs().max() > 0, "it was trained"


def test_a_sit_shape_is_trained_by_flow_matching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    monkeypatch.setattr(script, "SHORT", replace(script.SHORT, batch=2))
    out = train_sit(script, monkeypatch, tmp_path / "out", 1, "--shape", "SiT-S/8")
    model = load_float(resolve(out))
    assert (len(model.transformer_blocks), model.config.patch_size, model.config.out_channels) == (12, 8, 1)
    assert {block.norm1.emb.time_proj.downscale_freq_shift for block in model.transformer_blocks} == {0}


def test_the_flow_loss_is_that_of_the_velocity(script: ModuleType) -> None:
    """A model that inverts the state at the timestep it is given makes no error, and drops of labels are a tenth."""
    images, labels = torch.rand(1000, 1, 4, 4) * 2 - 1, torch.arange(1000) % 10
    asked = []

    def exact(x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        asked.append((timestep, class_labels))
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(x - images) / sigma)  # x = (1 - sigma) x0 + sigma noise

    assert script.loss_of("flow", 10, images.device)(exact, images, labels)["velocity"] < 1e-4
    ((timestep, used),) = asked
    assert timestep.min() >= 0
    assert 990 < timestep.max() <= 1000
    assert 50 < (used == 10).sum() < 150
    assert torch.equal(used[used != 10], labels[used != 10])


@pytest.mark.parametrize("arguments", [["--shape", "DiT-B/2"], ["--objective", "flow"]])
def test_another_model_does_not_replace_the_bundled_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: ModuleType, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_fashion_dit.py", *arguments])
    with pytest.raises(SystemExit):
        script.main()
    assert "need --out" in capsys.readouterr().err


def test_missing_data_is_named(tmp_path: Path, script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz is missing"):
        script.read_split(tmp_path, "train", "cpu")
