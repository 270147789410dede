"""Situations with models of prompts: prompts that are given, missing, damaged, or of another model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from tiny import WrongError, filled, folder, inputs, load, normal, quantized, recipe, refusal, refused

import tqdit

TOKENS, WIDTH = 6, 16
SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "caption_channels": WIDTH, "cross_attention_dim": 64,
    "use_additional_conditions": False,
}  # fmt: skip
PIXART = "PixArtTransformer2DModel"
# With DiT's betas a sampling run of random weights would leave the range of the inputs that are compared.
SCHEDULE: dict[str, Any] = {"clip_sample": False, "beta_start": 1e-4, "beta_end": 4e-3}


def pixart(path: Path) -> Path:
    model = filled(PixArtTransformer2DModel, SIZES)
    with torch.no_grad():
        model.proj_out.weight.div_(4)
    return folder(path, model, DDIMScheduler(**SCHEDULE))


def tensors(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Two prompts of 3 and 6 tokens, and the unconditional one."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(TOKENS) < torch.tensor([[3], [TOKENS]])).long()
    embeds = torch.randn(3, TOKENS, width, generator=generator)
    return {
        "prompt_embeds": embeds[:2].clone(), "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds[2:].clone(), "negative_prompt_attention_mask": mask[1:].clone(),
    }  # fmt: skip


def written(path: Path, found: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file(found, path)
    return path


def served(work: Path) -> str:
    prompts = tqdit.Prompts.read(written(work / "prompts.safetensors", tensors()))
    path = quantized(work / "q", pixart(work / "float"), conditions=prompts)
    given = {**inputs(), **prompts.rows(torch.tensor([0, 1])), "return_dict": False}
    given.pop("class_labels")
    exact = PixArtTransformer2DModel.from_pretrained(work / "float" / "transformer").eval()
    with torch.no_grad():
        return normal(exact(**given)[0], load(path)(**given)[0])


def quantize_refused(source: Path, conditions: Any, *words: str) -> str:
    """The refusal of `quantize`, before any work."""
    stages: list[str] = []
    options: dict[str, Any] = {"device": "cpu", "report": lambda stage, _: stages.append(stage)}
    try:
        tqdit.quantize(source, source.parent / "q", recipe(), conditions=conditions, **options)
    except tqdit.InputError as error:
        return refusal(error, *words, stages=stages)
    raise WrongError("accepted")


def no_prompts(work: Path) -> str:
    return quantize_refused(pixart(work / "float"), None, PIXART, "prompts")


def other_width(work: Path) -> str:
    return quantize_refused(pixart(work / "float"), tqdit.Prompts.checked(tensors(width=WIDTH + 8)), str(WIDTH))


def prompts_for_classes(work: Path) -> str:
    return quantize_refused(folder(work / "float"), tqdit.Prompts.checked(tensors()), "prompts")


def unreadable(change: Callable[[dict[str, torch.Tensor]], Any], word: str) -> Callable[[Path], str]:
    """The file of prompts is refused by name, and so is the tensor."""

    def run(work: Path) -> str:
        found = tensors()
        change(found)
        path = written(work / "prompts.safetensors", found)
        return refused(lambda: tqdit.Prompts.read(path), "prompts.safetensors", word)

    return run


CASES: dict[str, Callable[[Path], str]] = {
    "a PixArt pipeline with prompts": served,
    "a PixArt pipeline without prompts": no_prompts,
    "prompts of another text encoder": other_width,
    "prompts for a model of classes": prompts_for_classes,
    "prompts with NaN": unreadable(lambda found: found["prompt_embeds"][1].fill_(torch.nan), "prompt_embeds"),
    "a prompt without a token": unreadable(lambda found: found["prompt_attention_mask"][0].zero_(), "prompt 0"),
    "prompts without the unconditional one": unreadable(
        lambda found: found.pop("negative_prompt_embeds"), "negative_prompt_embeds"
    ),
}
