"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024), as diffusers' `PixArtTransformer2DModel`.

A block has a self-attention as DiT's, a cross-attention to the tokens of a prompt, and a feed-forward network. One
layer modulates all blocks (adaLN-single), each adds a table of its own. Key and value of the cross-attention depend on
the prompt alone: a call computes them when its prompt is another one than that of the last call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tqdit.architectures import checks, patches
from tqdit.architectures.interface import Architecture, Config, Graph
from tqdit.architectures.parts import Parts
from tqdit.architectures.repeated import parameter_shapes
from tqdit.layers import inputs
from tqdit.layers.block import IntBlock
from tqdit.layers.call import Call
from tqdit.ops.schema import Norm

BLOCKS = "transformer_blocks."
SETTINGS = {
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    "attention_type": "default",
}  # fmt: skip
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size",
         "cross_attention_dim")  # fmt: skip
CONDITIONED_SIDE = 128  # diffusers: models of this sample size are also conditioned on the size of the image
PUBLISHED = {"PixArt-XL/2": 32, "PixArt-XL/2@512": 64, "PixArt-XL/2@1024": 128}  # name -> sample_size


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


class PixArt(Architecture):
    """PixArt-alpha and -Sigma."""

    name = "PixArtTransformer2DModel"
    block = PixArtBlock

    def check(self, config: Config) -> None:
        checks.check_settings(config, SETTINGS)
        checks.check_sizes(config, SIZES)
        checks.check_channels(config)
        checks.check_tokens(config["sample_size"], config["patch_size"])
        checks.check_eps(config, 1e-6)
        if config.get("caption_channels") is not None:
            checks.check_size("caption_channels", config["caption_channels"])
            checks.check_equal(config, "cross_attention_dim", self.width(config))

    def build(self, config: Config) -> nn.Module:
        return checks.build(self.name, config)

    def graph(self, config: Config) -> Graph:
        heads, head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        prefixes = [f"{BLOCKS}{index}" for index in range(int(config["num_layers"]))]
        small = {**config, "_class_name": self.name, "num_layers": 1, "sample_size": config["patch_size"]}
        small["use_additional_conditions"] = conditioned(config)
        parameters = parameter_shapes(small, BLOCKS, len(prefixes))
        outside = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
        outside = [name for name in outside if not name.startswith(BLOCKS)]
        return Graph(tuple(_block(prefix, heads, head_dim) for prefix in prefixes), tuple(outside), parameters)

    def tokens(self, config: Config) -> int:
        return (int(config["sample_size"]) // int(config["patch_size"])) ** 2

    def width(self, config: Config) -> int:
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

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

        `InputError` for what does not fit the model, and for a mask of the latents themselves. The result never requires
        a gradient.
        """
        arguments = {"timestep": timestep, "states": encoder_hidden_states, "mask": encoder_attention_mask,
                     "added": added_cond_kwargs, "attention_mask": attention_mask}  # fmt: skip
        return self.denoise(hidden_states, arguments, return_dict)

    def check_states(self, model: Any, x: Any) -> None:
        """Raise `InputError` unless x is a batch of latents of this model."""
        inputs.check_states(x, model.config.in_channels, model.config.patch_size)

    def inputs(self, model: Any, x: torch.Tensor, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return timestep (1,) or (B,), prompt (B, M, D), bias (B, M) or None, and sizes, checked, on the device of x."""
        inputs.refuse("attention_mask", arguments["attention_mask"])
        depth = model.config.caption_channels or model.config.cross_attention_dim
        states = inputs.prompt(x, arguments["states"], depth)
        return {
            "timestep": inputs.timesteps(x, arguments["timestep"], model.runtime.groups.time_groups),
            "prompt": states,
            "bias": inputs.mask_bias(x, arguments["mask"], states.shape[1]),
            "added": inputs.sizes(x, arguments["added"]) if conditioned(model.config) else None,
        }

    def prepare(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call with key and value of the prompt in its place."""
        states = given.pop("prompt")
        return {**given, "contexts": model.runtime.prompt(model, states, lambda: _contexts(model, states))}

    def begin(self, model: Any, given: Mapping[str, Any]) -> PixArtCall:
        """Return what all blocks share in a call."""
        t, added, batch = given["timestep"], given["added"], given["batch"]
        stacked, embedding = model.adaln_single(t.expand(batch), added, batch_size=batch, hidden_dtype=torch.float32)
        modulation = stacked.float().unflatten(1, (6, -1))
        return PixArtCall(*model.runtime.groups(t), modulation, embedding.float(), given["contexts"], given["bias"])

    def run(self, model: Any, x: torch.Tensor, call: PixArtCall) -> torch.Tensor:
        """Return the output for latents x (B, C, H, W): (B, C or 2C, H, W), in the dtype of x."""
        side, dtype = model.config.patch_size, model.stream_dtype
        patches.lay_out(x, side, call.embedding.shape[1], dtype, 2 * call.modulation.nbytes)
        stream = patches.embedded(model.pos_embed, x, side, dtype)
        for block, context in zip(model.transformer_blocks, call.contexts, strict=True):
            stream = block(stream, PixArtBlockCall(call.group, call.shared, call.modulation, context, call.bias))
        shift_scale = (model.scale_shift_table[None] + call.embedding[:, None]).flatten(1)
        return patches.output(model, model.proj_out, stream, shift_scale, x)

    def assemble(self, parts: Parts) -> None:
        """Put integer modules into diffusers' empty model."""
        for name in parts.graph.float_input:
            parts.replace(name, parts.float_input(name))
        for block in parts.graph.blocks:
            parts.replace(block.prefix, _integer_block(parts, block, parts.model.get_submodule(block.prefix)))
