"""Make the classes of converted models: one for each diffusers class, when it is first needed."""

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Self, cast

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from tqdit.architectures.interface import Architecture
from tqdit.architectures.registry import architecture
from tqdit.artifact.model_card import model_card
from tqdit.errors import InputError
from tqdit.layers.block import IntBlock
from tqdit.ops.modules import Closed, Untrainable, check_same
from tqdit.runtime.calls import Runtime, tell_diffusers
from tqdit.runtime.quantized import LOCK, QuantizedModel, SameAsDiffusers, offloading
from tqdit.sources.conditions import is_prompted
from tqdit.system.isolation import isolated

CONVERTED = (
    "quantization_backend", "site_kernels", "deviating", "solution", "reconvert", "prepared_for", "fixed",
    "fits_float16",
)  # fmt: skip
INTEGER, CLOSED = "Integer", "Closed"  # first words of the names of classes that are made here


class IntegerModel(QuantizedModel, Closed, Untrainable):
    """The members that every converted model has beside those of diffusers' own class; `convert` makes the model."""

    reconvert: Any  # (Solution, device=...) -> a model that is converted in the same way
    prepared_for: str  # the kind of device that the layers are laid out for
    fixed: frozenset[str]  # names in a state dict that belong to the model, not to an adapter
    fits_float16: bool  # whether a residual stream of fp16 holds its values, by the solution
    runtime: Runtime
    config: Any
    io_dtype: torch.dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which a pipeline makes latents: the `torch_dtype` that the model was loaded with.

        The residual stream may have another dtype; see `stream_dtype`.
        """
        return self.io_dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """Return the dtype of the residual stream between the blocks, which is the model's own where that holds it.

        A model of dtype fp16 has an fp32 stream unless calibration has shown that fp16 holds the stream
        (`Solution.fits_float16`). What leaves the range of fp16 nevertheless is Inf, and its sample NaN. No other
        computation depends on the model's dtype.
        """
        return torch.float32 if self.io_dtype is torch.float16 and not self.fits_float16 else self.io_dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the tensors, and change only the dtype of inputs, outputs and the residual stream."""
        self.io_dtype = fn(torch.zeros((), dtype=self.io_dtype)).dtype

        def moved(x: torch.Tensor) -> torch.Tensor:
            new = fn(x)
            return new if new.dtype == x.dtype else x.to(new.device)

        nn.Module._apply(self, moved, recurse)
        return self

    def adopt(self, other: nn.Module) -> Self:
        """Take over the layers of another converted model; hooks, config and adapters of this model stay.

        The new backend decides again whether calls are graphs. A backend for CPUs has none, which says nothing about a
        GPU's.
        """
        mine, others = ([m for m in model.modules() if isinstance(m, IntBlock)] for model in (self, other))
        for old, new in zip(mine, others, strict=bool(mine)):
            assert old.slots is not None
            assert new.slots is not None
            new.slots.take(old.slots)
        self._modules, self._parameters, self._buffers = other._modules, other._parameters, other._buffers
        for name in CONVERTED:
            setattr(self, name, getattr(other, name))
        return self

    def denoise(self, hidden_states: Any, arguments: Mapping[str, Any], return_dict: bool) -> Any:
        """Compute diffusers' forward for latents and its other arguments, by name.

        Raises `InputError` for what does not fit the model. The result never requires a gradient.
        """
        self.runtime.architecture.check_states(self, hidden_states)
        if hidden_states.device.type != self.prepared_for:
            self._prepare(hidden_states.device)
        output = self.runtime.call(self, hidden_states, arguments)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @torch.compiler.disable  # the graph breaks here unless a call on the device came first
    def _prepare(self, device: torch.device) -> None:
        """Convert the model for a kind of device, only once however many threads ask.

        A model that accelerate offloads stays in the CPU's memory, laid out for the device that its parts visit.
        """
        with LOCK, isolated():
            if self.prepared_for == device.type:
                return
            hook = offloading(self)
            if hook is None:
                self.adopt(self.reconvert(self.solution, device=device))
                return
            if len({str(part) for part in (getattr(self, "hf_device_map", None) or {}).values()} - {"cpu"}) > 1:
                raise InputError(f"a model that is dispatched to several devices has to be loaded on {device} first")
            remove_hook_from_module(self, recurse=True)
            self.adopt(self.reconvert(self.solution, device=device, memory="cpu"))
            cpu_offload(self, device, offload_buffers=hook.offload_buffers)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Check a state dict before any tensor is loaded: it must be this model's, or an adapter's for this model.

        The artifact's own tensors are accepted only with the values that the model has. A name that neither the model
        nor an adapter has a place for is refused, even where torch would ignore it: peft drops such a tensor silently.
        Raises `InputError` for all of these.
        """
        own = self.state_dict(prefix=prefix, keep_vars=True)
        fixed = {prefix + name for name in self.fixed}
        check_same(own, {name: value for name, value in state_dict.items() if name in fixed})
        for name in sorted(name for name in state_dict if name.startswith(prefix) and name not in own):
            parameter = name[len(prefix) :].replace(".base_layer.", ".")
            mine, value = self.solution.floats.get(parameter), state_dict[name]
            if mine is None or mine.shape != value.shape or not torch.equal(mine.to(value), value):
                raise InputError(
                    f"there is no place for '{parameter}' in an integer model: beside its own state only plain LoRA is"
                    " loaded, on the linear layers of attention and feed-forward, whose biases stay the artifact's"
                )
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def card(self, size_bytes: int) -> str:
        """Return the model card of an artifact of this model."""
        config = self.solution.model_config
        shape = self.runtime.architecture.shape_name(config)
        return model_card(self.solution, shape, size_bytes, prompted=is_prompted(config))

    def to(self, *arguments: Any, **options: Any) -> Self:
        """Move the model, or change its dtype, as `torch.nn.Module.to` does.

        `_apply` limits the change of dtype. diffusers' own `to` would refuse to cast a quantized model.
        """
        return nn.Module.to(self, *arguments, **options)

    def half(self, *_: Any) -> Self:
        """Change the dtype to fp16, as `torch.nn.Module.half` does."""
        return nn.Module.half(self)

    def float(self, *_: Any) -> Self:  # defined last: annotations above mean the type
        """Change the dtype to fp32, as `torch.nn.Module.float` does."""
        return nn.Module.float(self)


def make_integer(model: nn.Module, described: Architecture) -> IntegerModel:
    """Give a diffusers transformer the integer class of its architecture, and close its parts to adapters.

    `_prepare` and `adopt` of the class work with the parts that `convert` puts into the model.
    """
    for module in model.modules():
        ours = isinstance(module, Closed) or type(module).__module__.startswith("tqdit.")
        if not ours and (module._modules or isinstance(module, nn.ModuleList)):
            module.__class__ = _closed_class(cast(Any, type(module)))
    made = integer_class(described.name)
    model.__class__ = cast(type[nn.Module], made)
    model.__dict__["__module__"] = made.original.__module__
    return cast(IntegerModel, model)


@functools.cache
def integer_class(name: str) -> Any:
    """Return the class of the integer models of a class of float models.

    A saved pipeline notes the name and the module of each part's class, and is loaded by them. Both must therefore lead
    to the float models' own class, whose `from_pretrained` makes the integer class. Pickle goes by `__qualname__`.
    """
    described = architecture(name)
    original = described.model_class()
    contents = {
        "original": original,
        "forward": type(described).forward,
        "_no_split_modules": [described.block.__name__],
        "_repeated_blocks": [described.block.__name__],
        "__doc__": f"`{name}`, its blocks, conditioning and call in integers.",
        "__module__": __name__,
        "__qualname__": INTEGER + name,
    }
    tell_diffusers(described.block)
    return SameAsDiffusers(name, (IntegerModel, original), contents)


@functools.cache
def _closed_class(kind: type[Any]) -> type[Any]:
    """Return a subclass of a module's class that is closed to adapters."""
    qualified = "__".join([CLOSED, *kind.__module__.split("."), kind.__name__])
    return type(kind.__name__, (Closed, kind), {"__module__": __name__, "__qualname__": qualified})


def __getattr__(name: str) -> Any:
    """Make an integer or closed class again by its name, for pickle."""
    if name.startswith(f"{CLOSED}__"):
        *path, kind = name.split("__")[1:]
        return _closed_class(getattr(import_module(".".join(path)), kind))
    if name.startswith(INTEGER):
        try:
            return integer_class(name.removeprefix(INTEGER))
        except InputError:
            pass
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
