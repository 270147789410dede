"""The published DiT's tensors: their names in diffusers, and the sizes that follow from their shapes.

The names are those of the authors' checkpoints (DiT, Peebles & Xie 2023).
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tqdit.architectures.dit_shapes import SIZES, shape_config
from tqdit.architectures.registry import FREQUENCY_SHIFT, graph
from tqdit.errors import InputError

HEADS: Mapping[int, int] = {heads * head_dim: heads for _, heads, head_dim in SIZES.values()}  # by width
POSITIONS = "pos_embed"
CLASS_TABLE = "y_embedder.embedding_table.weight"
AS_PUBLISHED: Mapping[str, Any] = {FREQUENCY_SHIFT: 0, "norm_eps": 1e-6}  # where diffusers has other defaults
DIFFUSION: Mapping[str, Any] = {  # as published; the scheduler config of a checkpoint
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
}


def implied_config(tensors: Mapping[str, torch.Tensor], num_heads: int | None) -> dict[str, Any]:
    """The diffusers config that shapes imply. `num_heads` overrides the published number for the width.

    Raises `InputError` naming the tensor that is missing or of no shape a DiT has.
    """
    channels, patch, inner = _embedding_sizes(tensors)
    (rows, _), (classes, _) = _shape(tensors, "final_layer.linear.weight", 2), _shape(tensors, CLASS_TABLE, 2)
    if rows not in (channels * patch**2, 2 * channels * patch**2):
        raise InputError(
            f"tensor 'final_layer.linear.weight' has {rows} rows; patches of {channels} x {patch} x {patch} need "
            "as many, or twice that"
        )
    _, tokens, channels_of_positions = _shape(tensors, POSITIONS, 3)
    if channels_of_positions != inner:
        raise InputError(f"tensor '{POSITIONS}' has {channels_of_positions} channels, expected {inner}")
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise InputError(f"tensor '{POSITIONS}' has {tokens} tokens, which are no square")
    _shape(tensors, "blocks.0.attn.qkv.weight", 2)
    heads = _heads(inner, num_heads)
    sizes = {
        "num_layers": sum(1 for name in tensors if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)),
        "num_attention_heads": heads,
        "attention_head_dim": inner // heads,
        "in_channels": channels,
        "out_channels": rows // patch**2,
        "patch_size": patch,
        "sample_size": side * patch,
        "num_embeds_ada_norm": classes - 1,  # the last row is the null class
    }
    return {**shape_config("DiT-XL/2"), **sizes, **AS_PUBLISHED}


def _embedding_sizes(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """Channels, patch side and width."""
    name = "x_embedder.proj.weight"
    inner, channels, patch, other = _shape(tensors, name, 4)
    if patch != other:
        raise InputError(f"tensor '{name}' has patches of {patch} x {other}, which are no square")
    return channels, patch, inner


def _shape(tensors: Mapping[str, torch.Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"not a DiT checkpoint, or incomplete: it lacks tensor '{name}'")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise InputError(f"tensor '{name}' has shape {shape}, expected {ndim} dimensions, none empty")
    return shape


def _heads(inner: int, num_heads: int | None) -> int:
    if num_heads is None and inner not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise InputError(
            f"the number of heads is unknown for width {inner} (published: {known}); "
            "convert the checkpoint with num_heads given"
        )
    heads = HEADS[inner] if num_heads is None else num_heads
    if heads < 1 or inner % heads:
        raise InputError(f"num_heads {heads} does not divide the width {inner}")
    return heads


def published_names(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every published name but the position table, with diffusers' names for it: three for rows of q, k and v."""
    layers: list[tuple[str, tuple[str, ...]]] = [
        ("x_embedder.proj", ("pos_embed.proj",)),
        ("final_layer.adaLN_modulation.1", ("proj_out_1",)),
        ("final_layer.linear", ("proj_out_2",)),
    ]
    for index, block in enumerate(graph(config).blocks):
        first, second, modulation = block.float_input
        qkv, out, fc1, fc2 = block.linears
        if index == 0:
            layers += [("t_embedder.mlp.0", (first,)), ("t_embedder.mlp.2", (second,))]
        prefix = f"blocks.{index}"
        layers += [
            (f"{prefix}.attn.qkv", qkv.modules),
            (f"{prefix}.attn.proj", out.modules),
            (f"{prefix}.mlp.fc1", fc1.modules),
            (f"{prefix}.mlp.fc2", fc2.modules),
            (f"{prefix}.adaLN_modulation.1", (modulation,)),
        ]
    yield CLASS_TABLE, ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",)
    for name, targets in layers:
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", tuple(f"{target}.{kind}" for target in targets)
