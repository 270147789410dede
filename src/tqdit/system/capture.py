"""CUDA graphs: a call is recorded, then replayed with other inputs by one launch."""

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tqdit.system.trees import Path, flatten, tensors, unflatten

WARM_UP = 3  # calls before a capture: the first compiles, the others need every workspace and kernel only
LOCK = threading.RLock()  # one capture at a time in a process: another's allocations would end up in it


@contextmanager
def recording(stream: torch.cuda.Stream | None = None) -> Iterator[torch.cuda.CUDAGraph]:
    """Record the work that is launched inside as a graph.

    On an error the current stream is put back. thread_local: an allocation of another thread, of a progress bar or a
    compiler, does not break the capture.
    """
    graph = torch.cuda.CUDAGraph()
    with LOCK, torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves its own stream current
        own = stream or torch.cuda.Stream()  # torch's own default is of whichever device came first
        with _no_collection(), torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
            yield graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from freeing cycles inside: nothing may be freed while a capture is under way.

    To collect them before takes a quarter of a second: too long where hundreds of kernels are timed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Captured:
    """A function from tensors to a tensor as one graph with static inputs and a static output of its own."""

    def __init__(self, call: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], device: torch.device) -> None:
        """Capture `function` with `inputs`, which may be on the host; they are copied to `device`."""
        with LOCK, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            # Inference tensors could not be written to later.
            self._inputs = tuple(x.to(device, copy=True) for x in inputs)
            call(*self._inputs)  # this call compiles and tunes, on the stream of every other call
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # cuBLAS keeps a workspace per stream: not in the graph's memory
                for _ in range(WARM_UP - 1):
                    call(*self._inputs)
            gc.collect()  # frees models in cycles before the graph reserves memory for as long as it lives
            with recording(stream) as self._graph:
                self._output = call(*self._inputs)
            current.wait_stream(stream)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the output for other inputs of the same shapes. The caller may keep it."""
        torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._output.clone()  # the next replay writes over it


class CudaGraphed(nn.Module):
    """A denoiser that replays a CUDA graph, captured at the first call with inputs of that shape.

    Each graph has inputs and memory of its own, so several of these take turns without recording anything again,
    which the graphs of torch.compile's own modes, in one shared pool, do not promise.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap `module`, which maps x and keyword arguments to a tuple of one tensor and never synchronises."""
        super().__init__()
        self.module = module
        self._graphs: dict[tuple[Any, ...], Captured] = {}

    @property
    def config(self) -> Any:
        """Return the module's config."""
        return self.module.config

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = False, **inputs: Any) -> tuple[torch.Tensor]:
        """Return what the module returns, (output,). The caller may keep it.

        `inputs`: keyword arguments of the module, tensors or nested dictionaries of them. Other values are constants:
        each combination has a graph of its own.
        """
        flat = flatten(inputs)
        given = tensors(flat)
        constants = {path: value for path, value in flat.items() if path not in given}
        every = (hidden_states, *given.values())
        key = (tuple((x.shape, x.dtype) for x in every), tuple(given), repr(constants))
        if key not in self._graphs:
            self._graphs[key] = Captured(self._call(tuple(given), constants), every, hidden_states.device)
        return (self._graphs[key](*every),)

    def _call(self, paths: Sequence[Path], constants: Mapping[Path, Any]) -> Callable[..., torch.Tensor]:
        """Return the module as a function of the hidden states and of the tensors at `paths`."""

        def call(hidden_states: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            inputs = unflatten({**constants, **dict(zip(paths, values, strict=True))})
            return self.module(hidden_states, **inputs)[0]

        return call
