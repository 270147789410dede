"""The demo, with the smallest settings that pass through every stage: on the bundled model where tests may be long."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tiny_dit import build_dit, write_pipeline
from tqdit.artifact import folder as artifact
from tqdit.cli.demo import NAMES, STAGES, run_demo
from tqdit.imaging.rows import GAP
from tqdit.quality import run_file
from tqdit.report import page as report_page
from tqdit.sources import resolve as resolving
from tqdit.sources.resolve import DATA, load_float, resolve
from tqdit.speed import cost
from tqdit.speed.memory_probe import Footprint

SMALL = {
    "groups": 2, "samples": 1, "steps": 4, "rounds": 1, "candidates": 5, "rows": 64, "queries": 64,
    "hessian": "published",  # which measures no sensitivity of the image: sampling runs with gradients
}  # fmt: skip
IMAGES = {"sample_size": 32, "patch_size": 4, "num_embeds_ada_norm": 10}


@pytest.fixture(params=["one block", pytest.param("bundled", marks=pytest.mark.long)])
def fashion(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fashion-dit`: the bundled model, or a random one of a single block with its images and classes."""
    if request.param == "one block":
        root = write_pipeline(tmp_path / "source", build_dit(num_layers=1, attention_head_dim=128, **IMAGES))
        shutil.copy(resolving.BUNDLED["fashion-dit"] / "model_index.json", root)
        monkeypatch.setitem(resolving.BUNDLED, "fashion-dit", root)


@pytest.mark.slow
@pytest.mark.usefixtures("fashion")
def test_demo_writes_what_the_readme_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "TOP", 2)  # charts take most of the time of a page
    monkeypatch.setattr(cost, "footprint", lambda request: Footprint(1_000_000, 3_000_000, None))
    told: list[str] = []
    result = run_demo(tmp_path, settings=SMALL, num=2, steps=2, samples=1, report=lambda stage, _: told.append(stage))
    untested = [stage for stage in STAGES if "other seeds" not in stage]  # for so few images
    assert list(dict.fromkeys(told)) == untested, "the total knows every stage"
    summary = json.loads((tmp_path / "summary.json").read_text())
    fields = {"name", "preset", "bits", "size_bytes", "calibration_seconds", "eps_sqnr_db", "psnr_db", "fd_fashion"}
    assert all(fields <= set(row) for row in summary["models"])
    assert [row["preset"] for row in summary["models"]] == [
        None,
        "plus (changed: hessian)",
        "paper",
        "plus (changed: hessian)",
    ]
    assert [row["bits"] for row in summary["models"]] == ["float32", "w8a8", "w8a8", "w4a8"]
    reference, eight, paper, four = summary["models"]
    assert reference["eps_sqnr_db"] is reference["psnr_db"] is reference["calibration_seconds"] is None
    assert eight["eps_sqnr_db"] > four["eps_sqnr_db"] > 0
    assert paper["eps_sqnr_db"] > 0
    assert four["size_bytes"] < eight["size_bytes"] < 0.27 * reference["size_bytes"]
    assert four["size_bytes"] == artifact.size_bytes(tmp_path / "fashion-dit-plus-w4a8")
    assert result.models[0].calibration_seconds == eight["calibration_seconds"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "The most sensitive sites" in page
    assert "Can the images be told" not in page, "the test wants 40 images"
    run, images = run_file.read(tmp_path / "run.safetensors")
    assert [row.name for row in run.parts[0].models] == list(NAMES)
    assert len(images) == 4
    assert all(row.sites_in_all == len(row.sites) for row in run.parts[0].models)
    with Image.open(tmp_path / "side-by-side.png") as picture:
        heights = (64 + GAP) * 4 + GAP
        assert picture.height == heights
        label = picture.width - (2 * (64 + GAP) + GAP)  # two images in a row
        labels = [picture.crop((0, top, label, top + 64)).tobytes() for top in range(GAP, heights - GAP, 64 + GAP)]
    assert len(set(labels)) == 4


def test_bundled_model_is_small_and_complete() -> None:
    source = resolve("fashion-dit")
    weights = source.folder / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 12e6
    assert sum(file.stat().st_size for file in (DATA / "fashion-classifier").iterdir()) <= 4e6
    assert source.labels[7] == "sneaker"
    model = load_float(source)
    assert (model.config.sample_size // model.config.patch_size) ** 2 == 256
    assert model.transformer_blocks[0].norm1.linear.weight.abs().sum() > 0, "trained: adaLN is no longer zero"
