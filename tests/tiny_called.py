"""Tiny transformers of diffusers, what they are called with, and pipelines that call them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

TOKENS, PROMPT, WIDTH = 16, 6, 16


def flux(**changed: Any) -> nn.Module:
    config = {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8), **changed,
    }  # fmt: skip
    return FluxTransformer2DModel(**config).eval()


def z_image() -> nn.Module:
    config = {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 1,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": WIDTH, "axes_dims": [8, 4, 4],
        "axes_lens": [64, 32, 32],
    }  # fmt: skip
    return ZImageTransformer2DModel(**config).eval()


def flux_arguments(t: float, prompt: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a call at time t, in [0, 1], under one of several prompts."""
    noise = torch.Generator().manual_seed(int(t * 1000) + 1000 * prompt)
    words = torch.Generator().manual_seed(prompt)
    ids = torch.zeros(TOKENS, 3)
    ids[:, 1], ids[:, 2] = torch.arange(TOKENS) // 4, torch.arange(TOKENS) % 4
    return {
        "hidden_states": torch.randn(1, TOKENS, 4, generator=noise).to(dtype),
        "encoder_hidden_states": torch.randn(1, PROMPT, WIDTH, generator=words).to(dtype),
        "pooled_projections": torch.randn(1, WIDTH, generator=words).to(dtype),
        "timestep": torch.tensor([t]),
        "img_ids": ids,
        "txt_ids": torch.zeros(PROMPT, 3),
        "joint_attention_kwargs": {"scale": 0.5},
        "return_dict": False,
    }


class Pipeline:
    """A pipeline as far as recording sees one: its components, and sampling that changes its latents in place."""

    def __init__(self, **components: Any) -> None:
        self.components = components

    def __getattr__(self, name: str) -> Any:
        return self.components[name]

    def __call__(self, prompt: int = 0, steps: int = 4, boundary: float = 0.0) -> torch.Tensor:
        """Sample; times below `boundary` are for the second transformer."""
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        arguments = flux_arguments(1.0, prompt)
        latents = arguments["hidden_states"]
        with torch.inference_mode():
            for t in scheduler.timesteps:
                model = self.transformer if t / 1000 >= boundary else self.transformer_2
                arguments["timestep"] = t.expand(1) / 1000
                velocity = model(**arguments)[0]
                latents.copy_(scheduler.step(velocity, t, latents)[0])
        return latents


def stub(**components: Any) -> Any:
    return Pipeline(**{"transformer": flux(), "scheduler": SimpleNamespace(), **components})


def decoder() -> nn.Module:
    """Return a decoder for the latents of the tiny FLUX, of 2 x 2 pixels for each."""
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=1, norm_num_groups=1, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def write_flux(folder: Path, vae: nn.Module | None = None) -> Path:
    """Write a FLUX pipeline, by default without a decoder, with text encoders of 20 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    words = folder.parent / "words"
    words.mkdir()
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (words / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]
    t5 = T5Config(vocab_size=len(pieces), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    clip_words = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77)
    t5_words = T5TokenizerFast(tokenizer_object=Tokenizer(Unigram(pieces, unk_id=2)), extra_ids=0, model_max_length=512)
    FluxPipeline(
        transformer=flux(guidance_embeds=True), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=CLIPTextModel(clip), tokenizer=clip_words, text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_words,
    ).save_pretrained(folder)  # fmt: skip
    return folder
