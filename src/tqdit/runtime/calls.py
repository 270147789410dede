"""A converted model's denoiser call: clock and conditioning set once, and on a GPU the whole call as one CUDA graph."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tqdit.layers.block import IntBlock
from tqdit.layers.clock import TimestepClock
from tqdit.layers.conditioning import Conditioning
from tqdit.ops.modules import Watched
from tqdit.runtime.inputs import Inputs
from tqdit.system.capture import Captured
from tqdit.system.isolation import without_autocast

MAX_GRAPHS = 16  # of different batch sizes and shapes; the one that was not used for longest goes first

Forward = Callable[[torch.Tensor], torch.Tensor]


class Runtime(nn.Module):
    """Runs the forward of the model that owns it.

    With `graphs`, calls on a GPU are captured once per batch size, shape and dtype, then replayed: timestep and class
    are data on the device, nothing waits for the host. Forward hooks inside the model do not run in a replay; set
    `graphs` to False to have them. Moving the model or changing its dtype drops its graphs; moving a part does not.
    """

    def __init__(self, clock: TimestepClock, conditioning: Conditioning, graphs: bool, inputs: Inputs) -> None:
        super().__init__()
        self.graphs = graphs
        self.inputs = inputs
        self._parts = clock, conditioning  # in a tuple: the model owns them
        self._forget_graphs()

    def __getstate__(self) -> dict[str, Any]:
        """Without graphs, which are of this process and these tensors."""
        own = ("_captured", "_lock", "_stream", "_seen")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._captured: OrderedDict[tuple[Any, ...], Captured] = OrderedDict()
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None  # of the last replay
        self._seen: tuple[object, bool] = (None, False)  # what was watched, and whether a graph would be wrong

    def _apply(self, fn: Any, recurse: bool = True) -> "Runtime":
        with self._lock:
            for device in {key[0] for key in self._captured}:
                torch.cuda.synchronize(device)
            self._captured.clear()
        return super()._apply(fn, recurse)

    def call(
        self, forward: Forward, x: torch.Tensor, timestep: Any, labels: torch.Tensor | None, blocks: Any = ()
    ) -> torch.Tensor:
        """`forward` of x (B, C, H, W), for timestep () or (B,), labels (B,).

        There is no graph while any of `blocks` has adapters or is offloaded. Adapters cannot be trained: the result
        never requires a gradient, so `backward` says that it "does not require grad".

        x has passed `inputs.check_states`; raises `InputError` as `inputs.conditions` does. Gradients and autocast are
        off inside: neither means anything for integers, and autocast would round the fp32 products that stand for them.
        """
        t, labels = self.inputs.conditions(x, timestep, labels)
        run = self._replayed if self._graphable(x) and not self._changing(blocks) else self._eager
        with without_gradients(), without_autocast(x.device.type):
            return run(forward, x, t, labels)

    def _graphable(self, x: torch.Tensor) -> bool:
        if not self.graphs or x.device.type != "cuda" or torch.compiler.is_compiling():
            return False
        with _on(x.device):
            return not torch.cuda.is_current_stream_capturing()

    def _changing(self, blocks: Any) -> bool:
        """Whether any block has adapters or is offloaded; looked at again when any watched module got something."""
        if self._seen[0] is not Watched.contents:
            self._seen = Watched.contents, any(block.adapted or block.offloaded for block in blocks)
        return self._seen[1]

    def _eager(self, forward: Forward, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        clock, conditioning = self._parts
        clock.set(t)
        conditioning.set(t, labels)
        try:
            return forward(x)
        finally:
            clock.forget()
            conditioning.forget()

    def _replayed(self, forward: Forward, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        t = t.expand(len(x))
        key = (x.device, x.shape, x.dtype, t.dtype, labels.dtype)
        with self._lock, _on(x.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:  # its last replay has to leave the static tensors
                stream.wait_stream(self._stream)
            self._stream = stream
            if key not in self._captured:
                self._captured[key] = self._capture(forward, x, t, labels)
                if len(self._captured) > MAX_GRAPHS:
                    torch.cuda.synchronize()  # a replay on another stream may still read what is given back
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            return self._captured[key](x, t, labels)

    def _capture(self, forward: Forward, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> Captured:
        def call(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self._eager(forward, x, t, labels)

        return Captured(call, (x, t, labels), x.device)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, which costs as much as a launch where it is already."""
    current = device.index is None or device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(device)


def without_gradients() -> AbstractContextManager[Any]:
    """torch.no_grad(), where gradients are on."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def attach_runtime(model: nn.Module, clock: TimestepClock, conditioning: Conditioning, graphs: bool) -> None:
    """Give a converted diffusers transformer its clock, conditioning and runtime, and let the runtime run its call."""
    from tqdit.runtime.integer import make_integer

    _tell_diffusers()
    model.add_module("clock", clock)
    model.add_module("conditioning", conditioning)
    config: Any = model.config
    inputs = Inputs(config.in_channels, config.patch_size, conditioning.classes, clock.time_groups)
    model.add_module("runtime", Runtime(clock, conditioning, graphs, inputs))
    make_integer(model)


def _tell_diffusers() -> None:
    """Tell its hooks, such as `apply_layer_skip`, what a block of ours takes and returns: hidden states alone.

    Not by `TransformerBlockRegistry.register`, which imports every model that diffusers has.
    """
    from diffusers.hooks import _helpers

    described = _helpers.TransformerBlockMetadata(return_hidden_states_index=0, _cls=IntBlock)
    _helpers.TransformerBlockRegistry._registry.setdefault(IntBlock, described)
