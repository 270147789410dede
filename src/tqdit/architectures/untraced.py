"""Make a `Graph` of any model from its modules alone, where no call is at hand.

Nothing is known of the inputs of layers, so every large linear layer inside of a repeated block has an input of its
own, and all others stay in float.
"""

from collections.abc import Collection, Iterator

from torch import nn

from tqdit.architectures.traced_graph import block_prefix, smallest_of, timestep_argument
from tqdit.errors import InputError
from tqdit.graph import Block, Graph, Linear, Operand, Role

OUTSIDE = "outside of the repeated blocks"
ASKED = "left in float as asked"


def untraced_graph(model: nn.Module, smallest: int | None = None, left: Collection[str] = ()) -> Graph:
    """Return the graph of a model's linear layers in repeated blocks.

    Layers with fewer than `smallest` inputs or outputs stay in float; by default it is as of `traced_graph.trace`.
    `left`: names of layers that stay in float too, or of modules with all layers inside, each a whole path or a part
    of one: "transformer_blocks.0", "to_out".
    Raises `InputError` for a model that has nothing to quantize, and for a name in `left` that no layer has.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for part in left:
        if not any(_is_in(part, name) for name in layers):
            raise InputError(f"{type(model).__name__} has no linear layer '{part}' to leave in float")
    if smallest is None:
        smallest = smallest_of(module.weight.shape for module in layers.values())
    kept = {name: reason for name, module in layers.items() if (reason := _reason(model, name, module, smallest, left))}
    found: dict[str, list[Linear]] = {}
    for name in layers.keys() - kept.keys():
        found.setdefault(block_prefix(model, name), []).append(_linear(name))
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear layer of {smallest} inputs and outputs in repeated blocks"
        )
    blocks = tuple(Block(prefix, tuple(_ordered(layers, found[prefix]))) for prefix in sorted(found, key=_natural))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return Graph(blocks, (), shapes, (), kept, timestep_argument(model))


def _reason(model: nn.Module, name: str, module: nn.Linear, smallest: int, left: Collection[str]) -> str:
    """Return why a layer stays in float, or nothing."""
    if any(_is_in(part, name) for part in left):
        return ASKED
    if not block_prefix(model, name):
        return OUTSIDE
    least = min(module.weight.shape)
    return f"small: {least} inputs or outputs, fewer than {smallest}" if least < smallest else ""


def _is_in(part: str, name: str) -> bool:
    """Say whether a path has a part, which begins and ends where names do."""
    return f".{part}." in f".{name}."


def _linear(name: str) -> Linear:
    return Linear(Operand(f"{name}.input", Role.INPUT, quantized_by_row=True, apart=True, feed="unknown"), (name,))


def _ordered(layers: dict[str, nn.Linear], found: list[Linear]) -> Iterator[Linear]:
    """Return linear layers in the order in which the model has them."""
    order = {name: index for index, name in enumerate(layers)}
    return iter(sorted(found, key=lambda linear: order[linear.modules[0]]))


def _natural(prefix: str) -> tuple[str, int]:
    """Return a key that sorts "blocks.10" after "blocks.9"."""
    name, _, index = prefix.rpartition(".")
    return name, int(index)
