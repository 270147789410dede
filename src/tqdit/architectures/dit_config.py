"""Checks of a `DiTTransformer2DModel` config: supported settings, and sizes that fit the tensors of a file."""

from collections.abc import Mapping
from typing import Any

from tqdit.architectures import checks
from tqdit.architectures.registry import FREQUENCY_SHIFT
from tqdit.architectures.timestep import check_timestep
from tqdit.errors import InputError

NAME = "DiTTransformer2DModel"
CLASS_TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
SIZES = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size",
    "num_embeds_ada_norm",
)  # fmt: skip
SETTINGS = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}


def check(config: Mapping[str, Any]) -> None:
    """Raise `InputError` that names the key if a config has an operand that is not known, or sizes that do not fit."""
    checks.check_settings(config, SETTINGS)
    checks.check_sizes(config, SIZES)
    checks.check_channels(config)
    shift = config.get(FREQUENCY_SHIFT, 1)
    if type(shift) is not int or shift not in (0, 1):
        raise InputError(f"model config has {FREQUENCY_SHIFT} = {shift!r}; it must be 0 or 1")
    check_timestep(config)
    checks.check_eps(config, 1e-5)
    checks.check_tokens(config)


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` if the sizes of a config are not those of the tensors of a file."""
    checks.check_tensors(config, shapes)
    if CLASS_TABLE not in shapes:
        raise InputError(f"weights lack tensor '{CLASS_TABLE}'")
    rows, classes = (*shapes[CLASS_TABLE], 0)[0], config["num_embeds_ada_norm"]
    if rows != classes + 1:
        raise InputError(
            f"the config has num_embeds_ada_norm = {classes}, which needs {classes + 1} rows of '{CLASS_TABLE}' "
            f"(the last is the null class); the weights have {rows}"
        )
