"""`convert`: a Solution becomes a runnable transformer. The sole place where modules are swapped."""

from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.layers.attention import IntAttention
from tqdit.layers.clock import TimestepClock
from tqdit.layers.linear import IntFeedForward, IntLinear, WeightOnlyLinear, WeightOnlyPatchEmbed
from tqdit.layers.params import ActivationParams, QuantizedWeight
from tqdit.models.sites import BlockLayout, LinearGroup, blocks, float_input_modules
from tqdit.ops.dispatch import get_backend, kernel_name
from tqdit.ops.schema import Backend
from tqdit.spec import Role, Solution


def convert(solution: Solution, backend: str = "auto") -> nn.Module:
    """A diffusers `DiTTransformer2DModel` whose sites run on the codes of `solution`, in eval mode, on the CPU.

    The float weights are never materialised: the structure is built empty and filled. The result has
    `quantization_backend` and `quantization_report` (site name -> kernel). Raises `InputError` if the solution
    lacks a site or a parameter of the model.
    """
    from accelerate import init_empty_weights
    from diffusers import DiTTransformer2DModel

    chosen = get_backend(backend)
    with init_empty_weights(include_buffers=False):
        model = DiTTransformer2DModel.from_config(dict(solution.model_config))
    builder = _Builder(solution, chosen, model)
    for name in float_input_modules(solution.model_config):
        _replace(model, name, builder.float_input(model.get_submodule(name), name))
    for block in blocks(solution.model_config):
        heads = int(solution.model_config["num_attention_heads"])
        _replace(model, block.attention, builder.attention(block, heads))
        _replace(model, f"{block.prefix}.ff", builder.feed_forward(block))
    builder.fill_floats(model)
    builder.check_complete(model)

    model.add_module("clock", builder.clock)
    model.register_forward_pre_hook(builder.clock.pre_hook, with_kwargs=True, prepend=True)
    model.quantization_backend = chosen.NAME
    model.quantization_report = {site.name: kernel_name(site, chosen) for site in solution.sites}
    return model.eval().requires_grad_(False)


class _Builder:
    """Makes the layers of one model and keeps count of what it used. `model` is empty: it says what is needed."""

    def __init__(self, solution: Solution, backend: Backend, model: nn.Module) -> None:
        self.solution = solution
        self.backend = backend
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.clock = TimestepClock(solution.time_groups)
        self.used: set[str] = set()

    def weight(self, name: str) -> QuantizedWeight:
        try:
            params, codes = self.solution.params[name], self.solution.codes[name]
        except KeyError:
            raise InputError(f"the solution has no codes for weight site '{name}'") from None
        self._check_shape(name, codes)
        self.used.add(name)
        return QuantizedWeight(codes, params)

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter that stays in float."""
        if name not in self.solution.floats:
            raise InputError(f"the solution has no value for parameter '{name}'")
        value = self.solution.floats[name]
        self._check_shape(name, value)
        self.used.add(name)
        return value

    def bias(self, module: str) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self.parameter(name) if name in self.shapes else None

    def site(self, name: str, ndim: int) -> ActivationParams:
        if name not in self.solution.params:
            raise InputError(f"the solution has no parameters for activation site '{name}'")
        self.used.add(name)
        return ActivationParams(self.solution.params[name], self.clock, ndim)

    def linears(self, group: LinearGroup) -> list[IntLinear]:
        source = self.site(group.source, 3)
        return [IntLinear(self.weight(f"{m}.weight"), self.bias(m), source, self.backend) for m in group.modules]

    def attention(self, block: BlockLayout, heads: int) -> IntAttention:
        to_q, to_k, to_v = self.linears(block.qkv)
        operands = {
            role.value: self.site(block.operand(role), 4) for role in (Role.QUERY, Role.KEY, Role.VALUE, Role.SOFTMAX)
        }
        return IntAttention((to_q, to_k, to_v), self.linears(block.out)[0], operands, heads, self.backend)

    def feed_forward(self, block: BlockLayout) -> IntFeedForward:
        return IntFeedForward(self.linears(block.fc1)[0], self.linears(block.fc2)[0])

    def float_input(self, module: nn.Module, name: str) -> nn.Module:
        linear = WeightOnlyLinear(self.weight(f"{name}.weight"), self.bias(name), self.backend)
        if isinstance(module, nn.Conv2d):
            linear.weight.codes = linear.weight.codes.flatten(1)
            return WeightOnlyPatchEmbed(linear, module.stride[0])
        return linear

    def fill_floats(self, model: nn.Module) -> None:
        """Put the parameters that stay in float where the empty ones are."""
        for name, _ in list(model.named_parameters()):
            _replace(model, name, nn.Parameter(self.parameter(name), requires_grad=False))

    def check_complete(self, model: nn.Module) -> None:
        """Nothing empty is left in the model, and nothing of the solution is left over."""
        empty = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
        assert not empty, f"not filled: {empty}"
        given = {*self.solution.params, *self.solution.floats}
        if extra := sorted(given - self.used):
            raise InputError(f"the solution has '{extra[0]}', which this model has no place for")

    def _check_shape(self, name: str, value: torch.Tensor) -> None:
        if value.shape != self.shapes[name]:
            raise InputError(
                f"parameter '{name}' has shape {tuple(value.shape)}, the model's is {tuple(self.shapes[name])}"
            )


def _replace(model: nn.Module, name: str, value: Any) -> None:
    """Set the submodule or parameter at a dotted path."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    elif isinstance(owner, nn.Sequential | nn.ModuleList):
        owner[int(leaf)] = value
    else:
        setattr(owner, leaf, value)
