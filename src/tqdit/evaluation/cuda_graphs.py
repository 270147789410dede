"""A model as CUDA graphs: one launch a call, so that no time goes into Python between kernels."""

import gc
from typing import Any

import torch
from torch import nn

WARM_UP = 3  # calls before a capture: the first compiles, the others find every workspace and kernel in place


class CudaGraphed(nn.Module):
    """A denoiser that replays a CUDA graph, captured at the first call with inputs of that shape.

    Each graph has inputs and memory of its own, so several of these take turns without recording anything again,
    which the graphs of torch.compile's own modes, in one shared pool, do not promise.
    """

    def __init__(self, module: nn.Module) -> None:
        """`module`: called with (x, timestep, class_labels), gives a tuple of one tensor; never synchronises."""
        super().__init__()
        self.module = module
        self._graphs: dict[tuple[Any, ...], _Captured] = {}

    @property
    def config(self) -> Any:
        return self.module.config

    @torch.inference_mode()
    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """As the module's; the output is the caller's to keep."""
        inputs = (hidden_states, timestep, class_labels)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._graphs:
            self._graphs[key] = _Captured(self.module, inputs)
        return (self._graphs[key](inputs),)


class _Captured:
    """One graph with its static inputs and output."""

    def __init__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        device = inputs[0].device
        before = torch.cuda.current_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(before):  # a capture that fails leaves its own stream behind
            module(*self._inputs)  # compiles and tunes, on the stream of every other call
            stream = torch.cuda.Stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):  # cuBLAS keeps a workspace per stream: not in the graph's memory
                for _ in range(WARM_UP - 1):
                    module(*self._inputs)
            gc.collect()  # nothing may be freed while a capture is under way
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: another thread's allocation, of a progress bar or a compiler, does not break the capture
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                (self._output,) = module(*self._inputs)
            before.wait_stream(stream)

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        return self._output.clone()  # the next replay writes over it
