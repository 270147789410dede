"""Checks of configs that architectures on patches of square latents share."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tqdit.errors import InputError

MAX_SIZE = 2**20  # of each size: a list of so many layers or classes still is no burden
MAX_TOKENS = 2**16  # 4096 pixels at DiT's /2: the table of positions is computed, so no file bounds it
MAX_EPS = 3e38
PATCHES = "pos_embed.proj.weight"
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_q\.weight")

Config = Mapping[str, Any]


def check_settings(config: Config, settings: Mapping[str, Any]) -> None:
    """Raise `InputError` for a setting that has another value than the one that is supported."""
    for key, value in settings.items():
        if config.get(key, value) != value:
            raise InputError(f"model config has {key} = {config[key]!r}; supported: {value!r}")


def check_sizes(config: Config, keys: Iterable[str]) -> None:
    """Raise `InputError` for a size that is missing or no whole number from 1 to `MAX_SIZE`."""
    for key in keys:
        if key not in config:
            raise InputError(f"model config lacks {key}")
        value = config[key]
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise InputError(f"model config has {key} = {value!r}; it must be a whole number from 1 to {MAX_SIZE}")


def check_channels(config: Config) -> None:
    """Raise `InputError` unless the output has the channels of the input, or twice as many (a learned variance)."""
    channels = config["in_channels"]
    if config.get("out_channels") not in (None, channels, 2 * channels):
        raise InputError(
            f"model config has out_channels = {config['out_channels']!r}; it must be {channels} or twice that"
        )


def check_eps(config: Config, default: float) -> None:
    """Raise `InputError` for an epsilon of LayerNorm that is no number from 0 that fp32 holds."""
    eps = config.get("norm_eps", default)
    if type(eps) not in (int, float) or not 0 <= eps < MAX_EPS:
        raise InputError(f"model config has norm_eps = {repr(eps)[:40]}; it must be a number from 0 that fp32 holds")


def check_tokens(config: Config) -> None:
    """Raise `InputError` unless the sample is whole patches, and not too many of them."""
    side, patch = config["sample_size"], config["patch_size"]
    if side % patch:
        raise InputError(f"model config has sample_size = {side}, not a multiple of patch_size = {patch}")
    if (tokens := (side // patch) ** 2) > MAX_TOKENS:
        raise InputError(
            f"model config has sample_size = {side} and patch_size = {patch}, which is {tokens} tokens; at most "
            f"{MAX_TOKENS} are supported"
        )


def check_tensors(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` unless a file's tensors are those of so many blocks, and of patches of that size."""
    needed, found = config["num_layers"], sum(1 for name in shapes if BLOCK.fullmatch(name))
    if found != needed:
        raise InputError(
            f"the config has num_layers = {needed}, the weights have {found} blocks: the first difference is "
            f"'transformer_blocks.{min(needed, found)}'"
        )
    if PATCHES not in shapes:
        raise InputError(f"weights lack tensor '{PATCHES}'")
    width, side = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"]
    patches = (width, config["in_channels"], side, side)
    if tuple(shapes[PATCHES]) != patches:
        raise InputError(f"tensor '{PATCHES}' has shape {tuple(shapes[PATCHES])}, the config needs {patches}")
