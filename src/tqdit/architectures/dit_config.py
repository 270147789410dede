"""Which configs of diffusers' `DiTTransformer2DModel` are supported, and which sizes fit the tensors of a file."""

import re
from collections.abc import Mapping
from typing import Any

from tqdit.architectures.registry import FREQUENCY_SHIFT
from tqdit.errors import InputError

NAME = "DiTTransformer2DModel"
PATCHES = "pos_embed.proj.weight"
CLASS_TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_q\.weight")
SIZES = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size",
    "num_embeds_ada_norm",
)  # fmt: skip
MAX_SIZE = 2**20  # of each of them: a list of so many layers or classes still is no burden
MAX_TOKENS = 2**16  # 4096 pixels at DiT's /2: the table of positions is computed, so no file bounds it
MAX_EPS = 3e38
SETTINGS = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}


def check(config: Mapping[str, Any]) -> None:
    """Raise `InputError` that names the key if a config has an operand that is not known, or sizes that do not fit."""
    for key, value in SETTINGS.items():
        if config.get(key, value) != value:
            raise InputError(f"model config has {key} = {config[key]!r}; supported: {value!r}")
    for key in SIZES:
        if key not in config:
            raise InputError(f"model config lacks {key}")
        _check_size(key, config[key])
    channels = config["in_channels"]
    if config.get("out_channels") not in (None, channels, 2 * channels):
        raise InputError(
            f"model config has out_channels = {config['out_channels']!r}; it must be {channels} or twice that"
        )
    shift = config.get(FREQUENCY_SHIFT, 1)
    if type(shift) is not int or shift not in (0, 1):
        raise InputError(f"model config has {FREQUENCY_SHIFT} = {shift!r}; it must be 0 or 1")
    eps = config.get("norm_eps", 1e-5)
    if type(eps) not in (int, float) or not 0 <= eps < MAX_EPS:
        raise InputError(f"model config has norm_eps = {repr(eps)[:40]}; it must be a number from 0 that fp32 holds")
    _check_tokens(config["sample_size"], config["patch_size"])


def _check_size(key: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise InputError(f"model config has {key} = {value!r}; it must be a whole number from 1 to {MAX_SIZE}")


def _check_tokens(side: int, patch: int) -> None:
    if side % patch:
        raise InputError(f"model config has sample_size = {side}, not a multiple of patch_size = {patch}")
    if (tokens := (side // patch) ** 2) > MAX_TOKENS:
        raise InputError(
            f"model config has sample_size = {side} and patch_size = {patch}, which is {tokens} tokens; at most "
            f"{MAX_TOKENS} are supported"
        )


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` if the sizes of a config are not those of the tensors of a file."""
    needed, found = config["num_layers"], sum(1 for name in shapes if BLOCK.fullmatch(name))
    if found != needed:
        raise InputError(
            f"the config has num_layers = {needed}, the weights have {found} blocks: the first difference is "
            f"'transformer_blocks.{min(needed, found)}'"
        )
    for name in (CLASS_TABLE, PATCHES):
        if name not in shapes:
            raise InputError(f"weights lack tensor '{name}'")
    rows, classes = (*shapes[CLASS_TABLE], 0)[0], config["num_embeds_ada_norm"]
    if rows != classes + 1:
        raise InputError(
            f"the config has num_embeds_ada_norm = {classes}, which needs {classes + 1} rows of '{CLASS_TABLE}' "
            f"(the last is the null class); the weights have {rows}"
        )
    width, side = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"]
    patches = (width, config["in_channels"], side, side)
    if tuple(shapes[PATCHES]) != patches:
        raise InputError(f"tensor '{PATCHES}' has shape {tuple(shapes[PATCHES])}, the config needs {patches}")
