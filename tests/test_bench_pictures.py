"""The pictures of the pages: labelled rows of images, and bars of the result files."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tiny_dit import build_dit, write_pipeline
from tqdit.imaging.rows import GAP, LABEL

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import side_by_side

    return side_by_side


def test_the_command_draws_and_says_how(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_pipeline(tmp_path / "model", build_dit(num_layers=1))
    out, said_in = tmp_path / "picture.png", tmp_path / "picture.json"
    small = ["groups=2", "samples=1", "steps=4", "rounds=0", "hessian=none", "rows=32", "queries=32"]
    options = ["--bits", "w8a8", "w4a8", "--num", "2", "--steps", "3", "--device", "cpu", "--set", *small]
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", str(model), str(out), "--json", str(said_in), *options])
    script.main()
    said = json.loads(said_in.read_text())
    assert said["psnr_db"]["W8A8"] > said["psnr_db"]["W4A8"]
    assert said["settings"]["set"] == small
    with Image.open(out) as made:
        assert made.height == 3 * (8 * 3 + GAP) + GAP
        labels = [made.crop((0, top, LABEL, top + 28)).tobytes() for top in (0, 28, 56)]
    assert len(set(labels)) == 3
