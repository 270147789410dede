"""Define the classes of traced models: those of diffusers, whose linear layers run on codes."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

from tqdit.architectures.traced import Traced, traced
from tqdit.artifact.model_card import traced_card, traced_shape
from tqdit.errors import InputError
from tqdit.layers.clock import Clock
from tqdit.layers.quantized import QuantizedLinear
from tqdit.ops.dispatch import get_backend, kernel_name
from tqdit.ops.schema import Backend
from tqdit.runtime.quantized import LOCK, QuantizedModel, SameAsDiffusers, offloading
from tqdit.spec import Solution
from tqdit.system.isolation import isolated

TRACED = "Traced"  # the first word of the names of classes that are made here
OURS = (
    "solution", "clock_argument", "quantization_backend", "site_kernels", "deviating", "requested_backend",
    "prepared_for",
)  # fmt: skip


class TracedModel(QuantizedModel):
    """The members that every traced model has beside those of diffusers' own class.

    The model's forward is diffusers' own. It never records gradients.
    """

    clock_argument: tuple[str, int]  # name and position of the time argument
    quantization_backend: str
    requested_backend: str
    prepared_for: str  # the kind of device that the layers are laid out for
    clock: Clock

    def shape_name(self) -> str:
        """Return the name of the class, and its parameters."""
        return traced_shape(self.solution)

    def card(self, size_bytes: int) -> str:
        """Return the model card of an artifact of this model."""
        return traced_card(self.solution, size_bytes)

    def in_call(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Set the time groups of a call, if any layer has them; they hold until the context ends.

        Raises `InputError` for a call without its time, and for a time outside of the range of the groups.
        """
        if "clock" not in cast(Any, self)._modules:
            return nullcontext()
        name, position = self.clock_argument
        timestep = named.get(name, arguments[position] if position < len(arguments) else None)
        if timestep is None:
            raise InputError(f"the call has no '{name}', which the time groups of the model are of")
        return self.clock.during(timestep)

    def lay_out_for(self, device: torch.device) -> None:
        """Lay the layers out for a kind of device, only once however many threads ask.

        A model that accelerate offloads stays in the CPU's memory, and is offloaded as before.
        """
        with LOCK, isolated():
            model: Any = self
            if self.prepared_for == device.type:
                return
            hook = offloading(model)
            if hook is not None:
                remove_hook_from_module(model, recurse=True)
            for layer in model.modules():
                if isinstance(layer, QuantizedLinear):
                    layer.lay_out_for(device, layer.like.device if hook is None else torch.device("cpu"))
            chosen = get_backend(self.requested_backend, device)
            self.quantization_backend, self.prepared_for = chosen.NAME, device.type
            self.site_kernels, self.deviating = kernels_of(self.solution, chosen), getattr(chosen, "deviating", None)
            if hook is not None:
                cpu_offload(model, device, offload_buffers=hook.offload_buffers)

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = torch.device("cpu"),
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Offload groups of layers as diffusers does, after the layers have been laid out for their device.

        Raises `InputError` for single layers on disk: layers that read one input share its scales.
        """
        if options.get("offload_to_disk_path") is not None and offload_type != "block_level":
            raise InputError(
                f"a quantized model can be offloaded to disk by offload_type 'block_level' alone, got '{offload_type}':"
                " layers share the scales of the input that they read"
            )
        self.lay_out_for(torch.device(onload_device))
        cast(Any, super()).enable_group_offload(onload_device, offload_device, offload_type, **options)

    def adopt(self, other: "TracedModel") -> None:
        """Take over the parts of another converted model."""
        mine, others = cast(Any, self), cast(Any, other)
        mine._modules, mine._parameters, mine._buffers = others._modules, others._parameters, others._buffers
        for name in OURS:
            setattr(self, name, getattr(other, name))


def make_traced(model: nn.Module, architecture: Traced) -> None:
    """Turn a diffusers model into a traced one, by giving it the class that `traced_class` makes of its own."""
    made = traced_class(architecture.name)
    model.__class__ = cast(type[nn.Module], made)
    model.__dict__["__module__"] = made.original.__module__
    for module in model.modules():
        if hasattr(module, "fuse_projections"):  # it would make new float layers of dequantized weights
            module.fuse_projections = refuse_fusing  # type: ignore[assignment]


def refuse_fusing(*_: Any, **__: Any) -> None:
    """Raise `InputError`: this stands in the place of `fuse_projections` of attention modules."""
    raise InputError("projections of a quantized model cannot be fused: layers that read one input share its codes")


@functools.cache
def traced_class(name: str) -> Any:
    """Return the class of the traced models of a diffusers class.

    It equals diffusers' own class and has its name, so that pipelines take it for theirs.
    """
    original = traced(name).model_class()
    contents = {
        "original": original,
        "forward": _forward(original.forward),
        "__doc__": f"`{name}` with linear layers in integers.",
        "__module__": __name__,
        "__qualname__": TRACED + name,
    }
    return SameAsDiffusers(name, (TracedModel, original), contents)


def __getattr__(name: str) -> Any:
    """Make a traced class again by its name, for pickle."""
    if name.startswith(TRACED) and name != TRACED:
        try:
            return traced_class(name.removeprefix(TRACED))
        except InputError:
            pass
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return diffusers' forward without gradients, after the time groups of the call are set."""

    @functools.wraps(original)
    def forward(self: TracedModel, *arguments: Any, **named: Any) -> Any:
        device = next((x.device for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)), None)
        if device is not None and device.type != self.prepared_for:
            _lay_out(self, device)
        with torch.no_grad(), self.in_call(arguments, named):
            return original(self, *arguments, **named)

    return forward


@torch.compiler.disable  # the graph breaks here unless a call on the device came first
def _lay_out(model: TracedModel, device: torch.device) -> None:
    model.lay_out_for(device)


def kernels_of(solution: Solution, backend: Backend) -> dict[str, str]:
    """Return the kernel that a backend runs each site of a solution with."""
    return {name: kernel_name(params, backend) for name, params in solution.params.items()}
