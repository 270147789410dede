"""A model of flow matching from its training, or from a published checkpoint, to images and a comparison."""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_dit import euler, random_sit

import tqdit
from tqdit.architectures import dit_checkpoint
from tqdit.quality.compare import compare
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.trajectory import noise_generators
from tqdit.sources.export import convert_checkpoint

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_fashion_dit.py"
STEPS = Sampling(steps=4)


def train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that the training example makes of a few random images."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # its neighbours
    spec = importlib.util.spec_from_file_location("train_fashion_dit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 8}
    monkeypatch.setattr(script, "MODEL", {**script.MODEL, **sizes})
    monkeypatch.setattr(script, "FLOW", replace(script.FLOW, batch=16, warmup=1))
    data = torch.rand(40, 1, 32, 32) * 2 - 1, torch.arange(40) % 10
    args = argparse.Namespace(objective="flow", shape=None, steps=30, minutes=1.0, out=folder, seed=0)
    script.train_alone(args, data)
    return folder


@pytest.fixture(params=["trained", "converted"])
def sit(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a tiny model in diffusers' conventions of flow matching, of 32 x 32 pixels."""
    if request.param == "trained":
        return train(tmp_path / "trained", monkeypatch)
    monkeypatch.setattr(dit_checkpoint, "HEADS", {32: 2, **dit_checkpoint.HEADS})
    tensors = random_sit(channels=1, side=32, patch=8).state_dict()
    torch.save({"ema": tensors, "args": argparse.Namespace(model="SiT", num_classes=10)}, tmp_path / "official.pt")
    convert_checkpoint(tmp_path / "official.pt", tmp_path / "converted")
    return tmp_path / "converted"


def test_quantize_sample_compare(sit: Path, tmp_path: Path, tiny_recipe: Callable[..., Any]) -> None:
    presets = ("plus", "paper")
    for preset in presets:
        tqdit.quantize(sit, tmp_path / preset, tiny_recipe(preset, steps=10, rounds=1, sampler="flow"))
    images = {model: tqdit.sample(model, [1, 4], num=2, sampling=STEPS, seed=3) for model in (sit, tmp_path / "plus")}
    exact, found = images.values()
    assert exact.shape == (2, 1, 32, 32)
    assert 0 < (found - exact).square().mean() < 1e-2 * exact.square().mean()
    table = compare(sit, [tmp_path / preset for preset in presets], num=2, sampling=STEPS, samples=1, cost=False)
    assert table.settings["sampler"] == "flow"
    for row in table.models:
        figures = row.figures()
        assert figures["eps_sqnr_db"] > 15
        assert figures["psnr_db"] > 20
        assert (figures["fd_fashion"] is not None) == (sit.name == "trained"), "its classes are named"


def test_a_converted_sit_draws_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own images are the published model's, by the same steps of time."""
    monkeypatch.setattr(dit_checkpoint, "HEADS", {32: 2, **dit_checkpoint.HEADS})
    model = random_sit(channels=1, side=32, patch=8)
    torch.save({"ema": model.state_dict(), "args": {"model": "SiT", "num_classes": 10}}, tmp_path / "official.pt")
    found = tqdit.sample(tmp_path / "official.pt", [3, 7], num=2, sampling=Sampling(steps=6, guidance=1.0), seed=5)
    noise = torch.cat([torch.randn(1, 1, 32, 32, generator=g) for g in noise_generators(5, range(2))])
    sigmas = [*torch.linspace(1, 0.001, 6).tolist(), 0]  # diffusers': 1/1000 is the last before the data
    expected = euler(model, noise, torch.tensor([3, 7]), 1 - torch.tensor(sigmas))
    assert torch.allclose(found, expected.clamp(-1, 1), rtol=0, atol=1e-4)
