"""The integer half of DiT: its blocks, and what a call of them shares."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures import patches
from tqdit.architectures.interface import Block
from tqdit.architectures.parts import Parts
from tqdit.architectures.patch_transformer import integer_block
from tqdit.layers import inputs
from tqdit.layers.block import IntBlock
from tqdit.layers.call import Call
from tqdit.layers.conditioning import Conditioning, Modulation, TimestepTable
from tqdit.ops.schema import Norm

ADALN = "norm1.linear"  # of a block


@dataclass(frozen=True)
class DiTCall(Call):
    """A call of DiT: the modulation of all blocks."""

    modulation: Modulation


@dataclass(frozen=True)
class DiTBlockCall(Call):
    """A call of one DiT block: shift, scale, gate of attention, then of the feed-forward, each (B, C) fp32."""

    modulation: Sequence[torch.Tensor]


class DiTBlock(IntBlock):
    """A DiT block in integers."""

    eps: tuple[float, float]  # of the two LayerNorms

    def run(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = call.modulation
        x = self.self_attention(x, Norm(shift_1, scale_1, self.eps[0]), gate_1, call)
        return self.feed_forward(x, Norm(shift_2, scale_2, self.eps[1]), gate_2, call)


class DiTInteger:
    """Assembles and runs DiT in integers; stateless, its models hold everything."""

    block = DiTBlock

    def forward(  # diffusers' own signature
        self: Any,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise of a batch of latents; parameters and result are those of diffusers' own forward.

        `InputError` for what does not fit the model. The result never requires a gradient.
        """
        arguments = {"timestep": timestep, "labels": class_labels, "cross_attention_kwargs": cross_attention_kwargs}
        return self.denoise(hidden_states, arguments, return_dict)

    def inputs(self, model: Any, x: torch.Tensor, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the timestep (1,) or (B,) and the class labels (B,), checked, on the device of x."""
        inputs.refuse("cross_attention_kwargs", arguments["cross_attention_kwargs"])
        t = inputs.timesteps(x, arguments["timestep"], model.runtime.groups.time_groups)
        return {"timestep": t, "labels": inputs.class_labels(x, arguments["labels"], model.conditioning.classes)}

    def begin(self, model: Any, x: torch.Tensor, given: Mapping[str, Any]) -> DiTCall:
        """Return what all blocks share in a call."""
        t = given["timestep"]
        group, shared = model.runtime.groups(t)
        return DiTCall(group, shared, model.conditioning(t, given["labels"]))

    def run(self, model: Any, x: torch.Tensor, call: DiTCall) -> torch.Tensor:
        """Return the output for latents x (B, C, H, W): (B, C or 2C, H, W), in the dtype of x."""
        side, blocks, shared = model.config.patch_size, model.transformer_blocks, call.modulation
        patches.lay_out(model, x, shared.embedded[0].shape[1])
        stream = patches.embedded(model.pos_embed, x, side, model.stream_dtype)
        for block, place in zip(blocks, model.conditioning.places, strict=True):
            stream = block(stream, DiTBlockCall(call.group, call.shared, shared.block(*place)))
        return patches.output(model, model.proj_out_2, stream, model.proj_out_1(shared.activated()), x)

    def assemble(self, parts: Parts) -> None:
        """Put integer modules into diffusers' empty model."""
        model: Any = parts.model
        parts.keep_float_ends()
        for name in parts.quantized(parts.graph.float_input):
            if not name.endswith(ADALN):
                parts.replace(name, parts.float_input(name))
        embedders: dict[str, nn.Module] = {}
        for block in parts.graph.blocks:
            empty: Any = model.get_submodule(block.prefix)
            embedders[block.prefix] = parts.fill(empty.norm1.emb, f"{block.prefix}.norm1.emb.")
            parts.replace(block.prefix, _block(parts, block, empty))
        model.add_module("conditioning", _conditioning(parts, embedders))


def _block(parts: Parts, block: Block, empty: Any) -> DiTBlock:
    """`empty`: diffusers' block."""
    made = cast(DiTBlock, integer_block(parts, block, DiTBlock))
    made.eps = float(empty.norm1.norm.eps), float(empty.norm3.eps)
    return made


def _conditioning(parts: Parts, embedders: Mapping[str, nn.Module]) -> Conditioning:
    """Stack the adaLN layers of all blocks whose embedders are equal: diffusers gives each block its own copy."""
    groups: list[tuple[nn.Module, list[str]]] = []
    places: dict[str, tuple[int, int]] = {}
    for block, embedder in embedders.items():
        same = next((i for i, (other, _) in enumerate(groups) if _equal(other, embedder)), len(groups))
        if same == len(groups):
            groups.append((embedder, []))
        places[block] = same, len(groups[same][1])
        groups[same][1].append(block)
    made = Conditioning()
    total = parts.solution.time_groups.num_timesteps
    for embedder, members in groups:
        if total is not None:  # whole timesteps
            embedder.time_proj = TimestepTable(embedder.get_submodule("time_proj"), total)
        made.add(embedder, parts.stacked_float_input([f"{name}.{ADALN}" for name in members]))
    first: Any = groups[0][0]
    made.classes = int(first.class_embedder.embedding_table.num_embeddings)
    made.places = list(places.values())
    return made


def _equal(a: nn.Module, b: nn.Module) -> bool:
    tensors: Iterable[tuple[torch.Tensor, torch.Tensor]] = zip(
        a.state_dict().values(), b.state_dict().values(), strict=True
    )
    return all(x.data_ptr() == y.data_ptr() or torch.equal(x, y) for x, y in tensors)
