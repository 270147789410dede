"""The demo on the bundled model, with the smallest settings that pass through every stage."""

import json
from pathlib import Path

import pytest

from tqdit.artifact import folder as artifact
from tqdit.cli.demo import STAGES, run_demo
from tqdit.sources.resolve import DATA, load_float, resolve
from tqdit.speed import cost
from tqdit.speed.memory_probe import Footprint

SMALL = {
    "groups": 2, "samples": 1, "steps": 4, "rounds": 1, "candidates": 5, "rows": 64, "queries": 64,
    "hessian": "published",  # which measures no sensitivity of the image: sampling runs with gradients
}  # fmt: skip


@pytest.mark.slow
def test_demo_writes_what_the_readme_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "footprint", lambda request: Footprint(1_000_000, 3_000_000, None))
    told: list[str] = []
    result = run_demo(tmp_path, settings=SMALL, num=2, steps=2, samples=1, report=lambda stage, _: told.append(stage))
    assert list(dict.fromkeys(told)) == list(STAGES), "the total knows every stage"
    summary = json.loads((tmp_path / "summary.json").read_text())
    fields = {"name", "preset", "bits", "size_bytes", "calibration_seconds", "eps_sqnr_db", "psnr_db", "fd_fashion"}
    assert all(fields <= set(row) for row in summary["models"])
    assert [row["preset"] for row in summary["models"]] == [None, *2 * ["plus (changed: hessian)"]]
    assert [row["bits"] for row in summary["models"]] == ["float32", "w8a8", "w6a6"]
    reference, eight, six = summary["models"]
    assert reference["eps_sqnr_db"] is reference["psnr_db"] is reference["calibration_seconds"] is None
    assert eight["eps_sqnr_db"] > six["eps_sqnr_db"] > 0
    assert six["size_bytes"] < eight["size_bytes"] < 0.27 * reference["size_bytes"]
    assert six["size_bytes"] == artifact.size_bytes(tmp_path / "fashion-dit-w6a6")
    assert result.models[0].calibration_seconds == eight["calibration_seconds"] > 0
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "side-by-side.png").read_bytes().startswith(b"\x89PNG")


def test_bundled_model_is_small_and_complete() -> None:
    source = resolve("fashion-dit")
    weights = source.folder / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 12e6
    assert sum(file.stat().st_size for file in (DATA / "fashion-classifier").iterdir()) <= 4e6
    assert source.labels[7] == "sneaker"
    model = load_float(source)
    assert (model.config.sample_size // model.config.patch_size) ** 2 == 256
    assert model.transformer_blocks[0].norm1.linear.weight.abs().sum() > 0, "trained: adaLN is no longer zero"
