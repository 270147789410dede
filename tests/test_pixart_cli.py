"""A PixArt pipeline and a file of prompts through the command line, and from there into diffusers."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file

import tqdit
from tiny_pipelines import write_pixart, write_prompts
from tqdit.cli.main import main

TINY = ("--groups", "2", "--samples", "2", "--steps", "6", "--rounds", "1", "--set", "candidates=12")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `tqdit ARGS`, which must end with the exit code 0; returns its standard output."""

    def call(*args: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["tqdit", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert not stop.value.code, captured.err
        return captured.out

    return call


def test_from_a_pipeline_to_images(run: Callable[..., str], tmp_path: Path) -> None:
    model, prompts = write_pixart(tmp_path / "tiny-pixart"), write_prompts(tmp_path / "prompts.safetensors")
    out = tmp_path / "w8a8"
    said = run("quantize", model, "-o", out, "--prompts", prompts, *TINY)
    assert f"tqdit compare {model} {out} --prompts {prompts}" in said

    found = json.loads(run("inspect", out, "--json", "-"))
    sites = {site["name"]: site for site in found["sites"]}
    assert sites["transformer_blocks.0.attn1.key"]["groups"] == 2
    assert sites["transformer_blocks.0.attn2.key"]["groups"] == 1, "a prompt does not change with the timestep"
    assert "PixArt" in run("inspect", out)

    drawn = ("--steps", "2", "--num", "2", "--prompts", prompts)
    assert "2 images" in run("sample", out, "-o", tmp_path / "grid.png", *drawn)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")

    result = tmp_path / "compare.json"
    said = run("compare", model, out, *drawn, "--samples", "1", "--no-cost", "--json", result)
    (row,) = [row for row in json.loads(result.read_text())["models"] if row.get("eps_sqnr_db") is not None]
    assert row["eps_sqnr_db"] > 20
    assert row["psnr_db"] > 20
    assert "w8a8" in said
    check_in_diffusers(out, load_file(prompts))
    card = (out / "README.md").read_text()
    assert "DiTPipeline" not in card, "the pipeline is of another class"
    assert re.search(r"import (PixArtSigmaPipeline|DiffusionPipeline)\n", card)


def check_in_diffusers(out: Path, prompts: dict[str, torch.Tensor]) -> None:
    """The artifact is a pipeline of its own class, and it draws."""
    pipe = PixArtSigmaPipeline.from_pretrained(out, tokenizer=None, text_encoder=None)
    assert pipe.transformer.quantization_backend == tqdit.load(out).quantization_backend
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        **prompts, negative_prompt=None, num_inference_steps=2, height=16, width=16, use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()
    assert images.std() > 0
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline"
    assert index["transformer"] == ["diffusers", "PixArtTransformer2DModel"]
