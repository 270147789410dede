"""Modules that hold codes and scales. Scales are fp32 whatever dtype the model is moved to."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from tqdit.layers.clock import TimestepClock
from tqdit.ops.schema import OperandParams, WeightParams
from tqdit.spec import GridParams


class FixedDtype(nn.Module):
    """Buffers change device but never dtype: an fp16 scale would move every code."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class ActivationParams(FixedDtype):
    """Parameters of one activation site; `select` picks those of the batch's time groups."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    coarse: torch.Tensor

    def __init__(self, params: GridParams, clock: TimestepClock, ndim: int) -> None:
        """`ndim`: of the tensor they apply to, (B, N, C) or (B, H, N, head_dim)."""
        super().__init__()
        self.spec = params.spec
        self._clock = [clock]  # in a list: the model owns the clock, a site only reads it
        groups, units = params.spec.groups, params.spec.units
        shape = (groups, units, 1, 1) if ndim == 4 else (groups, 1, 1)
        two_region = self.spec.grid.two_region
        scale = params.scale[..., 0] if two_region else params.scale
        coarse = params.scale[..., 1] if two_region else torch.ones_like(scale)
        zero_point = torch.zeros_like(scale, dtype=torch.int32) if two_region else params.zero_point
        assert zero_point is not None
        self.register_buffer("scale", scale.reshape(shape))
        self.register_buffer("zero_point", zero_point.reshape(shape))
        self.register_buffer("coarse", coarse.reshape(shape))

    def select(self) -> OperandParams:
        """Parameters that broadcast to the batch: leading axis 1 (one group) or B."""
        tensors = (self.scale, self.zero_point, self.coarse)
        if self.spec.groups > 1:
            group = self._clock[0].group
            assert group is not None, "the clock is set by the model's forward"
            tensors = tuple(t.index_select(0, group) for t in tensors)  # type: ignore[assignment]
        return OperandParams(self.spec.grid, self.spec.bits, *tensors)


class QuantizedWeight(FixedDtype):
    """int8 codes (out, in), fp32 scale (out,) or (1,), int32 column sums of one weight."""

    codes: torch.Tensor
    scale: torch.Tensor
    colsum: torch.Tensor

    def __init__(self, codes: torch.Tensor, params: GridParams) -> None:
        super().__init__()
        self.spec = params.spec
        self.register_buffer("codes", codes)
        self.register_buffer("scale", params.scale.reshape(-1))
        self.register_buffer("colsum", codes.flatten(1).sum(1, dtype=torch.int32))

    def operand(self) -> WeightParams:
        return WeightParams(self.codes, self.scale, self.colsum)

    def extra_repr(self) -> str:
        return f"{self.spec.name}, {self.spec.bits} bits, {tuple(self.codes.shape)}"
