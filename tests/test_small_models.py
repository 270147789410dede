"""Small FLUX and Z-Image models: they are called as diffusers' pipelines call them, and a rehearsal trains them."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import tqdit
from test_examples import write_split

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["flux", "z-image"]
STEPS, GUIDANCE = 3, 2.5


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import an example by name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def random_transformer(models: ModuleType, name: str) -> nn.Module:
    """A tiny model without parameters of 0 or 1, which would hide errors."""
    family, generator = models.FAMILIES[name], torch.Generator().manual_seed(0)
    model = family.transformer(**{**family.config, **family.tiny})
    with torch.no_grad():
        for parameter in model.parameters():
            centre, fan_in = (0.0, parameter.shape[-1]) if parameter.ndim > 1 else (1.0, 25)
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model.eval().requires_grad_(False)


def pipeline(models: ModuleType, name: str) -> object:
    """A tiny pipeline of random parameters."""
    prompts = torch.randn(11, 16, 64, generator=torch.Generator().manual_seed(1))
    return models.SmallPipeline(random_transformer(models, name), FlowMatchEulerDiscreteScheduler(1000), prompts)


def by_diffusers(name: str, pipe: object, labels: Tensor, seed: int) -> Tensor:
    """The images [N, 1, 32, 32] that diffusers' own pipeline makes of the same parts."""
    pytest.importorskip("transformers", reason="diffusers' pipelines import it")
    from diffusers import FluxPipeline, ZImagePipeline

    absent = {"vae": None, "text_encoder": None, "tokenizer": None}
    noise = torch.randn(len(labels), 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    prompts, null = pipe.prompts[labels], pipe.prompts[10].expand(len(labels), -1, -1)
    size = {"height": 256, "width": 256, "num_inference_steps": STEPS, "output_type": "latent"}
    if name == "z-image":
        made = ZImagePipeline(scheduler=pipe.scheduler, transformer=pipe.transformer, **absent)
        made.set_progress_bar_config(disable=True)
        texts = {"prompt_embeds": list(prompts), "negative_prompt_embeds": list(null)}
        return made(latents=noise, guidance_scale=GUIDANCE - 1, **texts, **size).images
    made = FluxPipeline(
        scheduler=pipe.scheduler, transformer=pipe.transformer, text_encoder_2=None, tokenizer_2=None, **absent
    )
    made.set_progress_bar_config(disable=True)
    texts = {
        "prompt_embeds": prompts,
        "pooled_prompt_embeds": prompts.mean(dim=1),
        "negative_prompt_embeds": null,
        "negative_pooled_prompt_embeds": null.mean(dim=1),
    }
    packed = FluxPipeline._pack_latents(noise, len(labels), 1, 32, 32)
    images = made(latents=packed, true_cfg_scale=GUIDANCE, **texts, **size).images
    return FluxPipeline._unpack_latents(images, 256, 256, 8)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_the_pipeline_of_diffusers(name: str, example: Callable[[str], ModuleType]) -> None:
    pipe, labels = pipeline(example("small_models"), name), torch.tensor([4, 7])
    images = pipe(labels, STEPS, GUIDANCE, seed=3)
    assert images.std() > 0.1, "there is an image"
    # Z-Image's pipeline rounds its sigmas otherwise.
    torch.testing.assert_close(images, by_diffusers(name, pipe, labels, seed=3).clamp(-1, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_training_computes_the_velocity_of_the_pipeline(name: str, example: Callable[[str], ModuleType]) -> None:
    models = example("small_models")
    family, pipe, generator = models.FAMILIES[name], pipeline(models, name), torch.Generator().manual_seed(2)
    images, sigma = torch.randn(3, 1, 32, 32, generator=generator), torch.tensor([0.1, 0.5, 0.9])
    prompts = pipe.prompts[:3]
    trained = family.velocity(pipe.transformer, images, sigma, prompts)
    called = family.guided(pipe.transformer, images, 1000 * sigma, prompts, prompts, 1.0)
    assert trained.std() > 0.1
    torch.testing.assert_close(trained, called, rtol=0, atol=1e-4 * float(called.std()))


@pytest.mark.parametrize("name", NAMES)
def test_a_rehearsal_of_the_training(
    name: str, example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, models = example("train_small_models"), example("small_models")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # would outlive the test
    monkeypatch.setattr(script, "STEPS", 1)
    write_split(tmp_path, "train", 40)
    out = tmp_path / "out"
    size = ["--steps", "2", "--tiny", "--batch", "4", "--samples", "80", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train", name, "--data", str(tmp_path), "--out", str(out), *size])
    script.main()

    report = json.loads((out / "training.json").read_text())
    assert (report["model"], report["steps"], report["batch"], report["samples"]["images"]) == (name, 2, 4, 80)
    files = ["prompts.safetensors", "samples.png", "scheduler", "training.json", "transformer"]
    assert sorted(path.name for path in out.iterdir()) == files
    pipe = models.SmallPipeline.from_pretrained(out)
    assert isinstance(pipe.transformer, models.FAMILIES[name].transformer)
    for ending in models.FAMILIES[name].zeros:
        layers = [layer for at, layer in pipe.transformer.named_modules() if at.endswith(ending)]
        assert layers, f"there is a layer {ending}"
    last = [layer for at, layer in pipe.transformer.named_modules() if at.endswith(("proj_out", "2-1.linear"))][-1]
    assert last.weight.abs().max() > 0, "it was trained"
    assert pipe(torch.arange(2), steps=1).shape == (2, 1, 32, 32)


def test_another_model_is_refused(example: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match="Linear is none of flux, z-image"):
        example("small_models").family_of(nn.Linear(1, 1))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_quality_is_measured(
    name: str, example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = example("small_models")
    pipeline(models, name).save(tmp_path / "model")
    spec = importlib.util.spec_from_file_location("bench_small_models", ROOT / "bench/small_models.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_small_models", bench)  # its dataclasses look there
    spec.loader.exec_module(bench)
    tiny = {"groups": 2, "samples": 2, "rows": 32, "rounds": 0, "candidates": 4}
    monkeypatch.setattr(bench.tqdit, "Recipe", partial(tqdit.Recipe, **tiny))
    monkeypatch.setattr(bench, "GROUPS", 2)
    out = tmp_path / "result.json"
    size = ["--images", "40", "--batch", "20", "--steps", "2", "--recorded", "1", "--per-group", "1", "--bits", "w8a8"]
    monkeypatch.setattr(sys, "argv", ["x", str(out), "--model", str(tmp_path / "model"), "--device", "cpu", *size])
    bench.main()

    found = json.loads(out.read_text())
    rows = found["models"]
    assert {"bf16", "plus w8a8", "dynamic w8a8"} <= set(rows)
    assert found["settings"]["held_out_calls"] == 2, "one call of each of two groups"
    for row in rows.values():
        assert row["sqnr_db"] > 20
        assert len(row["sqnr_db_by_group"]) == 2
        assert min(row["sqnr_db_by_group"]) <= row["sqnr_db"] <= max(row["sqnr_db_by_group"])
        assert 0 <= row["class_agreement"] <= 1
    assert rows["plus w8a8"]["layers"]["weight_only"] > 0
    assert sum(rows["plus w8a8"]["layers"]["quantized"].values()) > 0
    assert set(found["verdicts"]) == set(rows) - {"bf16"}
