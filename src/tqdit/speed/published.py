"""Published shapes of transformers, to measure speed on with random weights: configs, tokens and calls.

A config is that of the published `transformer/config.json`. Sizes of calls are the pipelines' defaults.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdit.errors import InputError, suggestion
from tqdit.speed import published_calls as calls
from tqdit.speed.published_calls import Size

DEPTHS = ("num_layers", "num_single_layers", "num_refiner_layers", "n_layers", "n_refiner_layers")  # keys of configs


@dataclass(frozen=True)
class Published:
    """A published model: its diffusers class, config, and the size and arguments of one call of one sample."""

    name: str
    kind: str
    config: Mapping[str, Any]
    size: Size
    arguments: Callable[[calls.Draw, Mapping[str, Any], Size], dict[str, Any]]
    timestep: str = "timestep"

    def shortened(self, blocks: int | None) -> dict[str, Any]:
        """Return the config with at most `blocks` repeated blocks of each kind; None keeps all."""
        config = {"_class_name": self.kind, **self.config}
        if blocks is not None:
            config |= {key: min(config[key], blocks) for key in DEPTHS if key in config}
        return config


# fmt: off
HEADS = {"num_attention_heads": 24, "attention_head_dim": 128}
AXES = {"axes_dims_rope": (16, 56, 56)}
WAN = {
    "attention_head_dim": 128, "patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}
IMAGE = (1, 64, 64)  # patches of 16 pixels of an image of 1024 x 1024
VIDEO_480P = (21, 30, 52)  # 81 frames of 480 x 832

_SHAPES = (
    # huggingface.co/black-forest-labs/FLUX.1-dev
    Published(
        "flux.1-dev",
        "FluxTransformer2DModel",
        {
            **HEADS, **AXES, "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        },
        Size(IMAGE, 512),
        calls.flux1,
    ),
    # huggingface.co/black-forest-labs/FLUX.2-klein-4B
    Published(
        "flux.2-klein-4b",
        "Flux2Transformer2DModel",
        {
            **HEADS, "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20,
            "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
            "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000, "guidance_embeds": False,
        },
        Size(IMAGE, 512),
        calls.flux2,
    ),
    # huggingface.co/Qwen/Qwen-Image
    Published(
        "qwen-image",
        "QwenImageTransformer2DModel",
        {
            **HEADS, **AXES, "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60,
            "joint_attention_dim": 3584, "guidance_embeds": False,
        },
        Size(IMAGE, 256),
        calls.qwen,
    ),
    # huggingface.co/Tongyi-MAI/Z-Image-Turbo
    Published(
        "z-image",
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 3840, "n_layers": 30,
            "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True,
            "cap_feat_dim": 2560, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        },
        Size(IMAGE, 256),
        calls.z_image,
        "t",
    ),
    # huggingface.co/stabilityai/stable-diffusion-3.5-large
    Published(
        "sd3.5-large",
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 38,
            "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": 4096,
            "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        Size(IMAGE, 333),
        calls.sd3,
    ),
    # huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    Published(
        "wan-1.3b",
        "WanTransformer3DModel",
        {**WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        Size(VIDEO_480P, 512),
        calls.video,
    ),
    # huggingface.co/Wan-AI/Wan2.1-T2V-14B-Diffusers
    Published(
        "wan-14b",
        "WanTransformer3DModel",
        {**WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        Size(VIDEO_480P, 512),
        calls.video,
    ),
    # huggingface.co/Lightricks/LTX-Video
    Published(
        "ltx-video",
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 32,
            "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28, "caption_channels": 4096,
        },
        Size((16, 16, 24), 128),  # 121 frames of 512 x 768
        calls.ltx,
    ),
    # huggingface.co/hunyuanvideo-community/HunyuanVideo
    Published(
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        {
            **HEADS, "in_channels": 16, "out_channels": 16, "num_layers": 20, "num_single_layers": 40,
            "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1, "qk_norm": "rms_norm",
            "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
            "rope_axes_dim": (16, 56, 56),
        },
        Size((33, 45, 80), 256),  # 129 frames of 720 x 1280
        calls.hunyuan_video,
    ),
    # huggingface.co/PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
    Published(
        "pixart",
        "PixArtTransformer2DModel",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 28,
            "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152,
            "caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False,
        },
        Size(IMAGE, 300),
        calls.pixart,
    ),
)
# fmt: on
SHAPES: Mapping[str, Published] = {shape.name: shape for shape in _SHAPES}


def published(name: str) -> Published:
    """Return a published shape by name. Raises `InputError` that names all of them."""
    if name not in SHAPES:
        raise InputError(f"unknown shape '{name}'{suggestion(name, SHAPES)}; known: {', '.join(SHAPES)}")
    return SHAPES[name]
