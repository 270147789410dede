"""`bench/full_size.py`: a tiny random model and the bundled one go the whole way; its file, and the page's section."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from published_dit import PublishedDiT

from tqdit.architectures.dit_checkpoint import AS_PUBLISHED
from tqdit.architectures.shapes import shape_config
from tqdit.speed.random_weights import random_float

BENCH = Path(__file__).resolve().parent.parent / "bench"
RANDOM = ("--random", "DiT-S/8", "--blocks", "2", "--small-vae")
BUNDLED = ("--trained", "src/tqdit/data/fashion-dit")
TINY = (
    "--groups", "2", "--samples", "1", "--steps", "4", "--rounds", "1", "--candidates", "5", "--rows", "64",
    "--queries", "64", "--sampling-steps", "2", "--repeats", "1", "--batch", "2", "--images", "3", "--held-out", "1",
)  # fmt: skip
BITS = ("w8a8", "w6a6", "w4a8")
FIGURES = {
    "size_bytes", "size_ratio", "search_seconds", "load_seconds", "first_call_seconds", "images_per_second",
    "eps_sqnr_db", "psnr_db",
}  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import full_size

    return full_size


@pytest.fixture
def go(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The runs in the file after one with these options; its folders are in `tmp_path / "scratch"`."""
    monkeypatch.chdir(BENCH.parent)
    (tmp_path / "scratch").mkdir()

    def run(*options: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["full_size.py", str(tmp_path / "out.json"), *TINY, *options])
        script.chain(script.arguments(), tmp_path / "scratch")
        return read(tmp_path)

    return run


def read(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "out.json").read_text())["runs"]


def test_the_checkpoint_is_the_published_model(script: Any, tmp_path: Path) -> None:
    config = {**shape_config("DiT-S/8"), **AS_PUBLISHED, "num_layers": 2}
    model = random_float(config)
    count = script.write_checkpoint(model, tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(tmp_path / "a.pt", weights_only=True)["ema"]
    published = PublishedDiT(depth=2, width=384, heads=6, patch=8, channels=4, side=32, classes=1000)
    published.load_state_dict(state, strict=True)
    assert count == sum(p.numel() for name, p in published.named_parameters() if name != "pos_embed")
    x, t, y = torch.randn(2, 4, 32, 32), torch.tensor([3, 999]), torch.tensor([7, 1000])
    with torch.no_grad():
        assert torch.allclose(published(x, t, y), model(x, timestep=t, class_labels=y).sample, atol=1e-4)


@pytest.mark.long
def test_a_random_model(go: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    (run,) = go(*RANDOM)
    assert (run["model"], run["weights"], run["sampling"]["guidance"]) == ("DiT-2x384/8@32", "random", 1.5)
    drawn = [f"{stage} {name}" for name in ("float", *BITS) for stage in ("load", "draw")]
    quantized = [f"{stage} {bits}" for bits in BITS for stage in ("search", "save")]
    assert list(run["stages"]) == ["checkpoint", "convert", "calibration", *quantized, *drawn, "compare"]
    assert run["eps_difference_of_checkpoint"] == 0
    _, *rows = run["rows"]
    check_rows(rows, BITS)
    assert [row["fd_fashion"] for row in rows] == [None] * 3
    pipeline = DiTPipeline.from_pretrained(tmp_path / "scratch" / "w4a8")
    assert pipeline.transformer.config.quantization_config.weight_bits == 4
    assert pipeline.vae.config.latent_channels == 4


@pytest.mark.long
def test_a_trained_model_beside_it(go: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text('{"runs": [{"model": "another", "weights": "random"}]}')
    other, run = go(*BUNDLED, "--bits", "w6a6")
    assert other["model"] == "another"
    assert (run["weights"], run["sampling"]["guidance"]) == ("trained", 1.0)
    assert run["eps_difference_of_checkpoint"] == 0
    first, *rows = run["rows"]
    check_rows(rows, ("w6a6",))
    assert all(row["fd_fashion"] > 0 for row in (first, *rows)), "of its pixels, not of a random decoder's"


def check_rows(rows: list[dict[str, Any]], bits: tuple[str, ...]) -> None:
    """Complete, plausible, and smaller with fewer bits."""
    assert [row["bits"] for row in rows] == list(bits)
    for row in rows:
        assert {key for key in FIGURES if math.isfinite(row[key])} == FIGURES
        assert row["eps_sqnr_db"] > 15
    sizes = [row["size_ratio"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 0.31


@pytest.mark.long
def test_a_run_that_is_cut_keeps_what_it_has(
    go: Callable[..., list[dict[str, Any]]], script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "compare", cut)
    with pytest.raises(KeyboardInterrupt):
        go(*RANDOM, "--bits", "w8a8")
    (run,) = read(tmp_path)
    assert "compare" not in run["stages"]
    assert run["rows"][1]["images_per_second"] > 0
    page = pages(monkeypatch)([run])
    assert any("| W8A8 |" in line for line in page)
    assert "ε SQNR" not in "".join(page[4:])


def pages(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], list[str]]:
    monkeypatch.syspath_prepend(BENCH)
    from full_size_pages import section

    return section


def test_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {
        "model": "DiT-12x768/2@32", "weights": "trained", "parameters": 130_000_000,
        "command": "python bench/full_size.py",
        "training": {"shape": "DiT-B/2", "steps": 1200, "batch": 256, "seconds": 150.2, "device": "a GPU", "seed": 0},
        "environment": {"device": "a GPU", "torch": "2"},
        "recipe": {
            "preset": "plus", "groups": 10, "samples": 32, "steps": 250, "guidance": 1.5, "rounds": 3,
            "candidates": 100, "rows": 2048, "queries": 2048,
        },
        "sampling": {"steps": 50, "guidance": 1.0, "batch": 16},
        "stages": {"calibration": {"seconds": 12.34, "peak_rss_bytes": 3 * 2**30, "peak_gpu_bytes": 5 * 2**30}},
        "rows": [
            {"bits": "float", "dtype": "bfloat16", "size_bytes": 520e6, "images_per_second": 5.0, "fd_fashion": 9.5},
            {"bits": "w8a8", "size_bytes": 130e6, "size_ratio": 0.25, "images_per_second": 12.5,
             "resident_gpu_bytes": 2**29, "fd_fashion": 9.75, "eps_sqnr_db": 31.25, "psnr_db": None},
        ],
        "comparison": {"num": 320, "samples_per_group": 8},
        "eps_difference_of_checkpoint": 0.0,
    }  # fmt: skip
    text = "\n".join(pages(monkeypatch)([run]))
    assert "### DiT-12x768/2@32, trained weights, a GPU" in text
    assert "DiT-B/2 for Fashion-MNIST, trained by" in text
    assert "for 1200 steps of 256 images in 150 s on a GPU, seed 0; not shipped" in text
    assert "| calibration | 12.3 | 3.0 | 5.0 |" in text
    assert "| bfloat16, eager | 520.0 | – | 5.000 | – | – | 9.50 |" in text
    assert "| W8A8 | 130.0 | 0.250 | 12.500 | 0.50 | 31.2 | 9.75 |" in text


def test_there_is_no_section_without_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import full_size_pages

    monkeypatch.setattr(full_size_pages, "RESULTS", tmp_path)
    assert full_size_pages.full_size() == []
