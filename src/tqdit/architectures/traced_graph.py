"""Make the `Graph` of any model from one call of it: which linear layers are quantized, in which blocks, on what input.

A layer is quantized with its input if it was called inside a repeated block, on rows of tokens that depend on the
sample or on the timestep and the prompt, and is large enough. The weights of the other layers that were called are
quantized alone. What cannot be quantized without harm is left in float, with the reason.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures.tensor_origins import GELU, PROMPT, SAMPLE, TIME
from tqdit.architectures.tracing import FLOATS, LayerCall, Trace, tensors_in, watch
from tqdit.errors import InputError
from tqdit.graph import Block, Graph, Linear, Operand
from tqdit.spec import Role

TIMESTEPS = ("timestep", "timesteps", "t")  # the names that models have for their time argument
# A tile of a matrix unit is 128 to 256 wide: a smaller layer gains nothing there, and has few of a model's weights.
SMALLEST = 256
NEVER_CALLED = "never called"
READ_ELSEWHERE = "its weight is read by other code"
EXPERTS = "expert weights as one parameter of 3 axes: no linear layer"
SEVERAL_NAMES = "one layer of several names"
POINTWISE = "a 1x1 convolution: no linear layer"


def trace(model: nn.Module, arguments: Mapping[str, Any], timestep: str, smallest: int | None = None) -> Graph:
    """Call a model once, and return the graph of its matmuls. The model is left as it was.

    `arguments` are the keyword arguments of the call. `timestep` is the name of the one that is the time. Layers with
    fewer than `smallest` inputs or outputs keep a float input: 256 by default, or half of the width that most layers
    of the model have if that is less. The graph's shapes are those of the model's state dict.

    Raises `InputError` for arguments that do not fit, for a layer that reads numbers of an unusual type, and for a
    model with nothing to quantize.
    """
    facts = watch(model, arguments, _sample_argument(model, arguments, timestep), timestep)
    sizes = {name: _linear(model, name).weight.shape for name in facts.calls}  # (out, in) each
    smallest = smallest_of(sizes.values()) if smallest is None else smallest
    left = _left(model, facts, smallest)
    calls = {name: found for name, found in facts.calls.items() if name not in left}
    quantized = {
        name: prefix
        for name, found in calls.items()
        if (prefix := block_prefix(model, name))
        and min(sizes[name]) >= smallest
        and not any(_float_input(call, facts.samples) for call in found)
    }
    if not quantized:
        raise InputError(f"{type(model).__name__} has no linear layer in repeated blocks that can be quantized")
    blocks = _blocks(model, calls, quantized)
    inside = {name for block in blocks for name in block.float_input}
    outside = tuple(name for name in calls if name not in quantized and name not in inside)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return Graph(blocks, outside, shapes, _ends(outside, calls, quantized), left, timestep)


def timestep_argument(model: nn.Module) -> str:
    """Return the name of the time argument of a model's forward. Raises `InputError` that names the class."""
    names = inspect.signature(model.forward).parameters
    if found := [name for name in TIMESTEPS if name in names]:
        return found[0]
    raise InputError(f"the forward of {type(model).__name__} has no argument {' or '.join(map(repr, TIMESTEPS))}")


