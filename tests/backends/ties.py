"""Equality of codes up to ties, and the sizes and grids at which every backend is tested.

LayerNorm, GELU and exp are rounded differently from torch's. So a code after one of them may differ, by one step, where
the value before rounding is nearer to a boundary than that rounding reaches; everything else is equal bit for bit.
"""

import pytest
import torch
from together import together

from tqdit.grids.row import row_scales
from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import parameters
from tqdit.spec import Grid

# How far a float operation may be from torch's, in steps of the grid it is quantized to (at most 256 steps of range).
TIE = 256 * 16 * 2.0**-24
# batch, tokens, width, heads: one token, odd sizes, head_dim 72, more keys and rows than one panel or task holds
SHAPES = [(1, 1, 16, 1), (2, 5, 24, 3), (3, 17, 40, 2), (1, 64, 144, 2), (1, 113, 68, 2), (2, 150, 32, 1)]
SIZES = ("batch", "tokens", "width", "heads")
GELU = [(Grid.UNIFORM, 8, False), (Grid.MRQ_GELU, 8, False), (Grid.MRQ_GELU, 6, False), (Grid.MRQ_GELU, 6, True)]
SOFTMAX = [
    (Grid.UNIFORM, 8, False), (Grid.UNIFORM, 4, False), (Grid.MRQ_SOFTMAX, 8, False), (Grid.MRQ_SOFTMAX, 8, True),
    (Grid.MRQ_SOFTMAX, 6, False), (Grid.MRQ_SOFTMAX, 6, True), (Grid.SOFTMAX_ROW, 8, False),
    (Grid.SOFTMAX_ROW, 4, False),
]  # fmt: skip
KIND = ("grid", "bits", "merged")
each_shape = together(SIZES, SHAPES)
each_gelu = pytest.mark.parametrize(KIND, GELU)
each_softmax = pytest.mark.parametrize(KIND, SOFTMAX)


def assert_equal_up_to_ties(actual: torch.Tensor, value: torch.Tensor, params: OperandParams, tie: float = TIE) -> None:
    """`actual` are codes of `value` (fp64), or of a value closer to it than `tie` steps."""
    below, above = (exact_codes(value, params, offset) for offset in (-tie, tie))
    assert ((actual >= torch.minimum(below, above)) & (actual <= torch.maximum(below, above))).all()


def exact_codes(value: torch.Tensor, params: OperandParams, offset: float = 0.0) -> torch.Tensor:
    """Return the codes of a value moved by `offset` steps, in fp64."""
    half = 1 << (params.bits - 1)
    p = parameters(params, value.ndim)
    scale, coarse = p.scale.double(), p.coarse.double()
    if params.grid is Grid.ROW:
        return torch.round(value / row_scales(value.float(), p.scale) + offset).clamp(-half, half - 1)
    if not params.grid.two_region:
        return (torch.round(value / scale + offset) + p.zero_point).clamp(-half, half - 1)
    if params.grid is Grid.MRQ_SOFTMAX:
        top = half - 1
        fine = value + offset * scale <= top * scale
        steps = torch.round(value / torch.where(fine, scale, coarse) + offset).clamp(max=top)
        return torch.where(fine, -steps, steps)
    moved = value / torch.where(value < 0, scale, coarse) + offset
    return torch.round(moved).clamp(-half, half - 1)
