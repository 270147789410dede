"""Modules that hold tensors whose dtype is part of the number format."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from tqdit.ops.schema import WeightParams


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


class LinearCodes(FixedDtype):
    """int8 codes (out, in), fp32 scale (out,) or (1,), column sums if they were given, and bias of a linear layer.

    The codes are a copy: given ones may be part of a mapped file.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    colsum: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: WeightParams, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes.clone())
        self.register_buffer("scale", weight.scale)
        self.register_buffer("colsum", weight.colsum)
        self.register_buffer("bias", bias)

    def unpacked(self) -> torch.Tensor:
        """The codes, int8 (out, in)."""
        return self.codes

    @property
    def weight(self) -> WeightParams:
        return WeightParams(self.codes, self.scale, self.colsum)