def _sample_argument(model: nn.Module, arguments: Mapping[str, Any], timestep: str) -> str:
    """Return the name of the argument that is denoised, the first of the forward, once the arguments are checked."""
    kind, sample = type(model).__name__, next(iter(inspect.signature(model.forward).parameters), "")
    for name in (sample, timestep):
        if name not in arguments:
            raise InputError(f"a call of {kind} to trace has no argument '{name}'")
    if next(tensors_in(arguments[sample]), None) is None:
        raise InputError(f"the argument '{sample}' of {kind} holds no tensor")
    return sample


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def _parameters(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Return every parameter by each of its names, in the order of the state dict."""
    return model.named_parameters(remove_duplicate=False)


def smallest_of(sizes: Iterable[torch.Size]) -> int:
    """Return the least width of a layer on codes: `SMALLEST`, or half of the width that most layers have if less."""
    widths = Counter(size[1] for size in sizes)
    return min(SMALLEST, widths.most_common(1)[0][0] // 2) if widths else SMALLEST


def _float_input(call: LayerCall, samples: int) -> bool:
    """Say whether the input of a call stays in float.

    It does if it has one row a sample, as modulation has; if it is a function of the timestep alone, which may have a
    row for each of a model's layers; or if it depends on the prompt alone, so that a run computes it once.
    """
    mixed = SAMPLE in call.depends or {TIME, PROMPT} <= call.depends
    return call.rows <= samples or not mixed


# What stays in float.


def _left(model: nn.Module, facts: Trace, smallest: int) -> dict[str, str]:
    """Return the layers that stay in float, in the order of the model, with the reasons."""
    left = {}
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and names[id(module)] > 1:  # replaced by one name, it would stay by another
            left[name] = SEVERAL_NAMES
        elif isinstance(module, nn.Linear) and (reason := _reason(model, name, module, facts)):
            left[name] = reason
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(module.kernel_size) == {1}:
            left[name] = POINTWISE
    for name, parameter in _parameters(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        matrices = parameter.ndim == 3 and parameter.shape[0] > 1 and min(parameter.shape[1:]) >= smallest
        if matrices and not isinstance(owner, nn.Conv1d):
            left[name] = EXPERTS
    return left


def _reason(model: nn.Module, name: str, module: nn.Linear, facts: Trace) -> str | None:
    """Return why a linear layer stays in float; None for one that can be quantized."""
    weight = module.weight
    if type(module).forward is not nn.Linear.forward:
        return f"a {type(module).__name__}, which is no plain linear layer"
    if type(weight.data) is not torch.Tensor or weight.dtype not in FLOATS:
        return f"its weight is a {type(weight.data).__name__} of {weight.dtype}, which is no plain float weight"
    if any(hasattr(parent, "base_layer") for parent in _parents(model, name)):
        return "part of an adapter: fuse or unload adapters before quantizing"
    if name in facts.elsewhere:
        return READ_ELSEWHERE
    return None if name in facts.calls else NEVER_CALLED


def _parents(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that a path leads through, from the model on."""
    keys = name.split(".")
    return [model.get_submodule(".".join(keys[:end])) for end in range(len(keys))]


# Blocks.


def block_prefix(model: nn.Module, name: str) -> str:
    """Return the path of the outermost entry of a list of modules that a layer is in; "" if there is none."""
    keys = name.split(".")
    for end, parent in enumerate(_parents(model, name)):
        if isinstance(parent, nn.ModuleList) and end < len(keys) - 1:
            return ".".join(keys[: end + 1])
    return ""


def _blocks(model: nn.Module, calls: Mapping[str, list[LayerCall]], quantized: Mapping[str, str]) -> tuple[Block, ...]:
    """Return the blocks in the order of their first call, each with its matmuls and its other layers in such order."""
    prefixes = dict.fromkeys(quantized.values())
    found = []
    for prefix in prefixes:
        names = [name for name, owner in quantized.items() if owner == prefix]
        others = [name for name in calls if name not in quantized and block_prefix(model, name) == prefix]
        found.append(Block(prefix, _matmuls(names, calls), tuple(others)))
    return tuple(found)


def _matmuls(names: Iterable[str], calls: Mapping[str, list[LayerCall]]) -> tuple[Linear, ...]:
    """Return linear layers, those that read one tensor together. A layer called on several has an operand alone."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        values = {call.value for call in calls[name]}
        groups.setdefault(values.pop() if len(values) == 1 else name, []).append(name)
    return tuple(Linear(_operand(modules[0], calls[modules[0]]), tuple(modules)) for modules in groups.values())


def _operand(module: str, calls: list[LayerCall]) -> Operand:
    feed = " or ".join(dict.fromkeys(call.word for call in calls))
    role = Role.GELU if feed in GELU else Role.INPUT
    return Operand(f"{module}.input", role, quantized_by_row=True, apart=True, feed=feed)


def _ends(outside: Iterable[str], calls: Mapping[str, list[LayerCall]], quantized: Iterable[str]) -> tuple[str, ...]:
    """Return the layers that read what depends on the sample before all blocks or after them.

    `outside` has the layers outside of blocks, `quantized` those inside.
    """
    first = min(calls[name][0].order for name in quantized)
    last = max(calls[name][-1].order for name in quantized)
    reads = {name: calls[name][0] for name in outside if SAMPLE in calls[name][0].depends}
    return tuple(name for name, call in reads.items() if not first < call.order < last)
