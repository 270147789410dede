"""Random latents and residual streams for the kernels around the blocks of any backend, and their results in float64.

Bounds are on sums of absolute products, as for a sum in fp32 in any order, and half a step of the result's dtype.
"""

from collections.abc import Callable

import pytest
import torch
from operands import maker
from torch import nn
from torch.nn import functional as F

from tqdit.ops.ends import EndLayer
from tqdit.ops.schema import WeightParams

DTYPES = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-6
UNIT = 2.0**-24
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_stream = pytest.mark.parametrize("stream", DTYPES, ids=str)
Prepare = Callable[[WeightParams, torch.Tensor], nn.Module]  # `prepare_float_input` of a backend
Made = tuple[EndLayer, torch.Tensor, torch.Tensor]  # a layer; its weight and bias in float64
LayerOf = Callable[[str, int, int], Made]  # makes one of a kind, of so many columns, of a depth


def layer_of(prepare: Prepare, kind: str, columns: int, depth: int) -> Made:
    """Make a layer in float, with or without bias, or of codes: of 6 bits if `packed`, else of 8."""
    make = maker(3, 6 if kind == "packed" else 8)
    bias = torch.zeros(columns) if kind == "no bias" else make.values(columns)
    if kind in ("float", "no bias"):
        weight = make.values(columns, depth)
        return EndLayer(weight, None if kind == "no bias" else bias), weight.double(), bias.double()
    params = make.weight(columns, depth)
    value = params.codes.double() * params.scale.double()[:, None]
    return EndLayer(codes=prepare(params, bias)), value, bias.double()


def rounding(dtype: torch.dtype) -> float:
    """Half a step of a dtype."""
    return torch.finfo(dtype).eps / 2


def embed_case(
    make_layer: LayerOf,
    batch: int,
    channels: int,
    size: tuple[int, int],
    side: int,
    width: int,
    kind: str,
    dtype: torch.dtype,
):
    """Latents, the layer, positions; the stream in float64, and the sum of absolute terms."""
    make = maker(1)
    x = make.values(batch, channels, size[0] * side, size[1] * side).to(dtype)
    layer, weight, bias = make_layer(kind, width, channels * side**2)
    position = make.values(size[0] * size[1], width)
    patches = F.pixel_unshuffle(x.double(), side).flatten(2).transpose(1, 2)
    exact = patches @ weight.t() + bias + position.double()
    return x, layer, position, exact, patches.abs() @ weight.abs().t() + bias.abs() + position.double().abs()


def assert_embedded(found: torch.Tensor | None, depth: int, exact, size, stream: torch.dtype) -> torch.Tensor:
    assert found is not None
    assert found.dtype is stream
    bound = (depth + 8) * UNIT * size + exact.abs() * rounding(stream)
    assert ((found.cpu().double() - exact).abs() <= bound).all()
    return found


def unembed_case(
    make_layer: LayerOf,
    batch: int,
    channels: int,
    size: tuple[int, int],
    side: int,
    width: int,
    kind: str,
    dtype: torch.dtype,
    **drawn: float,
):
    """A stream, its modulation, the layer; latents in float64, and the sum of absolute terms of each.

    The error of the norm counts: of mean and deviation, as sums over the width, against what the stream's mean is.
    """
    make = maker(2)
    x = (make.values(batch, size[0] * size[1], width) * drawn.get("spread", 1.0) + drawn.get("mean", 0.0)).to(dtype)
    modulation = make.values(batch, 2 * width)
    layer, weight, bias = make_layer(kind, channels * side**2, width)
    shift, scale = modulation.double()[:, None].chunk(2, dim=-1)
    values = x.double()
    deviation = (values.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    normal = (values - values.mean(-1, keepdim=True)) / deviation
    given = normal * (1 + scale) + shift
    # A mean is within 4 units of the largest value; a deviation, and what is multiplied by it, within 8.
    error = (4 * values.abs().amax(-1, keepdim=True) / deviation + 8 * normal.abs()) * (1 + scale).abs() + given.abs()
    products = given.abs() @ weight.abs().t() + bias.abs()
    bound = UNIT * ((width + 8) * products + error @ weight.abs().t())
    return x, modulation, layer, as_latents(given @ weight.t() + bias, size, side), as_latents(bound, size, side)


def as_latents(y: torch.Tensor, size: tuple[int, int], side: int) -> torch.Tensor:
    """(B, N, side side C) -> (B, C, H, W)."""
    y = y.unflatten(2, (side, side, -1)).unflatten(1, size)
    return torch.einsum("bhwijc->bchiwj", y).flatten(4, 5).flatten(2, 3)


def assert_unembedded(found: torch.Tensor | None, exact, bound, dtype: torch.dtype) -> torch.Tensor:
    assert found is not None
    assert found.dtype is dtype
    assert found.is_contiguous()
    assert ((found.cpu().double() - exact).abs() <= bound + exact.abs() * rounding(dtype)).all()
    return found
