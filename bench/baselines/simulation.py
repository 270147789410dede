"""Run a float model with quantized operands: weights replaced, inputs and attention through quantizers.

`Taps` and its attention processor watch the model; a hook before the output projection puts the attention of quantized
operands in the place of the float one.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from baselines.fake import Grid, Quantizer, by_rows, static
from baselines.observed import Observed
from tqdit.architectures import registry
from tqdit.architectures.attention import Computed
from tqdit.architectures.interface import Attention, Graph, Linear, Operand
from tqdit.calibration.taps import Taps


@dataclass
class Plan:
    """A model as a method quantized it.

    `weights`: weights in float, by their names. `inputs` and `operands`: quantizers of the inputs of linear layers and
    of the attentions' operands, by their sites' names. What is missing stays in float. `notes`: the method's choices,
    as JSON values.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, Quantizer] = field(default_factory=dict)
    operands: dict[str, Quantizer] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """The input of a method: the float model, its matmuls, its statistics, and the bits of weights and activations."""

    model: nn.Module
    graph: Graph
    observed: Observed
    weight_bits: int
    activation_bits: int

    @property
    def linears(self) -> Iterator[Linear]:
        """All quantized linear layers, by the operand they read."""
        return (linear for block in self.graph.blocks for linear in block.linears)

    @property
    def attentions(self) -> Iterator[Attention]:
        """All attentions."""
        return (attention for block in self.graph.blocks for attention in block.attentions)

    def weight(self, linear: Linear) -> torch.Tensor:
        """Return the float weights of all modules of a linear layer, stacked: (out, in)."""
        return torch.cat([self.model.get_submodule(name).weight.detach() for name in linear.modules])

    def split(self, linear: Linear, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a stacked weight as the modules' own, by name."""
        sizes = [self.graph.shapes[name][0] for name in linear.weights]
        return dict(zip(linear.weights, weight.split(sizes), strict=True))

    def rounded(self, grid: Callable[[torch.Tensor, int], Grid]) -> dict[str, torch.Tensor]:
        """Return all weights rounded to nearest, each module with the grid that `grid` makes of its weight and bits."""
        parts = (self.split(linear, self.weight(linear)) for linear in self.linears)
        weights = {name: weight for part in parts for name, weight in part.items()}
        return {name: grid(weight, self.weight_bits)(weight) for name, weight in weights.items()}

    def static_operands(self) -> dict[str, Quantizer]:
        """Return static min-max quantizers, per tensor, of all operands of the attentions."""
        ranges = self.observed.operands.items()
        return {name: static(seen.low, seen.high, self.activation_bits) for name, seen in ranges}

    def dynamic_operands(self) -> dict[str, Quantizer]:
        """Return quantizers per token and head, and per row of probabilities, of all operands of the attentions.

        The scales of tokens do not factor out of the sum over tokens in the product of probabilities and values. The
        simulation grants them all the same, in favour of the method.
        """
        return {name: by_rows(self.activation_bits) for name in self.observed.operands}


Method = Callable[[Context], Plan]


def foldable(linear: Linear) -> bool:
    """Say whether a linear layer reads what adaLN modulates, so that factors of its channels fold into the modulation.

    Those are the inputs of the query, key and value projections and of the first layer of the feed-forward network.
    """
    return linear.source.name.endswith((".qkv_input", ".fc1_input"))


def follows_attention(linear: Linear) -> bool:
    """Say whether a linear layer is an attention's output projection, so that factors fold into the values."""
    return linear.source.name.endswith(".out_input")


@contextmanager
def simulated(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Yield a copy of a float model that computes under a plan; `model` itself stays as it is."""
    twin, graph = copy.deepcopy(model), registry.graph(registry.config_of(model))
    for name, weight in plan.weights.items():
        twin.get_parameter(name).data.copy_(weight)
    taps, running = Taps(), _Running(plan)
    with taps.attached(twin, graph.blocks), taps.sending_to(running):
        for block in graph.blocks:
            for linear in block.linears:
                for name in linear.modules:
                    twin.get_submodule(name).register_forward_pre_hook(partial(running.quantized, linear))
        yield twin


class _Running:
    """A sink of `Taps` that computes attention with quantized operands, and hooks that quantize inputs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.attended: torch.Tensor | None = None  # of the attention whose output projection is next
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # an input and what it was quantized to

    def linear_input(self, linear: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Ignore a watched input: the hooks quantize it."""

    def linear_output(self, linear: Linear, module: str, z: torch.Tensor) -> None:
        """Ignore a watched output."""

    def attention(self, attention: Attention, computed: Computed) -> None:
        """Compute the attention again with quantized operands."""
        names = (attention.query, attention.key, attention.value)
        tensors = (computed.query, computed.key, computed.value)
        q, k, v = (self._operand(operand, x) for operand, x in zip(names, tensors, strict=True))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if computed.bias is not None:
            scores = scores + computed.bias[:, None, None]
        probabilities = self._operand(attention.probabilities, scores.softmax(-1))
        self.attended = (probabilities @ v).transpose(1, 2).flatten(2)

    def quantized(self, linear: Linear, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the arguments of a linear layer with its input quantized. Layers of one input share the work."""
        x = args[0]
        if self.last is None or self.last[0] is not x:
            value = x
            if follows_attention(linear):
                assert self.attended is not None
                value, self.attended = self.attended, None
            quantizer = self.plan.inputs.get(linear.source.name)
            self.last = (x, value if quantizer is None else quantizer(value))
        return (self.last[1], *args[1:])

    def _operand(self, operand: Operand, x: torch.Tensor) -> torch.Tensor:
        quantizer = self.plan.operands.get(operand.name)
        return x if quantizer is None else quantizer(x)
