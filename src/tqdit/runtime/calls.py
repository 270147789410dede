"""Run the denoiser calls of a converted model; on a GPU a call is one CUDA graph."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tqdit.architectures.interface import Architecture
from tqdit.layers.block import IntBlock
from tqdit.layers.call import GroupLookup
from tqdit.ops.modules import Watched
from tqdit.system.capture import Captured
from tqdit.system.isolation import without_autocast

MAX_GRAPHS = 16  # for different batch sizes and shapes; the least recently used is dropped


def _nothing() -> None:
    """Return None, as a weak reference does whose tensor no longer exists."""


NO_PROMPT = (_nothing, 0, None, None)


class Runtime(nn.Module):
    """The part of a converted model that runs the model's calls.

    With `graphs`, calls on a GPU are captured once per batch size, shape and dtype, then replayed. Timestep and
    conditions are data on the device, so no replay waits for the host. Forward hooks inside the model do not run in a
    replay; set `graphs` to False to have them run. Moving the model or changing its dtype drops its graphs; moving a
    part of the model does not.
    """

    def __init__(
        self,
        architecture: Architecture,
        groups: GroupLookup,
        graphs: bool,
        compile_ahead: Callable[[Callable[[], object]], None] | None = None,
    ) -> None:
        """Keep what calls need. `compile_ahead`: the backend's function that compiles all kernels of a call at once."""
        super().__init__()
        self.architecture = architecture
        self.groups = groups
        self.graphs = graphs
        self.compile_ahead = compile_ahead
        self._forget_graphs()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without graphs, which belong to this process and to these tensors."""
        own = ("_captured", "_lock", "_stream", "_seen", "_prompt")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._captured: OrderedDict[tuple[Any, ...], Captured] = OrderedDict()
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None  # the stream of the last replay
        self._seen: tuple[object, bool] = (None, False)  # `Watched.contents`, and whether blocks have adapters
        self._prompt: tuple[Any, int, Any, Any] = NO_PROMPT

    def _apply(self, fn: Any, recurse: bool = True) -> "Runtime":
        with self._lock:
            for device in {key[0] for key in self._captured}:
                torch.cuda.synchronize(device)
            self._captured.clear()
        self._prompt = NO_PROMPT
        return super()._apply(fn, recurse)

    def call(self, model: nn.Module, x: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Return the model's output for latents `x` (B, C, H, W) and the other arguments of its forward.

        No graph is used while any block has adapters or is offloaded. Gradients and autocast are off inside: neither
        means anything for integers, and autocast would round the fp32 products that stand for them. Adapters therefore
        cannot be trained: the result never requires a gradient, and `backward` says that it "does not require grad".

        Raises `InputError` as the architecture's `inputs` does.
        """
        given = self.architecture.inputs(model, x, arguments)
        run = self._replayed if self._graphable(x) and not self._changing(model) else self._eager
        with without_gradients(), without_autocast(x.device.type):
            return run(model, x, self.architecture.prepare(model, given))

    def _graphable(self, x: torch.Tensor) -> bool:
        if not self.graphs or x.device.type != "cuda" or torch.compiler.is_compiling():
            return False
        with _on(x.device):
            return not torch.cuda.is_current_stream_capturing()

    def _changing(self, model: nn.Module) -> bool:
        """Say whether any block has adapters or is offloaded.

        The blocks are looked at again only when any watched module was given an adapter or a hook.
        """
        if self._seen[0] is not Watched.contents:
            blocks = [module for module in model.modules() if isinstance(module, IntBlock)]
            self._seen = Watched.contents, any(block.adapted or block.offloaded for block in blocks)
        return self._seen[1]

    def prompt(self, model: nn.Module, states: torch.Tensor, make: Callable[[], Any]) -> Any:
        """Return `make()`, a function of a prompt's states, or its former result if the last call had the same prompt.

        Two prompts are the same if they are the same tensor, unchanged: pipelines give one tensor to every step of a
        sampling run. Nothing is kept where torch does not count the changes of the tensor, under torch.compile, while a
        CUDA graph is captured, for a call on another stream, and while a block has adapters, whose weights may change.
        torch counts no changes that are made through `data` or numpy: give a new tensor then.
        """
        stream = torch.cuda.current_stream(states.device) if states.is_cuda else None
        capturing = states.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing or states.is_inference() or self._changing(model):
            return make()
        made_from, version, made_on, made = self._prompt
        if made_from() is not states or version != states._version or made_on != stream:
            made = make()
            self._prompt = weakref.ref(states, self._forget_prompt), states._version, stream, made
        return made

    def _forget_prompt(self, _: Any) -> None:
        """Free what was kept of a prompt that is no more."""
        self._prompt = NO_PROMPT

    def _eager(self, model: nn.Module, x: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        return self.architecture.run(model, x, self.architecture.begin(model, x, given))

    def _replayed(self, model: nn.Module, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        given["timestep"] = given["timestep"].expand(len(x))
        tensors, rest = _flattened(given)
        key = (x.device, x.shape, x.dtype, rest, *((leaf.shape, leaf.dtype) for leaf in tensors))
        with self._lock, _on(x.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:  # its replay still uses the static tensors
                stream.wait_stream(self._stream)
            self._stream = stream
            if key not in self._captured:
                self._captured[key] = self._capture(model, x, tensors, rest)
                if len(self._captured) > MAX_GRAPHS:
                    torch.cuda.synchronize()  # a replay on another stream may still read the memory that is freed
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            return self._captured[key](x, *tensors)

    def _capture(self, model: nn.Module, x: torch.Tensor, tensors: list[torch.Tensor], rest: Any) -> Captured:
        """Capture a call as a graph. `tensors` and `rest`: the call's inputs, of `_flattened`."""

        def call(x: torch.Tensor, *static: torch.Tensor) -> torch.Tensor:
            return self._eager(model, x, _restored(static, rest))

        if self.compile_ahead is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.compile_ahead(lambda: call(*(given.to(x.device) for given in (x, *tensors))))
            self._prompt = NO_PROMPT  # it was made of undefined numbers
        return Captured(call, (x, *tensors), x.device)


def _flattened(given: Mapping[str, Any]) -> tuple[list[torch.Tensor], Any]:
    """Split the inputs of a call into tensors and the rest, which can be hashed: names, numbers and structure.

    Inputs without structure of their own take a short way: this runs at every call.
    """
    values = list(given.values())
    if all(type(value) is torch.Tensor for value in values):
        return values, tuple(given)
    leaves, structure = pytree.tree_flatten(given)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return tensors, (structure, tuple(... if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


def _restored(tensors: Iterable[torch.Tensor], rest: Any) -> dict[str, Any]:
    """Put inputs together again that `_flattened` has split."""
    if all(isinstance(name, str) for name in rest):
        return dict(zip(rest, tensors, strict=True))
    structure, fixed = rest
    following = iter(tensors)
    leaves = [next(following) if leaf is ... else leaf for leaf in fixed]
    restored: dict[str, Any] = pytree.tree_unflatten(leaves, structure)
    return restored


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, unless it is already: switching costs as much as a launch."""
    current = device.index is None or device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(device)


def without_gradients() -> AbstractContextManager[Any]:
    """Return `torch.no_grad()` where gradients are on, else a context that does nothing."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def tell_diffusers(kind: type[IntBlock]) -> None:
    """Tell diffusers' hooks, such as `apply_layer_skip`, that an integer block returns hidden states alone.

    `TransformerBlockRegistry.register` would say the same, but it imports every model that diffusers has.
    """
    from diffusers.hooks import _helpers

    described = _helpers.TransformerBlockMetadata(return_hidden_states_index=0, _cls=kind)
    _helpers.TransformerBlockRegistry._registry.setdefault(kind, described)
