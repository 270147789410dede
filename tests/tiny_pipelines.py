"""Folders of tiny pipelines with a decoder, as diffusers writes them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import nn

TOKENS, WIDTH = 6, 16
QUIET = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 4e-3}


def pixart(**changed: Any) -> nn.Module:
    """A random PixArt whose every weight matters."""
    config = {
        "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "caption_channels": WIDTH, "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8,
        "use_additional_conditions": False, **changed,
    }  # fmt: skip
    model = PixArtTransformer2DModel(**config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if name.endswith("weight") else 0.3
        scale = scale / 4 if name.startswith("proj_out") else scale  # or sampling would not stay near the data
        nn.init.normal_(parameter, std=scale, generator=generator)
    return model.eval()


def write_pixart(folder: Path) -> Path:
    """Write a PixArt-Sigma pipeline without its text encoder, for images of 16 x 16 pixels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, **QUIET)
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": pixart(), "scheduler": scheduler}
    PixArtSigmaPipeline(**parts).save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int = 2) -> Path:
    """Write embeddings of prompts of different lengths."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(count, TOKENS, dtype=torch.int64)
    mask[0, 3:] = 0
    negative = torch.randn(1, TOKENS, WIDTH, generator=generator).expand(count, -1, -1)
    tensors = {
        "prompt_embeds": torch.randn(count, TOKENS, WIDTH, generator=generator),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative.contiguous(),
        "negative_prompt_attention_mask": torch.ones(count, TOKENS, dtype=torch.int64),
    }
    save_file(tensors, path)
    return path
