"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024), as diffusers' `PixArtTransformer2DModel`.

A block has a self-attention as DiT's, a cross-attention to the tokens of a prompt, and a feed-forward network. One
layer modulates all blocks (adaLN-single), each adds a table of its own. Key and value of the cross-attention depend on
the prompt alone: a call computes them when its prompt is another one than that of the last call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures import checks, patches
from tqdit.architectures.interface import Block, Config, Graph
from tqdit.architectures.parts import Parts
from tqdit.architectures.patch_transformer import (
    BLOCKS,
    PatchTransformer,
    cross_attention,
    feed_forward,
    integer_block,
    self_attention,
)
from tqdit.architectures.repeated import parameter_shapes
from tqdit.errors import InputError
from tqdit.layers import inputs
from tqdit.layers.block import IntBlock
from tqdit.layers.call import Call
from tqdit.ops.schema import Norm

SETTINGS = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
            "attention_type": "default"}  # fmt: skip
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size",
         "cross_attention_dim")  # fmt: skip
LAYERS = ("qkv", "out", "cross_q", "cross_kv", "cross_out", "fc1", "fc2")  # of a block, in the order of its graph
CONDITIONED_SIDE = 128  # diffusers: by default a model of this sample_size is conditioned on the size of its images
# Published shapes by name: sample_size, and whether the model is conditioned on the size of its images.
PUBLISHED = {"PixArt-XL/2": (32, False), "PixArt-XL/2@512": (64, False), "PixArt-XL/2@1024": (128, False)}
PROMPT_TOKENS, CAPTION_CHANNELS = 300, 4096  # of PixArt-Sigma and its text encoder; alpha has 120 tokens


@dataclass(frozen=True)
class PixArtCall(Call):
    """A call of PixArt.

    `modulation`: (B, 6, C) fp32, that of all blocks; `embedding`: (B, C) fp32, of the timestep, for the last layer;
    `contexts`: key and value of the prompt, of each block; `bias`: fp32 (B, M) or None.
    """

    modulation: torch.Tensor
    embedding: torch.Tensor
    contexts: list[Any]
    bias: torch.Tensor | None


@dataclass(frozen=True)
class PixArtBlockCall(Call):
    """A call of one block; fields as in `PixArtCall`."""

    modulation: torch.Tensor
    context: Any
    bias: torch.Tensor | None


