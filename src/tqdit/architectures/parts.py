"""`Parts`: what an architecture assembles an integer model from, made out of a Solution."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tqdit.architectures.interface import Graph, Linear, Operand
from tqdit.layers.block import IntBlock
from tqdit.layers.codes import Place
from tqdit.layers.linear import FloatLinear, FloatPatchEmbed, IntLinear, WeightOnlyLinear, WeightOnlyPatchEmbed
from tqdit.layers.params import ActivationParams
from tqdit.ops.schema import Backend, WeightParams
from tqdit.spec import Solution


class Parts:
    """Makes the layers of one model out of a solution that fits it.

    `model` is diffusers' own, its parameters empty; an architecture puts integer modules into it. `places`, `sites` and
    `float_ends` say afterwards where every weight, every activation site and every end in float is.
    """

    def __init__(self, solution: Solution, backend: Backend, graph: Graph, model: nn.Module) -> None:
        self.solution, self.backend, self.graph, self.model = solution, backend, graph, model
        self.places: dict[str, Place] = {}
        self.sites: dict[str, ActivationParams] = {}
        self.float_ends: dict[str, nn.Module] = {}
        self._float_inputs: dict[tuple[int, ...], nn.Module] = {}

    def operand(self, operand: Operand) -> ActivationParams:
        """Return the parameters of an activation operand."""
        self.sites[operand.name] = ActivationParams(self.solution.params[operand.name])
        return self.sites[operand.name]

    def linear(self, linear: Linear) -> IntLinear:
        """Return layers that read one operand, stacked along their outputs."""
        weights = [self._weight(module) for module in linear.modules]
        biases = [self._bias(module) for module in linear.modules]
        layer = self.backend.prepare(_stacked(weights), _stacked_biases(biases))
        self._place(linear.modules, layer)
        return IntLinear(self.operand(linear.source), layer)

    def quantized(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the layers of `names` whose weights are codes. The others keep their float weights."""
        return tuple(name for name in names if f"{name}.weight" in self.solution.params)

    def keep_float_ends(self) -> None:
        """Put layers in fp32 where the ends of the model are not quantized; `fill` gives them their parameters."""
        for name in set(self.graph.ends) - set(self.quantized(self.graph.ends)):
            module = self.model.get_submodule(name)
            if isinstance(module, nn.Conv2d):
                self.replace(name, FloatPatchEmbed.like(module, self.backend))
            elif isinstance(module, nn.Linear):
                self.replace(name, FloatLinear.like(module, self.backend))
            self.float_ends[name] = self.model.get_submodule(name)

    def float_input(self, name: str) -> nn.Module:
        """Return a layer on float inputs, for the linear layer or patch convolution of that name."""
        weight, bias = self._weight(name), self._bias(name)
        key = tuple(0 if tensor is None else tensor.data_ptr() for tensor in (weight.codes, weight.scale, bias))
        if key not in self._float_inputs:  # an artifact stores a tied layer once: hold it once
            self._float_inputs[key] = self.backend.prepare_float_input(weight, bias)
        self._place([name], self._float_inputs[key])
        linear = WeightOnlyLinear(self._float_inputs[key], self.backend)
        module = self.model.get_submodule(name)
        return WeightOnlyPatchEmbed(linear, module.stride[0]) if isinstance(module, nn.Conv2d) else linear

    def stacked_float_input(self, names: Sequence[str]) -> WeightOnlyLinear:
        """Return several layers that read the same float input as one."""
        weights = _stacked([self._weight(name) for name in names])
        layer = self.backend.prepare_float_input(weights, _stacked_biases([self._bias(name) for name in names]))
        self._place(names, layer)
        return WeightOnlyLinear(layer, self.backend)

    def add_slots(
        self, block: IntBlock, prefix: str, linears: Mapping[str, Linear], closed: Iterable[str] = ()
    ) -> None:
        """Make places for adapters in a block at `prefix`, by the names of the float model's layers.

        `linears`: the block's layers by the name that it has for them. `closed`: layers without a place.
        """
        inside = len(prefix) + 1
        names = {layer: [name[inside:] for name in linear.modules] for layer, linear in linears.items()}
        shapes = {
            name[inside:]: self.graph.shapes[f"{name}.weight"] for linear in linears.values() for name in linear.modules
        }
        block.add_slots(names, shapes, closed=[name[inside:] for name in closed])

    def fill(self, module: nn.Module, prefix: str = "") -> nn.Module:
        """Put the parameters that stay in float where those of a module are. `prefix`: of their names.

        Not all of them are empty: a class may draw the first values of a table at random. An end in float gets copies,
        as layers on codes do: a change of them changes no other model of the same solution.
        """
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta or prefix + name in self.solution.floats:
                value = self.solution.floats[prefix + name]
                value = value.clone() if (prefix + name).rpartition(".")[0] in self.float_ends else value
                _set(module, name, nn.Parameter(value, requires_grad=False))
        return module

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module at a dotted path of the model."""
        _set(self.model, name, module)

    def _weight(self, module: str) -> WeightParams:
        name = f"{module}.weight"
        params, codes = self.solution.params[name], self.solution.codes[name]
        return WeightParams(codes.flatten(1), params.scale.reshape(-1), params.spec.bits)

    def _bias(self, module: str) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self.solution.floats[name] if name in self.graph.shapes else None

    def _place(self, modules: Iterable[str], layer: nn.Module) -> None:
        """Note that the weights of `modules` are those of `layer`, one under the other."""
        first = 0
        for name in modules:
            shape = self.graph.shapes[f"{name}.weight"]
            self.places[f"{name}.weight"] = Place(layer, slice(first, first + shape[0]), shape)
            first += shape[0]


def _stacked(weights: list[WeightParams]) -> WeightParams:
    if len(weights) == 1:
        return weights[0]
    scales = [w.scale.expand(len(w.codes)) for w in weights]  # per tensor or per channel
    return WeightParams(torch.cat([w.codes for w in weights]), torch.cat(scales), max(w.bits for w in weights))


def _stacked_biases(biases: list[torch.Tensor | None]) -> torch.Tensor | None:
    given = [bias for bias in biases if bias is not None]
    assert len(given) in (0, len(biases)), "layers that are stacked all have a bias, or none has"
    return torch.cat(given) if given else None


def _set(model: nn.Module, name: str, value: Any) -> None:
    """Set the submodule or parameter at a dotted path."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value  # accelerate changes `register_parameter` while another thread loads a model
    elif isinstance(owner, nn.Sequential | nn.ModuleList):
        owner[int(leaf)] = value
    else:
        setattr(owner, leaf, value)
