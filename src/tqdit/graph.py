"""Define the graph of a model's matmuls as data: operands, layers that read them, attentions, blocks.

An architecture describes its graph, or a recorded call is traced. Calibration, search, packing and timing walk it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch


class Role(StrEnum):
    """The operand of a matmul that a site is."""

    WEIGHT = "weight"  # the weight of a matmul whose input is quantized too
    WEIGHT_ONLY = "weight_only"  # the weight of a layer that runs on float activations
    INPUT = "input"  # the input of a linear layer
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    SOFTMAX = "softmax"  # the left operand of P V
    GELU = "gelu"  # the input of the second feed-forward layer


@dataclass(frozen=True)
class Operand:
    """One activation operand of a matmul, which is one site.

    `name` is the site's name. `units` is the number of parts with a scale of their own: heads, or 1. An operand that
    is not `timed` has values that do not depend on the timestep, as the keys and values of a prompt: its site has one
    time group, and its rows are the tokens of the context. An operand that is `quantized_by_row` is written by the
    verb `quantize`, which has whole rows at hand: a scale for each row costs nothing there. An operand that is `apart`
    is quantized by an operation of its own that does nothing else, as in traced models; factors for its channels cost
    nothing there. `feed` says in words what makes the operand, such as "GELU tanh", for reports.
    """

    name: str
    role: Role
    units: int = 1
    timed: bool = True
    quantized_by_row: bool = False
    apart: bool = False
    feed: str = ""


@dataclass(frozen=True)
class Linear:
    """Linear layers that read one operand: query, key and value projections, or a single layer.

    `modules` are their paths in the model, in the order in which their outputs are stacked.
    """

    source: Operand
    modules: tuple[str, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the layers' weights, which are sites too."""
        return tuple(f"{module}.weight" for module in self.modules)


@dataclass(frozen=True)
class Attention:
    """The two matmuls of one attention, softmax(Q K^T / sqrt(head_dim) + bias) V.

    `module` is the path of diffusers' `Attention`, whose processor computes them. With `context`, keys and values
    belong to the tokens of a prompt (cross-attention), and a call may have a bias that masks some of them.
    """

    module: str
    query: Operand
    key: Operand
    value: Operand
    probabilities: Operand
    heads: int
    head_dim: int
    context: bool = False

    @property
    def operands(self) -> tuple[Operand, Operand, Operand, Operand]:
        """Query, key, value and probabilities, in this order."""
        return self.query, self.key, self.value, self.probabilities

    @property
    def width(self) -> int:
        """Channels of all heads together."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Block:
    """One repeated block: its quantized matmuls in the order of the forward pass.

    `float_input` are the layers whose weights are quantized and whose inputs are not, such as those that modulate.
    """

    prefix: str
    matmuls: tuple[Linear | Attention, ...]
    float_input: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The block's linear layers, by the operand they read."""
        return tuple(matmul for matmul in self.matmuls if isinstance(matmul, Linear))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The block's attentions."""
        return tuple(matmul for matmul in self.matmuls if isinstance(matmul, Attention))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Every activation operand of the block, in the order of the forward pass."""
        return tuple(operand for matmul in self.matmuls for operand in _operands(matmul))


@dataclass(frozen=True)
class Graph:
    """The matmuls of one model.

    `outside` are the layers on float inputs that belong to no block; `ends` are the first and the last of them, whose
    errors the image shows directly. `shapes` has the shape of every parameter by name, in the order in which the
    model has them; of a traced graph also those of the buffers in the model's state dict. `left` has the linear layers
    that stay in float, with the reason. `timestep` is the name of the argument of the model's forward that the time
    groups are of, where a graph was traced; "" for a class whose architecture describes it.
    """

    blocks: tuple[Block, ...]
    outside: tuple[str, ...]
    shapes: Mapping[str, torch.Size]
    ends: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    timestep: str = ""

    @property
    def float_input(self) -> tuple[str, ...]:
        """All layers on float inputs, inside and outside of blocks, in the order of the model's parameters."""
        modules = {*self.outside, *(name for block in self.blocks for name in block.float_input)}
        owners = (name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight"))
        return tuple(owner for owner in owners if owner in modules)

    @property
    def operands(self) -> Iterator[Operand]:
        """Every activation operand, block by block."""
        return (operand for block in self.blocks for operand in block.operands)

    def features(self, linear: Linear) -> tuple[int, int]:
        """Columns of a linear layer's input, and of the outputs of all its modules together."""
        shapes = [self.shapes[name] for name in linear.weights]
        return shapes[0][1:].numel(), sum(shape[0] for shape in shapes)


def _operands(matmul: Linear | Attention) -> tuple[Operand, ...]:
    return (matmul.source,) if isinstance(matmul, Linear) else matmul.operands
