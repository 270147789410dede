"""The published shapes of DiT and SiT by name."""

from collections.abc import Mapping
from typing import Any

from tqdit.architectures.dit_config import NAME
from tqdit.errors import InputError

# Size -> layers, heads, channels per head (DiT, Peebles & Xie 2023, table 1).
SIZES: Mapping[str, tuple[int, int, int]] = {
    "S": (12, 6, 64),
    "B": (12, 12, 64),
    "L": (24, 16, 64),
    "XL": (28, 16, 72),
}
FAMILIES: Mapping[str, int] = {"DiT": 2, "SiT": 1}  # outputs a channel: DiT also learns the variance
PATCHES = (2, 4, 8)
LATENTS = {256: 32, 512: 64}  # image side -> latent side; the VAE of DiT shrinks by 8
LATENT_CHANNELS = 4
CLASSES = 1000


def shape_names() -> tuple[str, ...]:
    """The names of 256 x 256 models; each also exists with "@512" behind it."""
    return tuple(f"{family}-{size}/{patch}" for family in FAMILIES for size in SIZES for patch in PATCHES)


def shape_config(name: str) -> dict[str, Any]:
    """Return the config of a name such as "DiT-XL/2" or "DiT-XL/2@512", learned variance included.

    "SiT-XL/2" has the same sizes and makes a velocity alone (SiT, Ma et al. 2024). Raises `InputError` naming the
    unknown part and what is known.
    """
    base, at, side = name.partition("@")
    if base not in shape_names():
        raise InputError(f"unknown shape '{name}'; known: {', '.join(shape_names())}, each also with @512")
    if at and side not in map(str, LATENTS):
        raise InputError(f"unknown image side in shape '{name}'; known: {', '.join(f'@{known}' for known in LATENTS)}")
    family, size, patch = base.replace("/", "-").split("-")
    layers, heads, head_dim = SIZES[size]
    return {
        "_class_name": NAME,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": head_dim,
        "dropout": 0.0,
        "in_channels": LATENT_CHANNELS,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": heads,
        "num_embeds_ada_norm": CLASSES,
        "num_layers": layers,
        "out_channels": FAMILIES[family] * LATENT_CHANNELS,
        "patch_size": int(patch),
        "sample_size": LATENTS[int(side) if at else 256],
        "upcast_attention": False,
    }


def shape_name(config: Mapping[str, Any]) -> str:
    """Return a published name, or the sizes: "DiT-6x192/2@32" (layers, width, patch, input side)."""
    wanted = shape_key(config)
    for base in shape_names():
        for side in LATENTS:
            name = base if side == min(LATENTS) else f"{base}@{side}"
            if shape_key(shape_config(name)) == wanted:
                return name
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return f"DiT-{config['num_layers']}x{width}/{config['patch_size']}@{config['sample_size']}"


def shape_key(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return every size that an operation depends on."""
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "patch_size")
    sizes = tuple(int(config[name]) for name in (*names, "num_embeds_ada_norm"))
    channels = int(config["in_channels"])
    return (*sizes, channels, int(config.get("out_channels") or channels))
