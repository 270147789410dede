"""Compute a float model in which one site alone is quantized: a simulation, which says what that site costs.

Weights become the values of their codes, and activations are rounded to their grid, in float arithmetic. So the error
is that of rounding, not that of an integer kernel. It is never timed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from tqdit.architectures.attention import OpenAttention, opened
from tqdit.graph import Attention, Graph, Linear
from tqdit.ops.rotation import rotate
from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import operand, parameters
from tqdit.spec import GridParams, Solution
from tqdit.system.hooks import hooks


@dataclass
class OneSite:
    """A float model whose sites can be quantized one at a time.

    `group`: the time group of each sample of the present call, (1,) or (B,). `active`: the sites that are quantized
    now. `seen`: is given the name and the coded form of every activation (see `coded_form`) while it is set.
    """

    model: nn.Module
    graph: Graph
    solution: Solution
    group: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    active: frozenset[str] = frozenset()
    seen: Callable[[str, torch.Tensor], None] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the inputs of linear layers and the operands of attention; the model is restored at the end."""
        with hooks() as keep, opened() as replace:
            for block in self.graph.blocks:
                for linear in block.linears:
                    for place, name in enumerate(linear.modules):
                        hook = partial(self._input, linear, place == 0)
                        keep(self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
                for attention in block.attentions:
                    computed = OpenAttention(_nothing, _nothing, partial(self._operand, attention))
                    replace(self.model.get_submodule(attention.module), computed)
            yield

    @contextmanager
    def quantizing(self, sites: Sequence[str]) -> Iterator[None]:
        """Quantize some sites until the context ends."""
        weights = [name for name in sites if name in self.solution.codes]
        kept = {name: self.model.get_parameter(name).data for name in weights}
        self.active = frozenset(sites)
        try:
            for name, before in kept.items():
                self.model.get_parameter(name).data = dequantized(self.solution, self.graph, name).to(before)
            yield
        finally:
            self.active = frozenset()
            for name, before in kept.items():
                self.model.get_parameter(name).data = before

    def _input(self, linear: Linear, first: bool, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Replace the input of a layer, which is its first argument."""
        name = linear.source.name
        if name not in self.solution.params:
            return None
        if self.seen is not None and first:
            value = args[0] if args else next(iter(kwargs.values()))
            self.seen(name, self._rows(name, value))
        if name not in self.active:
            return None
        if args:
            return (self._rounded_rows(name, args[0]), *args[1:]), kwargs
        key = next(iter(kwargs))
        return args, {**kwargs, key: self._rounded_rows(name, kwargs[key])}

    def _operand(self, attention: Attention, place: int, x: torch.Tensor) -> torch.Tensor:
        name = attention.operands[place].name
        if self.seen is not None:
            self.seen(name, x)
        return self._rounded(name, x) if name in self.active else x

    def _rows(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return an input (samples, rows, C) in its coded form; there is one sample where all have one group."""
        samples = len(self.group) if x.ndim > 1 and len(x) % len(self.group) == 0 else 1
        return coded_form(x.reshape(samples, -1, x.shape[-1]), self.solution.params[name])

    def _rounded_rows(self, name: str, x: torch.Tensor) -> torch.Tensor:
        params = self.solution.params[name]
        values = plain_form(self._rounded(name, self._rows(name, x)), params)
        return values.reshape(x.shape).to(x.dtype)

    def _rounded(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the values of the codes of x, which is in coded form."""
        at = self.operand(name, x.device)
        p = parameters(at, x.ndim)
        return at.grid.fake_quantize(x, p.scale, p.coarse, p.zero_point, at.bits).to(x.dtype)

    def operand(self, name: str, device: torch.device) -> OperandParams:
        """Return the parameters of an activation for the present call."""
        found = operand(self.solution.params[name])
        group = None if len(found.table) == 1 else self.group.to(device)
        return found._replace(table=found.table.to(device), group=group, channels=None)


def coded_form(x: torch.Tensor, params: GridParams) -> torch.Tensor:
    """Return x (..., C) as its codes see it: multiplied by its channels' factors, then rotated."""
    values = x if params.channels is None else x.float() * params.channels.to(x.device)
    return rotate(values, params.rotation) if params.rotation else values


def plain_form(values: torch.Tensor, params: GridParams) -> torch.Tensor:
    """Return the inverse of `coded_form`."""
    values = rotate(values, params.rotation) if params.rotation else values  # a rotation is its own inverse
    return values if params.channels is None else values / params.channels.to(values.device)


def dequantized(solution: Solution, graph: Graph, name: str) -> torch.Tensor:
    """Return the values of a weight's codes, fp32 in the shape of the weight, for float inputs of the layer."""
    codes, scale = solution.codes[name], solution.params[name].scale[0]
    values = codes.float() * scale.reshape(-1, *[1] * (codes.ndim - 1))
    source = source_of(graph, name)
    if source is None or source not in solution.params:
        return values
    params = solution.params[source]
    values = rotate(values, params.rotation) if params.rotation else values
    return values if params.channels is None else values * params.channels


def coded_weight(weight: torch.Tensor, solution: Solution, graph: Graph, name: str) -> torch.Tensor:
    """Return a float weight as its codes see it: divided by its input's factors, then rotated; fp32 on the CPU."""
    source = source_of(graph, name)
    values = weight.detach().float().cpu()
    if source is None or source not in solution.params:
        return values
    params = solution.params[source]
    values = values if params.channels is None else values / params.channels
    return rotate(values, params.rotation) if params.rotation else values


def source_of(graph: Graph, weight: str) -> str | None:
    """Return the site that a layer of a block reads; None for a layer on float inputs."""
    for block in graph.blocks:
        for linear in block.linears:
            if weight in linear.weights:
                return linear.source.name
    return None


def _nothing(_: Any) -> None:
    """Take what is computed, and keep nothing."""
