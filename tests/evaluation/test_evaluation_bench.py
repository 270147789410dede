"""`bench/evaluation.py` on a tiny model, and the page of its results, with result files and without."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("bench_evaluation", BENCH / "evaluation.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The writer of the page, which reads the result files of an empty folder."""
    monkeypatch.syspath_prepend(BENCH)
    import evaluation_pages
    import pages

    for module in (pages, evaluation_pages):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return evaluation_pages


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *words, "--json", str(out)])
    script.main()
    return json.loads(out.read_text())


def test_the_page_says_what_is_not_measured_and_shows_what_is(
    script, writer, tiny_dit, scheduler_config, tmp_path, monkeypatch
) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert writer.evaluation(page).count("Not measured yet: there is no `bench/results/evaluation") == 2
    root = tmp_path / "tiny"
    tiny_dit(num_layers=1, sample_size=32, patch_size=8).save_pretrained(root / "transformer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config))
    noise = torch.randint(0, 256, (30, 28, 28), dtype=torch.uint8).numpy().tobytes()
    header = b"".join(value.to_bytes(4, "big") for value in (2051, 30, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + noise)
    monkeypatch.setattr(script, "MODEL", str(root))
    monkeypatch.setattr(script, "PRESETS", ("plus",))
    monkeypatch.setattr(script, "BITS", ("w8a8",))
    settings = ["samples=1", "groups=2", "steps=4", "rounds=0", "candidates=4", 'hessian="none"', "rows=64"]
    words = ["models", "--num", "10", "--steps", "2", "--work", str(tmp_path / "work"), "--device", "cpu"]
    words += ["--real", str(tmp_path), "--set", *settings]
    found = run(script, monkeypatch, tmp_path / "evaluation-h200.json", *words)
    assert [row["name"] for row in found["evaluation"]["rows"]] == ["tiny", "plus-w8a8"]
    assert found["evaluation"]["protocol"]["reference"]["images"] == 30
    assert str(tmp_path) not in found["command"]
    monkeypatch.setattr(script, "POOLED", 12)
    monkeypatch.setattr(script, "SPATIAL", 9)
    timed = run(script, monkeypatch, tmp_path / "evaluation-scores-cpu.json", "scores", "--num", "50")
    assert timed["total_seconds"] == pytest.approx(sum(timed["seconds"].values()), abs=0.01)
    shown = writer.evaluation(page)
    assert "Not measured yet" not in shown
    assert "| model | FD | IS | prec. | recall | KD | images (s) |" in shown
    assert "| plus-w8a8 |" in shown
    assert "50 real and 50 drawn rows of 12 pooled and 9 spatial features" in shown
    with pytest.raises(ValueError, match=r"docs/evaluation\.md has the sections"):
        writer.evaluation("no sections")
