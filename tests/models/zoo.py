"""Tiny models of many transformer classes of diffusers, with random weights, and calls of them.

`build` fills every parameter with numbers that matter: gates and final layers that training starts from zero would
hide what the layers before them do. `call` has the keyword arguments of one call, as a pipeline makes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import zoo_calls as calls
from torch import nn
from zoo_calls import LATENT, TEXT, Draw


@dataclass(frozen=True)
class Entry:
    """One class: the config of a tiny model, the arguments of a call of a batch, and the name of the time argument."""

    name: str
    config: Mapping[str, Any]
    arguments: Callable[[Draw, int], dict[str, Any]]
    timestep: str = "timestep"

    def build(self, seed: int = 0) -> nn.Module:
        """Make a model with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, self.name)(**self.config).eval()
            for name, parameter in model.named_parameters():
                _fill(name, parameter.data)
        return model

    def call(self, seed: int = 0, batch: int = 2) -> dict[str, Any]:
        """Return the keyword arguments of a call; `return_dict` is left to the caller."""
        generator = torch.Generator().manual_seed(seed)
        return self.arguments(lambda *shape: torch.randn(shape, generator=generator), batch)


def _fill(name: str, values: torch.Tensor) -> None:
    """Draw weights of unit gain, biases and tables about 0, and factors of norms about 1."""
    if values.ndim > 1:
        values.normal_().div_(values[0].numel() ** 0.5)
    else:
        values.normal_().mul_(0.1).add_(0 if name.endswith("bias") else 1)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
LAYERS = {"num_layers": 2}
FLUX = {**HEADS, **LAYERS, "num_single_layers": 2, "in_channels": 4, "joint_attention_dim": 32}
PIXELS = {**HEADS, **LAYERS, "in_channels": 4, "sample_size": 2 * LATENT, "patch_size": 2}

_ENTRIES = (
    Entry(
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12)},
        calls.flux1,
    ),
    Entry(
        "Flux2Transformer2DModel",
        {**FLUX, "timestep_guidance_channels": 32, "axes_dims_rope": (8, 8, 8, 8)},
        calls.flux2,
    ),
    Entry(
        "ChromaTransformer2DModel",
        {
            **FLUX,
            "axes_dims_rope": (8, 12, 12),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
        },
        lambda draw, batch: {**calls.flux(draw, batch), "attention_mask": torch.ones(batch, TEXT + LATENT**2)},
    ),
    Entry(
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            **LAYERS,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        calls.qwen,
    ),
    Entry(
        "SD3Transformer2DModel",
        {
            **PIXELS,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        calls.sd3,
    ),
    Entry(
        "PixArtTransformer2DModel",
        {**PIXELS, "cross_attention_dim": 64, "caption_channels": 32, "use_additional_conditions": False},
        calls.pixart,
    ),
    Entry(
        "WanTransformer3DModel",
        {
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 128,
            "rope_max_seq_len": 32,
        },
        calls.video,
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        {**HEADS, **LAYERS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": 32},
        calls.ltx,
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        {
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "out_channels": 4,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (8, 12, 12),
        },
        calls.hunyuan_video,
    ),
    Entry(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12],
            "axes_lens": [128, 32, 32],
        },
        calls.z_image,
        "t",
    ),
    Entry(
        "Lumina2Transformer2DModel",
        {
            **LAYERS,
            "sample_size": 2 * LATENT,
            "in_channels": 4,
            "hidden_size": 64,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 32,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (128, 32, 32),
            "cap_feat_dim": 32,
        },
        calls.lumina2,
    ),
    Entry(
        "SanaTransformer2DModel",
        {
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "sample_size": LATENT,
        },
        calls.sana,
    ),
    Entry(
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            "sample_size": 2 * LATENT,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 64,
        },
        lambda draw, batch: {**calls.image(draw, batch), "timestep": calls.times(batch)},
    ),
    Entry("DiTTransformer2DModel", {**PIXELS, "num_embeds_ada_norm": 10}, calls.dit),
    Entry(
        "CogVideoXTransformer3DModel",
        {
            **HEADS,
            **LAYERS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 32,
            "text_embed_dim": 32,
            "sample_width": 2 * LATENT,
            "sample_height": 2 * LATENT,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
        },
        calls.cogvideox,
    ),
    Entry(
        "HunyuanDiT2DModel",
        {
            **PIXELS,
            "num_layers": 4,
            "hidden_size": 64,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 32,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        calls.hunyuan_dit,
    ),
    Entry(
        "Krea2Transformer2DModel",
        {
            **LAYERS,
            "in_channels": 16,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 128,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (8, 12, 12),
        },
        calls.krea2,
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        {
            **HEADS,
            **LAYERS,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 64,
            "capacity_factors": 2.0,
        },
        calls.qwen,
    ),
)
ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
