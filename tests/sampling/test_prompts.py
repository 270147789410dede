"""Prompts from a safetensors file, and a text-to-image model that is sampled and calibrated under them."""

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from stubs import run
from torch import nn

from tqdit.calibration import trajectories
from tqdit.calibration.trajectories import collect
from tqdit.errors import InputError
from tqdit.imaging.generate import sample_batches
from tqdit.sampling.guidance import Sampling, arguments, predict
from tqdit.sampling.prompts import Prompts
from tqdit.sampling.trajectory import noise_generators

COUNT, LENGTH, WIDTH = 3, 5, 6
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def tensors(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(COUNT, LENGTH, dtype=torch.int64)
    mask[1, 3:] = 0
    return {
        "prompt_embeds": torch.randn(COUNT, LENGTH, WIDTH, generator=generator),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, LENGTH, WIDTH, generator=generator),
        "negative_prompt_attention_mask": torch.tensor([[1, 0, 0, 0, 0]]),
    } | changed


@pytest.fixture
def text_model() -> nn.Module:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
        cross_attention_dim=16, caption_channels=WIDTH, patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() if parameter.ndim > 1 else 9) ** -0.5)
    return model.eval().requires_grad_(False)


def test_rows_are_the_arguments_of_the_model() -> None:
    given = tensors()
    prompts = Prompts.checked(given)
    assert prompts.count == COUNT
    rows = prompts.rows(torch.tensor([1, 1, 2]))
    assert torch.equal(rows["encoder_hidden_states"], given["prompt_embeds"][[1, 1, 2]])
    assert torch.equal(rows["encoder_attention_mask"], given["prompt_attention_mask"][[1, 1, 2]])
    assert rows["added_cond_kwargs"] == {"resolution": None, "aspect_ratio": None}
    null = prompts.null(2, torch.device("cpu"))
    assert torch.equal(null["encoder_hidden_states"], given["negative_prompt_embeds"].expand(2, -1, -1))
    assert null["encoder_attention_mask"].tolist() == [[1, 0, 0, 0, 0]] * 2
    assert null["added_cond_kwargs"] == {"resolution": None, "aspect_ratio": None}


def test_sizes_of_the_image_are_rows_too() -> None:
    sizes = {"resolution": torch.tensor([[1024.0, 1024.0]]), "aspect_ratio": torch.ones(COUNT, 1)}
    prompts = Prompts.checked(tensors(**sizes))
    for inputs in (prompts.rows(torch.tensor([0, 2])), prompts.null(2, torch.device("cpu"))):
        assert inputs["added_cond_kwargs"]["resolution"].tolist() == [[1024, 1024]] * 2
        assert inputs["added_cond_kwargs"]["aspect_ratio"].tolist() == [[1], [1]]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = tensors(
        prompt_embeds=tensors()["prompt_embeds"].bfloat16(),
        prompt_attention_mask=tensors()["prompt_attention_mask"].bool(),
        negative_prompt_embeds=tensors()["negative_prompt_embeds"].expand(COUNT, -1, -1).contiguous(),
    )
    save_file(given, tmp_path / "prompts.safetensors")
    prompts = Prompts.read(tmp_path / "prompts.safetensors")
    rows = prompts.rows(torch.arange(COUNT))
    assert rows["encoder_hidden_states"].dtype == torch.float32
    assert torch.equal(rows["encoder_hidden_states"], given["prompt_embeds"].float())
    assert rows["encoder_attention_mask"].dtype == torch.int64
    assert prompts.null_embeds.shape == (1, LENGTH, WIDTH)


