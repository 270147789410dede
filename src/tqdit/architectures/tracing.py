"""Watch one call of a model: what makes the input of each linear layer, what it depends on, and who reads weights.

A mode of torch sees every function that is called with tensors. It holds facts about tensors, by weak references, and
no tensor; the model's memory is that of a call.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from tqdit.architectures.tensor_origins import (
    ARGUMENT,
    CONSTANT,
    CONSTANTS,
    FIRST_ONLY,
    JOINS,
    PROMPT,
    SAMPLE,
    TIME,
    Origin,
    Part,
    result_word,
)
from tqdit.errors import InputError
from tqdit.system.hooks import hooks

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what a linear layer may read
COPIES = {"contiguous", "clone", "to", "float", "half", "bfloat16", "type_as", "reshape"}
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayerCall:
    """One call of a linear layer: its place among all such calls, and the facts of its input.

    `rows` is the product of all axes but the last.
    """

    order: int
    word: str
    depends: frozenset[str]
    value: int
    rows: int


@dataclass
class Trace:
    """Everything that one call of a model showed.

    `calls`: of each linear layer that was called, by its path. `elsewhere`: the layers whose weight was read by other
    code than their own forward. `samples` is the number of samples in the batch.
    """

    samples: int
    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)


def watch(model: nn.Module, arguments: Mapping[str, Any], sample: str, timestep: str) -> Trace:
    """Call a model once without gradients, and return what its linear layers did.

    `arguments` are keyword arguments of the model's forward; `sample` and `timestep` are the names of two of them.
    The model is left as it was. Raises `InputError` if a layer reads numbers that are not fp32, bf16 or fp16, and if
    the model refuses the arguments.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    given, batch = dict(arguments), arguments[sample]
    samples = len(batch) if isinstance(batch, list | tuple) else int(batch.shape[0])
    if isinstance(given[timestep], int | float):  # a number would leave no trace
        device = next(iter(tensors_in(batch))).device
        given[timestep] = torch.tensor(given[timestep], device=device)
    trace = Trace(samples)
    watcher = _Watcher(layers, trace)
    with _inside(layers, watcher.stack), eager(model), torch.inference_mode(False), torch.no_grad():
        for name, value in given.items():
            kind = SAMPLE if name == sample else TIME if name == timestep or "timestep" in name else PROMPT
            watcher.mark(value, kind)
        with watcher, _refusals(model):
            model(**given)
    return trace


