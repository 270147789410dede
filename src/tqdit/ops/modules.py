"""Base classes of modules on integer codes: what adapters, offloading and loading may do to these modules."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from tqdit.errors import InputError

HOOK = "_hf_hook"  # the attribute of accelerate's hook around a module's forward
ACCELERATE = "accelerate.hooks"  # the module of accelerate's own hooks
MOVING = frozenset({"ModelHook", "AlignDevicesHook", "CpuOffload"})  # those that move tensors or do nothing
EXTRA_STATE = "_extra_state"  # the key that torch gives to `get_extra_state`


Ready = Callable[..., bool]  # says of modules whether a kernel may take their tensors instead of a call


class Watched(nn.Module):
    """A module that may get adapters or offloading hooks.

    `contents` becomes another object whenever any such module changes: a model's call compares that one object with the
    one it saw last, since looking into every module would take longer than launching a CUDA graph.
    """

    contents: ClassVar[object] = object()  # a new object at each change, so that an old copy is never equal

    @staticmethod
    def changed() -> None:
        """Note that some module has changed: `contents` becomes another object."""
        Watched.contents = object()


class Closed(nn.Module):
    """A module whose parts adapters cannot replace.

    What peft would put around one of these parts is an `InputError`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and type(value).__module__.split(".")[0] == "peft":
            raise InputError(
                f"an adapter has a {type(value).__name__} for '{name}'; on an integer model only plain LoRA runs,"
                " on the linear layers of attention and feed-forward"
            )
        super().__setattr__(name, value)


class Untrainable(nn.Module):
    """A module that can neither be trained nor be saved and replaced by an adapter (peft's `modules_to_save`)."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Accept False, which a converted model has anyway. Raise `InputError` for True."""
        if requires_grad:
            raise InputError(
                f"a layer on integer codes ({type(self).__name__}) cannot be trained or replaced by an adapter's own"
                " (modules_to_save); train a LoRA on the float model's layers"
            )
        return super().requires_grad_(False)


class Fingerprint(Untrainable):
    """A hash of all that a model is besides its tensors; the hash stands in the model's state dict.

    This is a module because accelerate asks for the device of whatever a state dict has, module by module.
    """

    def __init__(self, described: Any) -> None:
        """Hash `described`, which is anything that JSON can hold."""
        super().__init__()
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).digest()
        self._state = torch.frombuffer(bytearray(digest), dtype=torch.uint8)

    def get_extra_state(self) -> torch.Tensor:
        return self._state

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Accept a hash only if it equals this one."""
        check_same({EXTRA_STATE: self._state}, {EXTRA_STATE: state})


def check_same(own: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> None:
    """Raise `InputError` that names the first of the given tensors which differs from the model's own."""
    for name, value in given.items():
        mine = own[name]
        if mine.is_meta:
            raise InputError(f"'{name}' is offloaded; remove accelerate's hooks before loading a state dict")
        if not isinstance(value, torch.Tensor) or value.dtype != mine.dtype or value.shape != mine.shape:
            same = False
        else:
            same = mine.data_ptr() == value.data_ptr() or torch.equal(mine, value.to(mine.device))
        if not same:
            what = "is not this integer model's" if name.endswith(EXTRA_STATE) else f"has another '{name}'"
            raise InputError(
                f"the state dict {what}: it is of another artifact, backend or kind of device;"
                " load its artifact instead"
            )


def offloaded(module: nn.Module) -> bool:
    """Say whether accelerate has a hook on a module; the hook may have sent the module's tensors away."""
    return HOOK in module.__dict__


def untouched(*modules: nn.Module) -> bool:
    """Say whether a call of each of these modules is its class's own forward alone: no hook, and nothing in its place.

    Then a kernel may take the module's tensors instead of a call. A hook of torch on all modules counts, too.
    """
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or offloaded(module) or _replaced(module)
        for module in modules
    )


def _replaced(module: nn.Module) -> bool:
    """Say whether something is in the place of a module's forward. accelerate leaves the forward itself behind."""
    return "forward" in module.__dict__ and not _is_own(module, module.__dict__["forward"])


def _is_own(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def only_moved(*modules: nn.Module) -> bool:
    """Say whether modules are as in `untouched` but for hooks of accelerate's own, which move tensors and do no more.

    Then a kernel may take the tensors of these modules while they are `present`.
    """
    return all(_only_moved(module) if offloaded(module) else untouched(module) for module in modules)


def _only_moved(module: nn.Module) -> bool:
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return False
    if module._forward_hooks or module._forward_pre_hooks or not _moves(module.__dict__[HOOK]):
        return False
    around = getattr(module.__dict__.get("forward"), "func", None)
    return getattr(around, "__module__", "") == ACCELERATE and _is_own(module, module.__dict__.get("_old_forward"))


def _moves(hook: Any) -> bool:
    """Say whether a hook is accelerate's own and changes no value; a class derived from it may do anything."""
    kind = type(hook)
    if kind.__module__ != ACCELERATE:
        return False
    return all(map(_moves, hook.hooks)) if kind.__name__ == "SequentialHook" else kind.__name__ in MOVING


def plain(module: nn.Module, kind: type[nn.Module], ready: Ready = untouched) -> bool:
    """Say whether a module is one of `kind`, perhaps of a subclass, whose call is the forward of `kind` alone.

    `ready`: `untouched` or `only_moved`.
    """
    return isinstance(module, kind) and type(module).forward is kind.forward and ready(module)


@contextmanager
def present(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bring the tensors of offloaded modules to where they are used, for as long as the block lasts.

    accelerate moves the tensors of a module before and after its forward. Layers on codes have none that anyone calls:
    a backend reads their tensors.
    """
    loaded: list[Any] = []
    try:
        for module in modules:
            if offloaded(module):
                loaded.append(module)
                loaded[-1]._hf_hook.pre_forward(module)
        yield
    finally:
        for module in loaded:
            module._hf_hook.post_forward(module, None)


def state_names(model: nn.Module) -> Iterator[str]:
    """Return the names in a model's state dict without their values.

    The values of packed codes would have to be computed.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield prefix + EXTRA_STATE
