"""The parts that architectures on patches share: sizes, checks, matmuls of their blocks, and assembling a block."""

from collections.abc import Iterable
from typing import Any

from tqdit.architectures.interface import Architecture, Attention, Block, Config, Linear, Operand
from tqdit.architectures.parts import Parts
from tqdit.layers import inputs
from tqdit.layers.params import ActivationParams
from tqdit.spec import Role

BLOCKS = "transformer_blocks."
SELF_ATTENTION = ("qkv", "out", "fc1", "fc2")  # layers of a block without a cross-attention
LATENT_CHANNELS, VAE_FACTOR = 4, 8  # of the autoencoder that these models have been published with


class PatchTransformer(Architecture):
    """The sizes and checks of a model on patches; its config has diffusers' usual keys."""

    def tokens(self, config: Config) -> int:
        return (int(config["sample_size"]) // int(config["patch_size"])) ** 2

    def width(self, config: Config) -> int:
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    def input_shape(self, config: Config) -> tuple[int, int, int]:
        side = int(config["sample_size"])
        return int(config["in_channels"]), side, side

    def image_side(self, config: Config) -> int:
        """Latents of a VAE count as the images that they make; samples of other channels are the images."""
        side = int(config["sample_size"])
        return side * VAE_FACTOR if int(config["in_channels"]) == LATENT_CHANNELS else side

    def output_channels(self, config: Config) -> int:
        return int(config.get("out_channels") or config["in_channels"])

    def check_states(self, model: Any, x: Any) -> None:
        inputs.check_states(x, model.config.in_channels, model.config.patch_size)


def self_attention(attn: str, heads: int, head_dim: int) -> tuple[Linear | Attention, ...]:
    """Return the matmuls of an attention of tokens to each other; `attn`: the path of diffusers' `Attention`."""
    qkv = Linear(
        Operand(f"{attn}.qkv_input", Role.INPUT, quantized_by_row=True),
        (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
    )
    query, key, value = (Operand(f"{attn}.{role.value}", role, heads) for role in (Role.QUERY, Role.KEY, Role.VALUE))
    return (
        qkv,
        Attention(attn, query, key, value, Operand(f"{attn}.softmax", Role.SOFTMAX), heads, head_dim),
        Linear(Operand(f"{attn}.out_input", Role.INPUT), (f"{attn}.to_out.0",)),
    )


def cross_attention(attn: str, heads: int, head_dim: int) -> tuple[Linear | Attention, ...]:
    """Return the matmuls of an attention to the tokens of a prompt, whose key and value no timestep changes."""
    query, softmax = Operand(f"{attn}.query", Role.QUERY, heads), Operand(f"{attn}.softmax", Role.SOFTMAX)
    key, value = (Operand(f"{attn}.{role.value}", role, heads, timed=False) for role in (Role.KEY, Role.VALUE))
    prompt = Operand(f"{attn}.kv_input", Role.INPUT, timed=False, quantized_by_row=True)
    return (
        Linear(Operand(f"{attn}.q_input", Role.INPUT, quantized_by_row=True), (f"{attn}.to_q",)),
        Linear(prompt, (f"{attn}.to_k", f"{attn}.to_v")),
        Attention(attn, query, key, value, softmax, heads, head_dim, context=True),
        Linear(Operand(f"{attn}.out_input", Role.INPUT), (f"{attn}.to_out.0",)),
    )


def feed_forward(ff: str) -> tuple[Linear, Linear]:
    """Return the two layers of diffusers' `FeedForward` with GELU between them; `ff`: its path."""
    return (
        Linear(Operand(f"{ff}.fc1_input", Role.INPUT, quantized_by_row=True), (f"{ff}.net.0.proj",)),
        Linear(Operand(f"{ff}.fc2_input", Role.GELU), (f"{ff}.net.2",)),
    )


def attention_params(parts: Parts, attention: Attention, prefix: str = "") -> dict[str, ActivationParams]:
    """Return the operands of an attention by the names that `IntBlock` has for them."""
    names = ("query", "key", "value", "softmax")
    pairs = zip(names, attention.operands, strict=True)
    return {prefix + name: parts.operand(operand) for name, operand in pairs}


def integer_block(parts: Parts, block: Block, kind: type[Any], layers: Iterable[str] = SELF_ATTENTION) -> Any:
    """Return a block of the class `kind`, an `IntBlock`, with the layers, operands and places for adapters of `block`.

    `layers`: the names that `IntBlock` has for the block's linear layers, in the order of the graph.
    """
    linears = dict(zip(layers, block.linears, strict=True))
    operands: dict[str, ActivationParams] = {}
    for attention in block.attentions:
        operands |= attention_params(parts, attention, "cross_" if attention.context else "")
    (heads,) = {attention.heads for attention in block.attentions}
    made = kind({name: parts.linear(linear) for name, linear in linears.items()}, operands, heads, parts.backend)
    parts.add_slots(made, block.prefix, linears, closed=block.float_input)
    return made