@contextlib.contextmanager
def _refusals(model: nn.Module) -> Iterator[None]:
    """Turn what a model raises about its arguments into an `InputError`: they may lack one that its config asks for."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"the {type(model).__name__} fails on the first recorded call: {said}") from error


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Let compiled modules and functions run as they are written, until the context ends.

    A mode sees nothing inside of a compiled one, and compiled code may not see hooks. Nothing is compiled where torch's
    compiler has not been imported, which takes seconds.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    compiled = compiled or "torch._dynamo" in sys.modules  # such as an attention of diffusers that compiles itself
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def _inside(layers: Mapping[str, nn.Module], stack: list[str]) -> Iterator[None]:
    """Keep the paths of the layers whose forward is running on a stack."""

    def leave(*_: Any) -> None:
        stack.pop()

    with hooks() as keep:
        for name, module in layers.items():
            keep(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            keep(module.register_forward_hook(leave, always_call=True))
        yield


class _Watcher(TorchFunctionMode):
    """A mode of torch that notes facts about every tensor, and writes down the calls of linear layers."""

    def __init__(self, layers: Mapping[str, nn.Module], trace: Trace) -> None:
        super().__init__()
        self.stack: list[str] = []
        self._layers, self._trace = layers, trace
        self._owners: dict[int, list[str]] = {}
        for name, module in layers.items():
            self._owners.setdefault(id(module.weight), []).append(name)
        self._origins: Any = WeakTensorKeyDictionary()
        self._values, self._order = itertools.count(), itertools.count()

    def mark(self, value: Any, depends: str) -> None:
        """Say what the tensors of an argument are."""
        for tensor in tensors_in(value):
            self._set(tensor, ARGUMENT, frozenset({depends}))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        inputs = [] if name in CONSTANTS else list(tensors_in((args, kwargs)))
        inputs = inputs[:1] if name in FIRST_ONLY else inputs
        origins = [self._origin(tensor) for tensor in inputs]
        if name == "linear":
            self._write_down(args, kwargs, inputs, origins)
        out = func(*args, **kwargs)
        outputs = list(tensors_in(out))
        if outputs or name in JOINS:
            self._notice_weights(inputs)
            self._spread(name, args, kwargs, list(zip(inputs, origins, strict=True)), outputs)
        return out

    def _spread(
        self,
        name: str,
        args: Any,
        kwargs: Mapping[str, Any],
        inputs: list[tuple[torch.Tensor, Origin]],
        outputs: list[torch.Tensor],
    ) -> None:
        """Give facts to the results of a function and to the inputs that it has written to."""
        depends = NOTHING.union(*(origin.depends for _, origin in inputs))
        parts = [Part(origin.word, origin.depends, tensor.numel()) for tensor, origin in inputs]
        tanh = kwargs.get("approximate", args[1] if len(args) > 1 else "none") == "tanh"
        word = result_word(name, parts, tanh, _joins_channels(name, args, kwargs, outputs))
        written = [tensor for tensor, origin in inputs if _version(tensor) != origin.version]
        for tensor in written:
            self._set(tensor, word, depends)
            if tensor._base is not None:
                base = self._origin(tensor._base)
                self._set(tensor._base, base.word if base.depends else word, base.depends | depends)
        for output in outputs:
            if not any(output is tensor for tensor in written):
                self._set(output, word, depends, _kept_value(name, output, inputs))

    def _origin(self, tensor: torch.Tensor) -> Origin:
        """Return the facts of a tensor. One that was never met is a parameter, a buffer or a table that a model keeps.

        So is one from where no function is seen, such as numpy; then a layer that reads it has a float input.
        """
        known = self._origins.get(tensor)
        if known is None:
            return self._set(tensor, CONSTANT, NOTHING)
        if known.version == _version(tensor):
            return known
        base = self._origins.get(tensor._base) if tensor._base is not None else None  # written to by a view of it
        return self._set(tensor, known.word, known.depends | (base.depends if base else NOTHING))

    def _set(self, tensor: torch.Tensor, word: str, depends: frozenset[str], value: int | None = None) -> Origin:
        origin = Origin(word, depends, next(self._values) if value is None else value, _version(tensor))
        self._origins[tensor] = origin
        return origin

    def _write_down(self, args: Any, kwargs: Any, inputs: list[torch.Tensor], origins: list[Origin]) -> None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if not self.stack or self._layers[self.stack[-1]].weight is not weight:
            return
        name, rows, origin = self.stack[-1], inputs[0].shape[:-1].numel(), origins[0]
        if inputs[0].dtype not in FLOATS:
            raise InputError(f"layer '{name}' reads {inputs[0].dtype}; only fp32, bf16 and fp16 can be quantized")
        call = LayerCall(next(self._order), origin.word, origin.depends, origin.value, rows)
        self._trace.calls.setdefault(name, []).append(call)

    def _notice_weights(self, inputs: list[torch.Tensor]) -> None:
        for tensor in inputs:
            owners = [name for name in self._owners.get(id(tensor), ()) if self._layers[name].weight is tensor]
            if owners and not (self.stack and self.stack[-1] in owners):
                self._trace.elsewhere.update(owners)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Return the tensors of nested lists, tuples and dicts, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch counts no writes to tensors of inference mode


def _kept_value(name: str, output: torch.Tensor, inputs: list[tuple[torch.Tensor, Origin]]) -> int | None:
    """Return the value of the first input if a result has the same rows of the same numbers."""
    if not inputs:
        return None
    first, origin = inputs[0]
    same = output.dtype == first.dtype and output.numel() == first.numel() and output.shape[-1:] == first.shape[-1:]
    copied = name in COPIES and output.shape == first.shape
    return origin.value if same and (copied or _same_memory(output, first)) else None


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors of as many elements are one, or views of the same elements in the same order."""
    if a is b:
        return True
    try:  # data_ptr would be 0 for all of device "meta"
        one = a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()
    except NotImplementedError:  # a tensor without a storage, such as those inside of torch.vmap
        return False
    return one and a.is_contiguous() and b.is_contiguous()


def _joins_channels(name: str, args: Any, kwargs: Mapping[str, Any], outputs: list[torch.Tensor]) -> bool:
    """Say whether a function is a concatenation along the last axis."""
    if name not in ("cat", "concat", "concatenate") or not outputs:
        return False
    axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    return bool(axis in (-1, outputs[0].ndim - 1))