def broken(name: str, value: float) -> torch.Tensor:
    tensor = tensors()[name].float()
    tensor[0, 0] = value
    return tensor


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": torch.ones(1)}, "unknown tensor 'prompts'; legal are prompt_embeds, prompt_attention_mask, neg"),
        ({"prompt_embeds": torch.ones(3, 6)}, r"'prompt_embeds' has shape \(3, 6\), it needs \(prompts, tokens, chan"),
        ({"prompt_embeds": torch.ones(0, 5, 6)}, r"'prompt_embeds' has shape \(0, 5, 6\)"),
        ({"prompt_embeds": torch.ones(3, 5, 6).double()}, "'prompt_embeds' has dtype float64, legal are float16, bfl"),
        ({"prompt_embeds": broken("prompt_embeds", float("nan"))}, "'prompt_embeds' has NaN or Inf values"),
        ({"prompt_attention_mask": torch.ones(3, 4)}, r"'prompt_attention_mask' has shape \(3, 4\), it needs \(3, 5\)"),
        ({"prompt_attention_mask": broken("prompt_attention_mask", 2)}, "'prompt_attention_mask' has values other th"),
        ({"prompt_attention_mask": torch.zeros(3, 5)}, "'prompt_attention_mask' leaves no token of prompt 0"),
        ({"prompt_attention_mask": torch.ones(3, 5).cfloat()}, "'prompt_attention_mask' has dtype complex64"),
        ({"negative_prompt_embeds": torch.ones(2, 5, 6)}, r"needs \(1, 5, 6\) or \(3, 5, 6\)"),
        ({"negative_prompt_embeds": torch.ones(1, 4, 6)}, r"'negative_prompt_embeds' has shape \(1, 4, 6\)"),
        ({"negative_prompt_embeds": torch.randn(3, 5, 6)}, "'negative_prompt_embeds' has rows that differ"),
        ({"negative_prompt_attention_mask": torch.ones(5)}, r"'negative_prompt_attention_mask' has shape \(5,\)"),
        ({"resolution": torch.ones(1, 2)}, "'resolution' is given alone"),
        ({"resolution": torch.ones(1, 3), "aspect_ratio": torch.ones(1, 1)}, r"'resolution' has shape \(1, 3\)"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_it(tmp_path: Path, changed: dict, message: str) -> None:
    path = tmp_path / "prompts.safetensors"
    save_file(tensors(**changed), path)
    with pytest.raises(InputError, match=message) as refused:
        Prompts.read(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", list(tensors()))
def test_a_missing_tensor_is_named(name: str) -> None:
    given = tensors()
    del given[name]
    with pytest.raises(InputError, match=f"tensor '{name}' is missing; needed are prompt_embeds, "):
        Prompts.checked(given)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "prompts.safetensors")
    with pytest.raises(InputError, match=r"prompts\.safetensors is truncated or damaged"):
        Prompts.read(tmp_path / "prompts.safetensors")
    with pytest.raises(InputError, match=r"absent\.safetensors is missing"):
        Prompts.read(tmp_path / "absent.safetensors")


@torch.inference_mode()
def test_guidance_of_a_text_model(text_model) -> None:
    """The two halves of one call are those of two calls: masks and embeddings stay with their rows."""
    prompts, x, t = Prompts.checked(tensors()), torch.randn(2, 2, 4, 4), torch.tensor([10, 900])
    condition, null = arguments(prompts, torch.tensor([1, 2]), 3.0)
    found = predict(text_model, x, t, condition, null, 3.0)
    cond, uncond = (text_model(x, timestep=t, **inputs, return_dict=False)[0] for inputs in (condition, null))
    expected = torch.cat([uncond[:, :2] + 3 * (cond - uncond)[:, :2], cond[:, 2:]], 1)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("scheduler", [None, FLOW])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_text_model_is_calibrated_under_its_prompts(
    text_model, tiny_recipe, monkeypatch, scheduler: dict | None, bf16: bool
) -> None:
    monkeypatch.setattr(trajectories, "draws_in_bf16", lambda device: bf16)
    prompts, recipe = Prompts.checked(tensors()), tiny_recipe("plus", samples=3, trajectories=3, steps=8, groups=2)
    data = collect(text_model, scheduler, recipe, conditions=prompts)
    assert data.conditions is prompts
    assert set(data.labels.tolist()) == {0, 1, 2}
    assert data.group.bincount().tolist() == [3, 3]
    assert torch.isfinite(data.x).all()


def test_an_image_is_that_of_its_prompt(text_model) -> None:
    prompts, sampling = Prompts.checked(tensors()), Sampling("auto", 3)
    (found,) = sample_batches(text_model, FLOW, [2, 0], sampling, 4, [range(2)], conditions=prompts)
    for i, index in enumerate((2, 0)):
        *_, (_, x) = run(text_model, FLOW, sampling, torch.tensor([index]), noise_generators(4, [i]), prompts)
        assert torch.allclose(found[i], x[0], atol=1e-5)
    (other,) = sample_batches(text_model, FLOW, [1, 0], sampling, 4, [range(2)], conditions=prompts)
    assert not torch.allclose(other[0], found[0], atol=1e-3)
