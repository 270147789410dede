"""Lay a weight out for the compiled integer matmul: panels of 64 columns, four items of K side by side."""

from typing import NamedTuple

import torch

from tqdit.backends import native
from tqdit.backends.signatures import address
from tqdit.ops.holders import FixedDtype, per_output
from tqdit.ops.schema import WeightParams

FOUR = 4  # items of K that lie side by side: one VNNI instruction multiplies them
LANES = 16


def supported(depth: int) -> bool:
    """Say whether the compiled product serves a weight (out, depth) here."""
    return depth % FOUR == 0 and native.has_products()


class PanelWeight(NamedTuple):
    """A linear layer as tensors: packed int8 codes, their sums, fp32 scale and bias (out,)."""

    packed: torch.Tensor
    sums: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    shape: tuple[int, int]  # (out, in)


class PanelLinear(FixedDtype):
    """A linear layer for integer products: packed int8 codes, their sums, fp32 scale and bias (out,).

    The plain codes are not kept; `unpacked` gives them back.
    """

    packed: torch.Tensor
    sums: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, weight: WeightParams, bias: torch.Tensor | None) -> None:
        super().__init__()
        columns, depth = self.shape = (weight.codes.shape[0], weight.codes.shape[1])
        codes = weight.codes.contiguous()
        packed = torch.empty(-(-columns // LANES) * LANES * depth, dtype=torch.int8)
        sums = torch.empty(columns, dtype=torch.int32)
        native.call(
            "pack_weight", address(codes, torch.int8), columns, depth, address(packed, torch.int8),
            address(sums, torch.int32), torch.get_num_threads(),
        )  # fmt: skip
        self.hold("packed", packed)
        self.hold("sums", sums)
        self.hold("scale", per_output(weight.scale, weight))
        self.hold("bias", per_output(bias, weight))

    @property
    def weight(self) -> PanelWeight:
        """Return the layer as tensors."""
        return PanelWeight(self.packed, self.sums, self.scale, self.bias, self.shape)

    def unpacked(self) -> torch.Tensor:
        """Return the codes, int8 (out, in)."""
        columns, depth = self.shape
        panels = []
        for begin in range(0, columns, 64):
            width = min(64, -(-(columns - begin) // LANES) * LANES)
            panel = self.packed[begin * depth : (begin + width) * depth].view(depth // FOUR, width, FOUR)
            panels.append(panel.permute(1, 0, 2).reshape(width, depth))
        return torch.cat(panels)[:columns]
