"""A tiny DiT whose every weight matters, a recipe that takes a second, and a pipeline folder of the model."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from tqdit.recipe import Recipe

GROUPS = 4
LABELS = [f"class {i}" for i in range(10)]
# Little noise, so that the trajectories of a random model stay in range.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 4e-3,
    "clip_sample": False,
}


def build_dit(seed: int = 0, **config: Any) -> nn.Module:
    """A random DiT without the zero initialisation of adaLN and final layers, which would hide every error."""
    sizes = {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8,
        "patch_size": 2, "in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    model = DiTTransformer2DModel(**sizes | config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            gain = 2.0 if "norm1.linear" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * fan_in**-0.5)
    return model.eval().requires_grad_(False)


def build_recipe(preset: str = "paper", bits: str = "w8a8", **overrides: Any) -> Recipe:
    tiny = {
        "groups": GROUPS, "samples": 4, "steps": 20, "rows": 256, "queries": 256, "candidates": 20, "rounds": 2,
    }  # fmt: skip
    return Recipe(preset, bits, **tiny | overrides)


def write_pipeline(root: Path, model: nn.Module) -> Path:
    model.save_pretrained(root / "transformer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    labels = {str(i): label for i, label in enumerate(LABELS)}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": labels}))
    return root
