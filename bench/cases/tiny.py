"""A tiny random DiT on disk, a fast recipe for it, and what the situations share."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

import tqdit

NORMAL_DB = 30.0  # W8A8 on this model has about 40 dB
FAST: dict[str, Any] = {
    "groups": 4, "samples": 4, "steps": 8, "sampler": "ddim", "rows": 128, "queries": 64, "candidates": 8, "rounds": 1,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate",
}  # fmt: skip


class WrongError(Exception):
    """The situation has not ended as it should; the message says how."""


def dit(**config: Any) -> Any:
    return filled(DiTTransformer2DModel, SIZES | config)


def filled(kind: Any, config: dict[str, Any]) -> Any:
    """A float model with random weights, without the zeros that training starts from."""
    torch.manual_seed(0)
    model = kind(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


def folder(path: Path, model: nn.Module | None = None, scheduler: Any = None, vae: bool = False) -> Path:
    """A pipeline folder of `model`; with `vae` one that `DiTPipeline.from_pretrained` loads."""
    shutil.rmtree(path, ignore_errors=True)
    model, scheduler = model or dit(), scheduler or DDIMScheduler(clip_sample=False)
    if vae:
        decoder = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1)
        DiTPipeline(model, decoder, scheduler).save_pretrained(path)
    else:
        model.save_pretrained(path / "transformer")
        scheduler.save_pretrained(path / "scheduler")
    return path


def recipe(preset: str = "plus", bits: str = "w8a8", **settings: Any) -> tqdit.Recipe:
    return tqdit.Recipe(preset, bits, **FAST | settings)


def quantized(path: Path, source: Path, preset: str = "plus", conditions: Any = None, **settings: Any) -> Path:
    """The artifact `path` of the model `source`, made anew."""
    shutil.rmtree(path, ignore_errors=True)
    tqdit.quantize(source, path, recipe(preset, **settings), device="cpu", conditions=conditions)
    return path


def artifact(work: Path, vae: bool = False) -> Path:
    """An artifact of the unchanged model."""
    return quantized(work / "artifact", folder(work / "float", vae=vae))


def load(path: Path, backend: str = "auto") -> Any:
    return tqdit.load(path, backend=backend, device="cpu")


def load_float(path: Path) -> Any:
    return DiTTransformer2DModel.from_pretrained(path / "transformer").eval()


def inputs(batch: int = 2, t: int = 500) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.full((batch,), t),
        "class_labels": torch.arange(batch),
    }


@torch.no_grad()
def output(model: Any, **changed: Any) -> torch.Tensor:
    return model(**inputs() | changed, return_dict=False)[0].float()


def db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """SQNR in dB; infinite for equal tensors."""
    error = (reference.double() - actual.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / error))


def normal(reference: torch.Tensor, actual: torch.Tensor, least: float = NORMAL_DB) -> str:
    """The SQNR as text, or `WrongError` if it is less than `least`."""
    found = db(reference, actual)
    if not found >= least:
        raise WrongError(f"{found:.1f} dB")
    return f"{found:.1f} dB" if found < float("inf") else "equal"


def refused(run: Callable[[], Any], *words: str, stages: list[str] | None = None) -> str:
    """The one line of the `InputError` that `run` ends in, checked as `refusal` does."""
    try:
        run()
    except tqdit.InputError as error:
        return refusal(error, *words, stages=stages)
    raise WrongError("accepted")


def refusal(error: Exception, *words: str, stages: list[str] | None = None) -> str:
    """The one line of an error that is right: it has all `words`, and came before any stage of work began."""
    line = str(error)
    if "\n" in line:
        raise WrongError(f"a refusal of several lines: {line!r}")
    if missing := [word for word in words if word not in line]:
        raise WrongError(f"the refusal does not name '{missing[0]}': {line}")
    if stages:
        raise WrongError(f"refused only after {', '.join(dict.fromkeys(stages))}: {line}")
    return f"refused: {line}"
