"""DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024), as diffusers' class-conditional `DiTTransformer2DModel`.

A SiT is a DiT trained by flow matching: the module is the same, the time that it embeds may be another (`timestep`).
A block has two attention matmuls and four linear layers; query, key and value projections share their input.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures import dit_config, dit_shapes, timestep
from tqdit.architectures.dit_integer import DiTInteger
from tqdit.architectures.from_config import QUANTIZATION, float_model
from tqdit.architectures.interface import Block, Config, Graph
from tqdit.architectures.patch_transformer import (
    BLOCKS,
    PatchTransformer,
    feed_forward,
    self_attention,
)
from tqdit.architectures.registry import FREQUENCY_SHIFT, KEPT
from tqdit.architectures.repeated import parameter_shapes
from tqdit.sampling.guidance import ClassLabels

EMBEDDER = "norm1.emb."  # diffusers gives every block its own copy of one embedder of (t, class)


class DiT(DiTInteger, PatchTransformer):
    """DiT: configs, graph and building here, integers in `DiTInteger`."""

    name = dit_config.NAME

    def check(self, config: Config) -> None:
        dit_config.check(config)

    def check_sizes(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        dit_config.check_sizes(config, shapes)

    def build(self, config: Config) -> nn.Module:
        """Make the float model. Its config has the `KEPT` keys that `config` has.

        A timestep t is embedded as cos and sin of s * 10000^(-i / (128 - shift)), i = 0 .. 127, with s = offset +
        scale * t. Published DiT has shift 0; diffusers has 1, and no key for it, so `FREQUENCY_SHIFT` is ours, as are
        scale and offset.
        """
        model = float_model(self.model_class(), config, unknown=KEPT)
        if FREQUENCY_SHIFT in config:
            for block in model.transformer_blocks:
                block.norm1.emb.time_proj.downscale_freq_shift = config[FREQUENCY_SHIFT]
        timestep.apply_timestep(model.transformer_blocks, config)
        if kept := {key: config[key] for key in KEPT if key in config}:
            model.register_to_config(**kept)
        return cast(nn.Module, model)

    def graph(self, config: Config) -> Graph:
        """The blocks and the three layers outside of them: patches, last modulation, last projection."""
        layers, heads, head_dim = (
            int(config[key]) for key in ("num_layers", "num_attention_heads", "attention_head_dim")
        )
        blocks = tuple(_block(f"{BLOCKS}{index}", heads, head_dim) for index in range(layers))
        small = {key: value for key, value in config.items() if key not in (*KEPT, QUANTIZATION)}
        small |= {"_class_name": self.name, "num_layers": 1, "sample_size": config["patch_size"]}
        shapes = parameter_shapes(small, BLOCKS, layers)
        outside = ("pos_embed.proj", "proj_out_1", "proj_out_2")
        return Graph(blocks, outside, shapes, ends=("pos_embed.proj", "proj_out_2"))

    def shape_names(self) -> tuple[str, ...]:
        return dit_shapes.shape_names()

    def shape_config(self, name: str) -> dict[str, Any]:
        return dit_shapes.shape_config(name)

    def shape_name(self, config: Config) -> str:
        return dit_shapes.shape_name(config)

    def shape_key(self, config: Config) -> tuple[int, ...]:
        return dit_shapes.shape_key(config)

    def conditions(self, config: Config) -> ClassLabels:
        return ClassLabels(int(config["num_embeds_ada_norm"]))

    def example(self, config: Config, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Classes one after the other, and the null class in the second half. `seed` has no part in it."""
        classes = int(config["num_embeds_ada_norm"])
        labels = torch.arange(batch) % classes
        labels[(batch + 1) // 2 :] = classes
        return {"class_labels": labels}

    def own_settings(self, config: Config) -> dict[str, Any]:
        shift = config.get(FREQUENCY_SHIFT, 1)
        return ({} if shift == 1 else {FREQUENCY_SHIFT: shift}) | timestep.changed(config)

    def twin(self, name: str) -> str:
        head, found, tail = name.partition(EMBEDDER)
        return f"{BLOCKS}0.{EMBEDDER}{tail}" if found and head.startswith(BLOCKS) else name

    def share(self, model: nn.Module) -> None:
        first, *others = cast(Iterable[Any], model.transformer_blocks)
        for block in others:
            block.norm1.emb = first.norm1.emb

    def called_apart(self, model: nn.Module) -> list[nn.Module]:
        blocks: Any = model.transformer_blocks
        return [blocks[0].norm1.emb]

    def is_table(self, name: str) -> bool:
        return name.endswith("embedding_table.weight")


def _block(prefix: str, heads: int, head_dim: int) -> Block:
    """Query, key and value projections; attention; its output; the two layers of the feed-forward network."""
    norm, matmuls = f"{prefix}.norm1", self_attention(f"{prefix}.attn1", heads, head_dim) + feed_forward(f"{prefix}.ff")
    embedder = f"{norm}.emb.timestep_embedder"
    return Block(prefix, matmuls, (f"{embedder}.linear_1", f"{embedder}.linear_2", f"{norm}.linear"))


DIT = DiT()
