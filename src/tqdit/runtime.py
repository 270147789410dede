"""A converted model's denoiser call: clock and conditioning set once, and on a GPU the whole call as one CUDA graph."""

import threading
from collections import OrderedDict
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.layers.block import Conditioning
from tqdit.layers.clock import TimestepClock

MAX_GRAPHS = 16  # of different batch sizes and shapes; the one that was not used for longest goes first


class _Graph(NamedTuple):
    """A captured call. Its inputs are copied in, its output is copied out."""

    graph: torch.cuda.CUDAGraph
    hidden_states: torch.Tensor
    timestep: torch.Tensor
    class_labels: torch.Tensor
    output: torch.Tensor


class Runtime(nn.Module):
    """Runs the forward of the model that owns it.

    With `graphs`, calls on a GPU are captured once per batch size, shape and dtype, then replayed: timestep and class
    are data on the device, nothing waits for the host. Forward hooks inside the model do not run in a replay; set
    `graphs` to False to have them. Moving the model drops its graphs.
    """

    def __init__(self, clock: TimestepClock, conditioning: Conditioning, graphs: bool) -> None:
        super().__init__()
        self.graphs = graphs
        self._parts = clock, conditioning  # in a tuple: the model owns them
        self._captured: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._finished: torch.cuda.Event | None = None  # the last replay has left the static tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        clock, conditioning = (memo.get(id(part), part) for part in self._parts)
        return Runtime(clock, conditioning, self.graphs)

    def _apply(self, fn: Any, recurse: bool = True) -> "Runtime":
        self._captured.clear()
        return super()._apply(fn, recurse)

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `model(*args, **kwargs)` returns, for arguments as diffusers' `DiTTransformer2DModel.forward` takes."""
        names = ("hidden_states", "timestep", "class_labels", "cross_attention_kwargs", "return_dict")
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden_states, labels = given["hidden_states"], given.get("class_labels")
        if not self._graphable(hidden_states) or labels is None or given.get("cross_attention_kwargs"):
            return self._eager(model, args, kwargs)
        timestep = torch.as_tensor(given.get("timestep"))
        if timestep.numel() not in (1, len(hidden_states)) or labels.shape != (len(hidden_states),):
            return self._eager(model, args, kwargs)  # which says what is wrong
        output = self._replayed(model, hidden_states, timestep, labels)
        if given.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=output)
        return (output,)

    def _graphable(self, x: torch.Tensor) -> bool:
        if not self.graphs or x.device.type != "cuda" or torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        return not torch.cuda.is_current_stream_capturing()

    def _eager(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        clock, conditioning = self._parts
        conditioning.pre_hook(model, args, kwargs)
        clock.pre_hook(model, args, kwargs)
        return type(model).forward(model, *args, **kwargs)

    def _replayed(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        key = (x.device, x.shape, x.dtype, t.dtype, labels.dtype)
        with self._lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            if self._finished is not None:
                stream.wait_event(self._finished)
            if key not in self._captured:
                self._captured[key] = self._capture(model, x, t, labels)
                if len(self._captured) > MAX_GRAPHS:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            call = self._captured[key]
            call.hidden_states.copy_(x, non_blocking=True)
            call.timestep.copy_(t.reshape(-1).expand(len(x)), non_blocking=True)
            call.class_labels.copy_(labels, non_blocking=True)
            call.graph.replay()
            output = call.output.clone()
            self._finished = stream.record_event()
        return output

    def _capture(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> _Graph:
        """Two ordinary calls compile and tune the kernels; the third is recorded."""
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to later
            inputs = x.clone(), t.reshape(-1).expand(len(x)).to(x.device, copy=True), labels.to(x.device, copy=True)
            arguments = {"timestep": inputs[1], "class_labels": inputs[2], "return_dict": False}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._eager(model, (inputs[0],), arguments)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                (output,) = self._eager(model, (inputs[0],), arguments)
        for part in self._parts:
            part.forget()  # what they hold is the graph's memory
        return _Graph(graph, *inputs, output)


def attach_runtime(model: nn.Module, clock: TimestepClock, conditioning: Conditioning, graphs: bool) -> None:
    """Give a converted model its clock, conditioning and runtime, and let the runtime run its forward."""
    model.add_module("clock", clock)
    model.add_module("conditioning", conditioning)
    model.add_module("runtime", Runtime(clock, conditioning, graphs))
    model.forward = MethodType(_forward, model)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model.runtime.call(model, args, kwargs)
