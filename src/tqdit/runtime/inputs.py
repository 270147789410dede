"""Checking what a denoiser call was given, before anything is computed with it.

Shapes and dtypes are read, and values only where they are on the CPU: nothing here waits for a GPU.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.timegroups import TimeGroups

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LABELS = (torch.int64, torch.int32)  # what torch's embedding takes


@dataclass(frozen=True)
class Inputs:
    """What a model takes: latents of so many channels whose sides are whole patches, timesteps and classes."""

    channels: int
    patch_size: int
    classes: int  # of the embedding; the last one is the null class, where there is one
    time_groups: TimeGroups

    def check_states(self, x: Any) -> None:
        """Raise `InputError` unless x is a batch of latents, with values, that nothing is to be differentiated by."""
        if not isinstance(x, torch.Tensor):
            raise InputError(f"hidden_states must be a tensor, not {type(x).__name__}")
        if not torch.compiler.is_compiling():
            _check_not_traced()
            _check_values("hidden_states", x)
        if x.dtype not in FLOATS:
            raise InputError(f"hidden_states must be floating point, not {x.dtype}")
        if x.ndim != 4 or x.shape[1] != self.channels:
            needed = f"(batch, {self.channels}, height, width)"
            raise InputError(f"hidden_states have shape {tuple(x.shape)}, the model needs {needed}")
        if x.shape[0] == 0:
            raise InputError("hidden_states have a batch of 0 samples")
        height, width = x.shape[2:]
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise InputError(f"hidden_states are {height} x {width}; both must be multiples of {self.patch_size}")
        _check_no_gradient("hidden_states", x)

    def conditions(self, x: torch.Tensor, timestep: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Timestep (1,) or (B,) and labels (B,), both on the device of x, which is checked already.

        Raises `InputError` for those that are missing or do not fit the batch; and for a timestep outside [0, T) or a
        class that there is not, where reading them costs nothing: given as numbers or on the CPU. Under torch.compile
        they are not read, and such a value ends in a `RuntimeError` of the compiled code.
        """
        if timestep is None:
            raise InputError("a time-grouped model needs `timestep`")
        if not isinstance(labels, torch.Tensor):
            raise InputError("a class-conditional model needs `class_labels`, a tensor")
        t = timestep if isinstance(timestep, torch.Tensor) else _as_tensor(timestep)
        if labels.shape != x.shape[:1]:
            raise InputError(f"class_labels have shape {tuple(labels.shape)}, the batch needs ({x.shape[0]},)")
        if labels.dtype not in LABELS:
            raise InputError(f"class_labels must be int64 or int32, not {labels.dtype}")
        if t.ndim != 1:
            t = t.reshape(-1)
        if t.shape[0] not in (1, x.shape[0]):
            raise InputError(f"timestep has {t.shape[0]} entries for a batch of {x.shape[0]}")
        if t.dtype not in FLOATS and t.dtype not in INTEGERS:
            raise InputError(f"timestep must be real numbers, not {t.dtype}")
        _check_no_gradient("timestep", t)
        if not torch.compiler.is_compiling():
            self._check_range(x, t, labels)
        return t.to(x.device), labels.to(x.device)

    def _check_range(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> None:
        _check_values("timestep", t)
        _check_values("class_labels", labels)
        if labels.is_cpu:
            low, high = (int(value) for value in labels.aminmax())
            if low < 0 or high >= self.classes:
                found = low if low < 0 else high
                raise InputError(f"class_labels has {found}; the model's classes are 0 to {self.classes - 1}")
        if t.is_cpu and not x.is_cpu:
            self.time_groups.index(t)  # on the CPU the clock does; on a GPU the lookup could only assert


def _as_tensor(timestep: Any) -> torch.Tensor:
    """A number or a list of them. A Python float stays as exact as it is: 999.99999 would be 1000 in fp32."""
    try:
        return torch.as_tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else None)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"timestep must be a number or a tensor, not {str(timestep)[:40]!r}") from None


def _check_not_traced() -> None:
    """A tracer would keep the timestep and the class of this one call, and see nothing of the compiled kernels."""
    if torch.jit.is_tracing():
        raise InputError("torch.jit and torch.onnx cannot trace an integer model; use torch.export or torch.compile")
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # not loaded: not tracing
    if tracer is not None and tracer.get_proxy_mode() is not None:
        raise InputError("make_fx cannot trace an integer model; use torch.export or torch.compile")


def _check_values(name: str, x: torch.Tensor) -> None:
    """Meta and fake tensors have shapes alone."""
    if x.is_meta:
        raise InputError(f"{name}: a tensor on the meta device has no values")
    if type(x) is not torch.Tensor:
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(x, FakeTensor):
            raise InputError(f"{name}: a FakeTensor has no values; only torch.export and torch.compile may give one")


def _check_no_gradient(name: str, x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name}: integers have no gradients; call the model under torch.no_grad() or detach {name}")
