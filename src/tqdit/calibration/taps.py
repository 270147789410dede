"""Watch a float model: every operand and every output of its quantized matmuls, while it computes them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from tqdit.architectures.attention import Computed, OpenAttention, check_plain, opened
from tqdit.architectures.interface import Attention, Block, Linear
from tqdit.system.hooks import hooks


class Sink(Protocol):
    """The receiver of what a watched model computes.

    Operands are detached; outputs are part of the graph, so that gradients can be watched.
    """

    def linear_input(self, linear: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Receive the input of a linear layer, x: (B, N, in).

        `bias` (B, N): the mask of the attention whose keys and values are made of x, or None.
        """

    def linear_output(self, linear: Linear, module: str, z: torch.Tensor) -> None:
        """Receive z, (B, N, out), of one of the layer's modules."""

    def attention(self, attention: Attention, computed: Computed) -> None:
        """Receive everything that an attention computed; its operands are detached."""


class Taps:
    """A watcher that passes everything a watched model computes to `sink`.

    It keeps nothing itself, so that the sink decides about memory.
    """

    def __init__(self) -> None:
        self.sink: Sink | None = None
        self._bias: torch.Tensor | None = None  # the mask, while a masked attention's keys and values are projected

    @contextmanager
    def sending_to(self, sink: Sink) -> Iterator[None]:
        """Send to `sink` what the model computes while the block runs."""
        self.sink = sink
        try:
            yield
        finally:
            self.sink = self._bias = None

    @contextmanager
    def attached(self, model: nn.Module, blocks: tuple[Block, ...]) -> Iterator[None]:
        """Watch a float model; its processors and hooks are restored on exit.

        Raises `InputError` that names an attention which cannot be watched.
        """
        with hooks() as keep, opened() as replace:
            for block in blocks:
                for attention in block.attentions:
                    attn: Any = model.get_submodule(attention.module)
                    check_plain(attn, attention.module)
                    replace(attn, OpenAttention(self._mask, partial(self._attended, attention)))
                for linear in block.linears:
                    keep(model.get_submodule(linear.modules[0]).register_forward_pre_hook(self._input_hook(linear)))
                    for name in linear.modules:
                        keep(model.get_submodule(name).register_forward_hook(self._output_hook(linear, name)))
            yield

    def _mask(self, bias: torch.Tensor | None) -> None:
        self._bias = bias

    def _attended(self, attention: Attention, computed: Computed) -> None:
        if self.sink:
            self.sink.attention(attention, computed.detached())

    def _input_hook(self, linear: Linear) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if self.sink:
                self.sink.linear_input(linear, args[0].detach(), self._bias)

        return hook

    def _output_hook(self, linear: Linear, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            if self.sink:
                self.sink.linear_output(linear, name, output)

        return hook


@contextmanager
def watched_stream(
    model: nn.Module, blocks: Sequence[Block], receive: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Give `receive` the residual stream of a float model, (B, N, C), before each block and after the last one.

    The stream is the first argument of a block and its result, or the first of its results.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(next(iter((*args, *kwargs.values()))).detach())

    def after(_: nn.Module, __: Any, output: Any) -> None:
        receive((output[0] if isinstance(output, tuple) else output).detach())

    modules = [model.get_submodule(block.prefix) for block in blocks]
    with hooks() as keep:
        for module in modules:
            keep(module.register_forward_pre_hook(before, with_kwargs=True))
        keep(modules[-1].register_forward_hook(after))
        yield
