"""Quantize an input once for all the layers that read it."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.layers.clock import Clock
from tqdit.layers.params import ActivationParams
from tqdit.ops.rotation import rotate
from tqdit.ops.schema import Backend, OperandParams
from tqdit.spec import GridParams


class _Held(NamedTuple):
    """The codes of the tensor that was quantized last; `left` layers have still to read them."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    codes: Any
    left: int


class Source(nn.Module):
    """The input of `readers` layers: how it is quantized, and its codes while the layers read the same tensor."""

    clock: Clock

    def __init__(self, params: GridParams, clock: Clock, readers: int) -> None:
        super().__init__()
        self.params = ActivationParams(params)
        self.rotation = params.rotation
        self.groups = params.spec.groups
        self.readers = readers
        self.__dict__["clock"] = clock  # not a part of this module: all sources have the model's one clock
        self._held: _Held | None = None
        self._in_graph: tuple[torch.Tensor, Any, int] | None = None

    @property
    def timed(self) -> bool:
        """Say whether the parameters differ between time groups."""
        return self.groups > 1

    def operand(self, samples: int) -> OperandParams:
        """Return the operand for the samples of an input."""
        operand = self.params.operand(self.clock.call if self.timed else None)
        group = operand.group
        if group is None or len(group) in (1, samples):
            return operand
        if samples % len(group):  # samples that are no multiple of the call's: the largest group is for all of them
            return operand._replace(group=group.amax(0, keepdim=True))
        return operand._replace(group=group.repeat_interleave(samples // len(group)))  # such as frames of a video

    def codes(self, x: torch.Tensor, target: OperandParams, backend: Backend) -> Any:
        """Return the codes of x (B, N, C) for a layer; of a tensor that the layers share they are made once."""
        if self.rotation:  # factors come before the rotation
            x = rotate(x if target.channels is None else x.float() * target.channels, self.rotation)
            target = target._replace(channels=None)
        return backend.quantize(x, target)

    def shared(self, x: torch.Tensor, rows: torch.Tensor, target: OperandParams, backend: Backend) -> Any:
        """Return `codes` of `rows`, a view of the layer's input x, kept until every reader has had them.

        What another thread holds meanwhile is never taken for x's: codes are made once more then.
        Nothing is kept of tensors of inference mode, whose changes torch does not count.
        """
        if self.readers == 1:
            return self.codes(rows, target, backend)
        if torch.compiler.is_compiling():
            return self._shared_in_graph(x, rows, target, backend)
        if x.is_inference():
            return self.codes(rows, target, backend)
        held = self._held
        if held is None or held.tensor() is not x or held.version != x._version:
            held = _Held(weakref.ref(x, self._forget), x._version, self.codes(rows, target, backend), self.readers)
        self._held = held._replace(left=held.left - 1) if held.left > 1 else None
        return held.codes

    def _shared_in_graph(self, x: torch.Tensor, rows: torch.Tensor, target: OperandParams, backend: Backend) -> Any:
        """Return what `shared` does while torch.compile traces: it joins equal operators of torch, but not ours.

        The layers of a source read one value in the recorded call, so that nothing was written into x between them.
        """
        held = self._in_graph
        if held is None or held[0] is not x:
            held = (x, self.codes(rows, target, backend), self.readers)
        self._in_graph = (held[0], held[1], held[2] - 1) if held[2] > 1 else None
        return held[1]

    def _forget(self, tensor: weakref.ref[torch.Tensor]) -> None:
        """Free the codes of a tensor that no longer exists: threads that take turns do not count its readers down."""
        held = self._held
        if held is not None and held.tensor is tensor:
            self._held = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}
