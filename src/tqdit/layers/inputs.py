"""Check the arguments of a denoiser call before anything is computed with them.

Shapes and dtypes are read, and values only where they are on the CPU: nothing here waits for a GPU.
"""

import sys
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.timegroups import TimeGroups

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DISCARD = -10000.0  # diffusers adds this to the score of a token that a mask leaves out
LABELS = (torch.int64, torch.int32)  # the dtypes that torch's embedding takes


def check_states(x: Any, channels: int, patch_size: int) -> None:
    """Raise `InputError` unless x is a batch of latents (B, channels, H, W), with values and without gradients.

    Height and width must be whole patches.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError(f"hidden_states must be a tensor, not {type(x).__name__}")
    if not torch.compiler.is_compiling():
        _check_not_traced()
        check_values("hidden_states", x)
    if x.dtype not in FLOATS:
        raise InputError(f"hidden_states must be floating point, not {x.dtype}")
    if x.ndim != 4 or x.shape[1] != channels:
        needed = f"(batch, {channels}, height, width)"
        raise InputError(f"hidden_states have shape {tuple(x.shape)}, the model needs {needed}")
    if x.shape[0] == 0:
        raise InputError("hidden_states have a batch of 0 samples")
    height, width = x.shape[2:]
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise InputError(f"hidden_states are {height} x {width}; both must be multiples of {patch_size}")
    check_no_gradient("hidden_states", x)


def timesteps(x: torch.Tensor, timestep: Any, time_groups: TimeGroups) -> torch.Tensor:
    """Return a timestep as a tensor (1,) or (B,) on the device of x, which is checked already.

    Raises `InputError` for a timestep that is missing or does not fit the batch; and for one outside the range of the
    time groups, where reading it costs nothing: given as numbers or on the CPU. Under torch.compile it is not read.
    """
    if timestep is None:
        raise InputError("a time-grouped model needs `timestep`")
    t = timestep if isinstance(timestep, torch.Tensor) else _as_tensor(timestep)
    if t.ndim != 1:
        t = t.reshape(-1)
    if t.shape[0] not in (1, x.shape[0]):
        raise InputError(f"timestep has {t.shape[0]} entries for a batch of {x.shape[0]}")
    if t.dtype not in FLOATS and t.dtype not in INTEGERS:
        raise InputError(f"timestep must be real numbers, not {t.dtype}")
    check_no_gradient("timestep", t)
    if not torch.compiler.is_compiling():
        check_values("timestep", t)
        if t.is_cpu and not x.is_cpu:
            time_groups.index(t)  # on the CPU `GroupLookup` checks it; on a GPU it reads no value
    return t.to(x.device)


def class_labels(x: torch.Tensor, labels: Any, classes: int) -> torch.Tensor:
    """Return class labels (B,) on the device of x. Raise `InputError` as `timesteps` does.

    `classes`: rows of the class embedding; the last one is the null class, where there is one.
    """
    if not isinstance(labels, torch.Tensor):
        raise InputError("a class-conditional model needs `class_labels`, a tensor")
    if labels.shape != x.shape[:1]:
        raise InputError(f"class_labels have shape {tuple(labels.shape)}, the batch needs ({x.shape[0]},)")
    if labels.dtype not in LABELS:
        raise InputError(f"class_labels must be int64 or int32, not {labels.dtype}")
    if not torch.compiler.is_compiling():
        check_values("class_labels", labels)
        if labels.is_cpu:
            low, high = (int(value) for value in labels.aminmax())
            if low < 0 or high >= classes:
                wrong = low if low < 0 else high
                raise InputError(f"class_labels has {wrong}; the model's classes are 0 to {classes - 1}")
    return labels.to(x.device)


def prompt(x: torch.Tensor, states: Any, depth: int) -> torch.Tensor:
    """Return the embedded tokens of prompts, (B, M, depth) float, on the device of x.

    Raises `InputError` for those that are missing, do not fit the batch or the model, or have gradients.
    """
    if not isinstance(states, torch.Tensor):
        raise InputError("a model with cross-attention needs `encoder_hidden_states`, a tensor")
    if states.ndim != 3 or states.shape[0] != x.shape[0] or states.shape[2] != depth or states.shape[1] < 1:
        needed = f"({x.shape[0]}, tokens, {depth})"
        raise InputError(f"encoder_hidden_states have shape {tuple(states.shape)}, the batch needs {needed}")
    if states.dtype not in FLOATS:
        raise InputError(f"encoder_hidden_states must be floating point, not {states.dtype}")
    check_no_gradient("encoder_hidden_states", states)
    if not torch.compiler.is_compiling():
        check_values("encoder_hidden_states", states)
    return states.to(x.device)


def mask_bias(x: torch.Tensor, mask: Any, tokens: int) -> torch.Tensor | None:
    """Return the bias of a prompt's tokens, fp32 (B, tokens), which is added to their scores.

    The bias is made of diffusers' mask; it is None for None. A mask (B, tokens) is 1 or True for tokens that count:
    they get 0, the others `DISCARD`. One of three axes, (B, 1, tokens), is such a bias already. Raises `InputError` for
    any other shape or dtype.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"encoder_attention_mask must be a tensor, not {type(mask).__name__}")
    if tuple(mask.shape) not in ((x.shape[0], tokens), (x.shape[0], 1, tokens)):
        needed = f"({x.shape[0]}, {tokens}), or ({x.shape[0]}, 1, {tokens}) for a bias"
        raise InputError(f"encoder_attention_mask has shape {tuple(mask.shape)}, the batch needs {needed}")
    if mask.is_complex() or (mask.ndim == 3 and mask.dtype not in FLOATS):
        raise InputError(f"encoder_attention_mask of {mask.ndim} axes cannot be {mask.dtype}")
    check_no_gradient("encoder_attention_mask", mask)
    if not torch.compiler.is_compiling():
        check_values("encoder_attention_mask", mask)
    mask = mask.to(x.device)
    return mask[:, 0].float().contiguous() if mask.ndim == 3 else (1 - mask.float()) * DISCARD


