"""Read what a model is called with: the names of its forward's arguments, its time argument and its latents."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import nn

from tqdit.architectures.traced_graph import TIMESTEPS
from tqdit.artifact.tensors import decisive
from tqdit.calibration import call_values
from tqdit.errors import InputError

CHANNELS = "in_channels"  # of a config


def same_module(module: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of `torch.compile`, or the model itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model and its modules into eval mode, without dropout, until the context ends."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def kind_of(model: nn.Module) -> str:
    """Return the name of a model's class, or of the diffusers class that one of ours stands for."""
    model = same_module(model)
    config: Mapping[str, Any] = getattr(model, "config", {})
    name = config.get("_class_name")
    return name if isinstance(name, str) else type(model).__name__


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the part of a model's config that decides what it computes, as JSON has it: tuples are lists."""
    config = getattr(same_module(model), "config", None)
    if not isinstance(config, Mapping):
        raise InputError(f"a {type(model).__name__} has no config; calls are those of diffusers models")
    found: dict[str, Any] = json.loads(json.dumps(decisive(config), default=str))
    return found


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of a model, and the dtype that most numbers of its parameters have.

    Some classes keep single parameters in fp32 beside bf16 weights; calls are in the dtype of the weights. The dtype of
    a quantized model is the one that it says.
    """
    device = next(model.parameters()).device
    if hasattr(model, "solution"):
        return device, cast(Any, model).dtype
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    if not counts:
        raise InputError(f"a {type(model).__name__} has no floating-point parameters")
    return device, max(counts, key=lambda dtype: counts[dtype])


def time_argument(module: nn.Module) -> str | None:
    """Return the name of the time argument of a model's forward; None if there is none."""
    parameters = inspect.signature(type(same_module(module)).forward).parameters
    return next((name for name in TIMESTEPS if name in parameters), None)


@dataclass(frozen=True)
class Signature:
    """The arguments of a model's forward, `timestep` being the name of its time."""

    kind: str
    timestep: str
    signature: inspect.Signature

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Read a model's forward. Raises `InputError` if it takes no time."""
        timestep = time_argument(model)
        if timestep is None:
            names = f"{', '.join(TIMESTEPS[:-1])} or {TIMESTEPS[-1]}"
            raise InputError(f"a {kind_of(model)} takes no {names}: it is no denoiser")
        # Offloading replaces the forward of an object, so the class is asked.
        whole = inspect.signature(type(same_module(model)).forward)
        return cls(kind_of(model), timestep, whole.replace(parameters=list(whole.parameters.values())[1:]))

    def bound(self, positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a call gives, by name. Raises `InputError` for arguments that the forward does not take."""
        try:
            given = self.signature.bind(*positional, **named).arguments
        except TypeError as error:
            raise InputError(f"these are no arguments of a {self.kind}: {error}") from None
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL and given.pop(name, ()):
                raise InputError(f"a {self.kind} is called with arguments without names, which are not supported")
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def kept(self, given: Mapping[str, Any], keep: call_values.Keep) -> dict[str, Any]:
        """Return copies of the arguments, `keep` making those of tensors.

        An object that cannot be stored is left out if it is the default. Raises `InputError` as `call_values.kept`
        does.
        """
        found: dict[str, Any] = {}
        for name, value in given.items():
            try:
                found[name] = call_values.kept(value, name, keep)
            except InputError:
                parameter = self.signature.parameters.get(name)
                if parameter is None or value is not parameter.default:
                    raise
        return found

    def check(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Raise `InputError` for arguments that a model of the config cannot take; latents are the first argument."""
        self.bound((), arguments)
        name = next(iter(self.signature.parameters))
        latents = [tensor for _, tensor in call_values.tensors(arguments.get(name))]
        if not latents or not all(tensor.numel() for tensor in latents):
            raise InputError(f"argument '{name}' must be a tensor with values, or a list of such")
        others = [t for key, value in arguments.items() if key != name for _, t in call_values.tensors(value)]
        for tensor in latents:
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise InputError(f"argument '{name}' is of {tensor.dtype}; legal are float32, float16 and bfloat16")
            self._check_channels(name, tensor, config, others)

    def _check_channels(
        self, name: str, tensor: torch.Tensor, config: Mapping[str, Any], others: Sequence[torch.Tensor]
    ) -> None:
        """Raise `InputError` if none of the dimensions of latents has the number of channels of the model's config.

        Which dimension it is differs between classes, and so does whether patches are made before the call. A model
        that is given another tensor of the same shape but for one dimension may join the channels of the two, so
        nothing is said then.
        """
        channels = config.get(CHANNELS)
        if type(channels) is not int or any(_differing(tensor, other) < 2 for other in others):
            return
        if channels not in tensor.shape and tensor.shape[-1] % channels:  # a packed patch has those of several pixels
            raise InputError(f"argument '{name}' has shape {tuple(tensor.shape)}; the model takes {channels} channels")


def _differing(first: torch.Tensor, second: torch.Tensor) -> int:
    """Return the number of dimensions in which two shapes differ, which is large if they have not as many."""
    if first.ndim != second.ndim:
        return max(first.ndim, second.ndim, 2)
    return sum(a != b for a, b in zip(first.shape, second.shape, strict=True))


def check_finite(arguments: Mapping[str, Any], known: set[int]) -> None:
    """Raise `InputError` naming an argument with NaN, or with Inf unless it is a mask.

    `known`: the ids of tensors that were looked at; they are shared among calls.
    """
    for name, tensor in _floats(arguments):
        if id(tensor) in known:
            continue
        known.add(id(tensor))
        if bool(tensor.isnan().any()) or ("mask" not in name and not bool(tensor.isfinite().all())):
            raise InputError(f"argument '{name}' has NaN or Inf values")


def _floats(arguments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in call_values.tensors(dict(arguments)) if tensor.is_floating_point())
