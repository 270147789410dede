"""Watching a float model: every operand and every output of its quantized matmuls, while it computes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from tqdit.architectures.sites import BlockLayout, LinearGroup


class Sink(Protocol):
    """Who is told. Inputs are detached; outputs are part of the graph, so that gradients can be watched."""

    def linear_input(self, group: LinearGroup, x: torch.Tensor) -> None:
        """x: (B, N, in)."""

    def linear_output(self, group: LinearGroup, module: str, z: torch.Tensor) -> None:
        """z: (B, N, out) of one of the group's modules."""

    def attention(
        self, block: BlockLayout, operands: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]
    ) -> None:
        """operands: q, k, v (B, H, N, d), probabilities (B, H, N, N); outputs: scaled scores and attended values."""


class Taps:
    """Tells `sink` of everything that a watched model computes. Keeps nothing itself, so that memory is the sink's."""

    def __init__(self) -> None:
        self.sink: Sink | None = None

    @contextmanager
    def telling(self, sink: Sink) -> Iterator[None]:
        self.sink = sink
        try:
            yield
        finally:
            self.sink = None

    @contextmanager
    def attached(self, model: nn.Module, layout: tuple[BlockLayout, ...]) -> Iterator[None]:
        """Watch a float model; its processors and hooks are restored on exit."""
        handles, originals = [], []
        for block in layout:
            attn = model.get_submodule(block.attention)
            originals.append((attn, attn.processor))
            attn.processor = self._processor(block)
            for group in block.linears:
                first = model.get_submodule(group.modules[0])
                handles.append(first.register_forward_pre_hook(self._input_hook(group)))
                for name in group.modules:
                    handles.append(model.get_submodule(name).register_forward_hook(self._output_hook(group, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for attn, processor in originals:
                attn.processor = processor

    def _processor(self, block: BlockLayout) -> Any:
        """An attention processor that computes softmax(Q K^T / sqrt(d)) V in the open."""

        def process(attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            def heads(x: torch.Tensor) -> torch.Tensor:
                return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

            q, k, v = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            probabilities = scores.softmax(-1)
            attended = probabilities @ v
            if self.sink:
                operands = tuple(x.detach() for x in (q, k, v, probabilities))
                self.sink.attention(block, operands, (scores, attended))
            return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))

        return process

    def _input_hook(self, group: LinearGroup) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if self.sink:
                self.sink.linear_input(group, args[0].detach())

        return hook

    def _output_hook(self, group: LinearGroup, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            if self.sink:
                self.sink.linear_output(group, name, output)

        return hook