def sizes(x: torch.Tensor, given: Any) -> dict[str, torch.Tensor]:
    """Return the image sizes that a model is conditioned on: `resolution` (B, 2) and `aspect_ratio` (B, 1).

    Raises `InputError` for what is missing or does not fit the batch.
    """
    if not isinstance(given, dict):
        raise InputError("this model needs `added_cond_kwargs` with resolution and aspect_ratio")
    checked = {}
    for name, columns in (("resolution", 2), ("aspect_ratio", 1)):
        value = given.get(name)
        if not isinstance(value, torch.Tensor) or value.numel() != columns * x.shape[0]:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"added_cond_kwargs['{name}'] is {shape}, the batch needs ({x.shape[0]}, {columns})")
        if value.dtype not in FLOATS and value.dtype not in INTEGERS:
            raise InputError(f"added_cond_kwargs['{name}'] must be real numbers, not {value.dtype}")
        check_no_gradient(name, value)
        if not torch.compiler.is_compiling():
            check_values(name, value)
        checked[name] = value.to(x.device)
    return checked


def refuse(name: str, value: Any) -> None:
    """Raise `InputError` for an argument that an integer model does not take, unless it is None."""
    if value is not None:
        raise InputError(f"{name} is not supported by an integer model; leave it out")


def _as_tensor(timestep: Any) -> torch.Tensor:
    """Return a number or a list of numbers as a tensor.

    A Python float stays as exact as it is: 999.99999 would be 1000 in fp32.
    """
    try:
        return torch.as_tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else None)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"timestep must be a number or a tensor, not {str(timestep)[:40]!r}") from None


def _check_not_traced() -> None:
    """Raise `InputError` under a tracer.

    A tracer would keep the timestep and the class of this one call, and would not see the compiled kernels.
    """
    if torch.jit.is_tracing():
        raise InputError("torch.jit and torch.onnx cannot trace an integer model; use torch.export or torch.compile")
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # not loaded: not tracing
    if tracer is not None and tracer.get_proxy_mode() is not None:
        raise InputError("make_fx cannot trace an integer model; use torch.export or torch.compile")


def check_values(name: str, x: torch.Tensor) -> None:
    """Raise `InputError` for a meta or fake tensor, which has a shape alone."""
    if x.is_meta:
        raise InputError(f"{name}: a tensor on the meta device has no values")
    if type(x) is not torch.Tensor:
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(x, FakeTensor):
            raise InputError(f"{name}: a FakeTensor has no values; only torch.export and torch.compile may give one")


def check_no_gradient(name: str, x: torch.Tensor) -> None:
    """Raise `InputError` for a tensor that a gradient is to be computed for."""
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name}: integers have no gradients; call the model under torch.no_grad() or detach {name}")