class PixArtBlock(IntBlock):
    """A PixArt block in integers."""

    scale_shift_table: torch.Tensor  # (6, C)
    eps: tuple[float, float]  # of the two LayerNorms

    def run(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (self.scale_shift_table[None] + call.modulation).unbind(1)
        x = self.self_attention(x, Norm(shift_1, scale_1, self.eps[0]), gate_1, call)
        x = self.cross_attention(x, call.context, call.bias, call)
        return self.feed_forward(x, Norm(shift_2, scale_2, self.eps[1]), gate_2, call)


class PixArt(PatchTransformer):
    """PixArt-alpha and -Sigma."""

    name = "PixArtTransformer2DModel"
    block = PixArtBlock

    def check(self, config: Config) -> None:
        checks.check_settings(config, SETTINGS)
        checks.check_sizes(config, SIZES)
        checks.check_channels(config)
        checks.check_eps(config, 1e-6)
        checks.check_tokens(config)
        if config.get("caption_channels") is not None:
            checks.check_sizes(config, ["caption_channels"])
            if (given := config["cross_attention_dim"]) != (width := self.width(config)):
                raise InputError(f"model config has cross_attention_dim = {given}; captions are projected to {width}")

    def check_sizes(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        checks.check_tensors(config, shapes)

    def graph(self, config: Config) -> Graph:
        heads, head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        prefixes = [f"{BLOCKS}{index}" for index in range(int(config["num_layers"]))]
        small = {**config, "_class_name": self.name, "num_layers": 1, "sample_size": config["patch_size"]}
        small |= {"use_additional_conditions": conditioned(config), "interpolation_scale": 1}
        shapes = parameter_shapes(small, BLOCKS, len(prefixes))
        outside = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
        outside = [name for name in outside if not name.startswith(BLOCKS)]
        blocks = tuple(_block(prefix, heads, head_dim) for prefix in prefixes)
        return Graph(blocks, tuple(outside), shapes, ends=("pos_embed.proj", "proj_out"))

    def shape_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition("@")[0] for name in PUBLISHED))

    def shape_config(self, name: str) -> dict[str, Any]:
        name = name.removesuffix("@256")
        if name not in PUBLISHED:
            raise InputError(f"unknown shape '{name}'; known: {', '.join(PUBLISHED)}")
        side, sizes = PUBLISHED[name]
        return {
            "_class_name": self.name, **SETTINGS, "attention_bias": True, "attention_head_dim": 72,
            "caption_channels": CAPTION_CHANNELS, "cross_attention_dim": 1152, "in_channels": 4, "norm_eps": 1e-6,
            "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28, "out_channels": 8,
            "patch_size": 2, "sample_size": side, "use_additional_conditions": sizes,
        }  # fmt: skip

    def shape_name(self, config: Config) -> str:
        key = self.shape_key(config)
        named = next((name for name in PUBLISHED if self.shape_key(self.shape_config(name)) == key), None)
        sizes = f"{config['num_layers']}x{self.width(config)}/{config['patch_size']}@{config['sample_size']}"
        return named or f"PixArt-{sizes}"

    def shape_key(self, config: Config) -> tuple[int, ...]:
        sizes = tuple(int(config[name]) for name in SIZES)
        return (*sizes, self.output_channels(config), int(config.get("caption_channels") or 0), conditioned(config))

    def context_tokens(self, condition: Mapping[str, Any]) -> int:
        return int(condition["encoder_hidden_states"].shape[1])

    def example(self, config: Config, batch: int, seed: int = 0) -> dict[str, Any]:
        """Random prompts of a third of all tokens; the unconditional half has one token."""
        generator = torch.Generator().manual_seed(seed)
        depth = config.get("caption_channels") or config["cross_attention_dim"]
        mask = torch.zeros(batch, PROMPT_TOKENS, dtype=torch.int64)
        mask[:, : PROMPT_TOKENS // 3] = 1
        mask[(batch + 1) // 2 :, 1:] = 0
        given: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(batch, PROMPT_TOKENS, depth, generator=generator),
            "encoder_attention_mask": mask,
        }
        if conditioned(config):
            side = 8.0 * config["sample_size"]
            given["added_cond_kwargs"] = {"resolution": torch.full((batch, 2), side),
                                          "aspect_ratio": torch.ones(batch, 1)}  # fmt: skip
        return given

    def forward(  # diffusers' own signature
        self: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise of a batch of latents; parameters and result are those of diffusers' own forward.

        Raises `InputError` for what does not fit the model, and for a mask of the latents themselves. The result never
        requires a gradient.
        """
        arguments = {"timestep": timestep, "states": encoder_hidden_states, "mask": encoder_attention_mask,
                     "added": added_cond_kwargs, "attention_mask": attention_mask,
                     "cross_attention_kwargs": cross_attention_kwargs}  # fmt: skip
        return self.denoise(hidden_states, arguments, return_dict)

    def inputs(self, model: Any, x: torch.Tensor, arguments: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("attention_mask", "cross_attention_kwargs"):
            inputs.refuse(name, arguments[name])
        depth = model.config.caption_channels or model.config.cross_attention_dim
        states = inputs.prompt(x, arguments["states"], depth)
        return {
            "timestep": inputs.timesteps(x, arguments["timestep"], model.runtime.groups.time_groups),
            "prompt": states,
            "bias": inputs.mask_bias(x, arguments["mask"], states.shape[1]),
            "sizes": inputs.sizes(x, arguments["added"]) if conditioned(model.config) else None,
        }

    def prepare(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        states = given.pop("prompt")
        finite, contexts = model.runtime.prompt(model, states, lambda: _contexts(model, states))
        return {**given, "finite": finite, "contexts": contexts}

    def begin(self, model: Any, x: torch.Tensor, given: Mapping[str, Any]) -> PixArtCall:
        t, batch = given["timestep"], len(x)
        embed, sizes = model.adaln_single, given["sizes"]
        modulation, embedding = embed(t.expand(batch), sizes, batch_size=batch, hidden_dtype=torch.float32)
        modulation = modulation.unflatten(1, (6, -1))
        sound, bias = given["finite"], given["bias"]
        if bias is not None:
            sound = sound & bias.isfinite().all(1)
        # Codes hold no NaN and no Inf: a sample whose prompt has some gets them by its last layer, as in a float model.
        embedding = embedding.where(sound[:, None], torch.nan)
        group, shared = model.runtime.groups(t)
        return PixArtCall(group, shared, modulation, embedding, given["contexts"], bias)

    def run(self, model: Any, x: torch.Tensor, call: PixArtCall) -> torch.Tensor:
        side, dtype = model.config.patch_size, model.stream_dtype
        patches.lay_out(model, x, call.embedding.shape[1])
        stream = patches.embedded(model.pos_embed, x, side, dtype)
        for block, context in zip(model.transformer_blocks, call.contexts, strict=True):
            stream = block(stream, PixArtBlockCall(call.group, call.shared, call.modulation, context, call.bias))
        shift_scale = (model.scale_shift_table[None] + call.embedding[:, None]).flatten(1)
        return patches.output(model, model.proj_out, stream, shift_scale, x)

    def assemble(self, parts: Parts) -> None:
        parts.keep_float_ends()
        for name in parts.quantized(parts.graph.float_input):
            parts.replace(name, parts.float_input(name))
        for block in parts.graph.blocks:
            parts.replace(block.prefix, _integer_block(parts, block))


def conditioned(config: Config) -> bool:
    """Say whether a config's model is conditioned on the size of its images."""
    given = config.get("use_additional_conditions")
    return bool(config["sample_size"] == CONDITIONED_SIDE if given is None else given)


def _block(prefix: str, heads: int, head_dim: int) -> Block:
    self_attends = self_attention(f"{prefix}.attn1", heads, head_dim)
    return Block(
        prefix, self_attends + cross_attention(f"{prefix}.attn2", heads, head_dim) + feed_forward(f"{prefix}.ff")
    )


def _integer_block(parts: Parts, block: Block) -> PixArtBlock:
    empty: Any = parts.model.get_submodule(block.prefix)
    made = cast(PixArtBlock, integer_block(parts, block, PixArtBlock, LAYERS))
    made.eps = float(empty.norm1.eps), float(empty.norm2.eps)
    table = parts.solution.floats[f"{block.prefix}.scale_shift_table"]
    made.register_parameter("scale_shift_table", nn.Parameter(table, requires_grad=False))
    return made


def _contexts(model: Any, states: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Return which prompts (B, M, D) have neither NaN nor Inf, and the codes of key and value for every block."""
    states = states.float()
    if model.caption_projection is not None:
        states = model.caption_projection(states)
    finite = states.isfinite().flatten(1).all(1)
    return finite, [block.context(states) for block in model.transformer_blocks]


PIXART = PixArt()
