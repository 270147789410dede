"""The compiled kernels around the blocks of a transformer: the first and the last layer on patches.

As in `fused`, shapes are checked, results allocated, kernels called, and torch cannot trace anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tqdit.backends import native
from tqdit.backends.signatures import (
    FLOATS,
    EmbedCall,
    EndWeight,
    Patches,
    UnembedCall,
    address,
    need,
    refusal,
    size,
)
from tqdit.ops.ends import EndLayer


class Weight(NamedTuple):
    """The tensors of a layer: a weight (out, in), fp32, or int8 codes with a `scale` (out,); `bias` (out,) or None."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


def weight_of(layer: EndLayer) -> Weight:
    """Return the tensors of a layer."""
    if layer.codes is not None:
        return Weight(layer.codes.codes, layer.codes.scale, layer.codes.bias)
    assert layer.weight is not None
    return Weight(layer.weight, None, layer.bias)


def supported(layer: EndLayer, *dtypes: torch.dtype) -> bool:
    """Say whether the kernels have this layer, and latents and a residual stream of these dtypes."""
    floats = [values for values in (layer.weight, layer.bias) if values is not None]
    return all(dtype in FLOATS for dtype in dtypes) and all(values.dtype is torch.float32 for values in floats)


def embed(x: Tensor, layer: Weight, position: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Return the residual stream (B, N, D) as `ops.ends.Ends.embed` does, with |error| <= (K + 8) 2^-24 Σ|terms|.

    The result is then rounded once to `dtype`. Latents may have any strides.
    """
    patches = _patches(x, side)
    batch, channels, tokens = patches.batch, x.shape[1], patches.tokens
    weight = _EndWeight(layer)
    columns, depth = weight.shape
    if depth != channels * side**2:
        raise refusal(f"patches of {channels} x {side} x {side} for a layer of depth {depth}")
    if position.shape != (tokens, columns):
        raise refusal(f"positions {tuple(position.shape)} for {tokens} tokens of width {columns}")
    position, out = position.contiguous(), torch.empty((batch, tokens, columns), dtype=dtype)
    sample, channel, line, pixel = (size(stride) for stride in x.stride())
    call = EmbedCall(
        x=address(x, x.dtype, adjacent=False), position=address(position, torch.float32), out=address(out, dtype),
        sample_stride=sample, channel_stride=channel, line_stride=line, pixel_stride=pixel, channels=channels,
        type=FLOATS[x.dtype], out_type=FLOATS[dtype], threads=torch.get_num_threads(), patches=patches,
        layer=weight.struct,
    )  # fmt: skip
    native.call("embed", call)
    return out


def unembed(stream: Tensor, shift_scale: Tensor, eps: float, layer: Weight, x: Tensor, side: int) -> Tensor:
    """Return latents (B, C', H, W) as `ops.ends.Ends.unembed` does.

    The product of the modulated norm, fp32 numbers, has |error| <= (D + 8) 2^-24 Σ|terms|. The result is then rounded
    once to the dtype of x.
    """
    patches, weight = _patches(x, side), _EndWeight(layer)
    batch, tokens, (columns, depth) = patches.batch, patches.tokens, weight.shape
    if stream.shape != (batch, tokens, depth):
        raise refusal(f"hidden states {tuple(stream.shape)} for {batch} x {tokens} tokens of width {depth}")
    if shift_scale.shape != (batch, 2 * depth):
        raise refusal(f"modulation {tuple(shift_scale.shape)} for {batch} samples of width {depth}")
    if columns % side**2:
        raise refusal(f"{columns} columns for patches of {side} x {side} pixels")
    stream = stream.contiguous()
    shift_scale = shift_scale if shift_scale.stride(1) == 1 else shift_scale.contiguous()
    out = torch.empty((batch, columns // side**2, *x.shape[2:]), dtype=x.dtype)
    call = UnembedCall(
        x=address(stream, stream.dtype), modulation=address(shift_scale, torch.float32, adjacent=False),
        out=address(out, x.dtype), stride=size(shift_scale.stride(0)), type=FLOATS[stream.dtype],
        out_type=FLOATS[x.dtype], threads=torch.get_num_threads(), patches=patches, layer=weight.struct, eps=float(eps),
    )  # fmt: skip
    native.call("unembed", call)
    return out


class _EndWeight:
    """The structure `EndLayer` of ends.h with the tensors it points into.

    `shape`: of the weight, (out, in).
    """

    def __init__(self, layer: Weight) -> None:
        weight, scale, bias = self.alive = layer.weight.contiguous(), layer.scale, layer.bias
        columns, depth = self.shape = weight.shape
        need(columns * depth > 0, "a layer without weights")
        self.struct = EndWeight(columns=columns, depth=depth)
        if scale is None:
            self.struct.weight = address(weight, torch.float32)
        else:
            self.struct.codes, self.struct.scale = address(weight, torch.int8), address(scale, torch.float32, columns)
        if bias is not None:
            self.struct.bias = address(bias, torch.float32, columns)


def _patches(x: Tensor, side: int) -> Patches:
    """Return where the patches of latents (B, C, H, W) lie."""
    if x.ndim != 4 or not size(side) or x.shape[2] % side or x.shape[3] % side:
        raise refusal(f"latents {tuple(x.shape)} in patches of {side} x {side}")
    down, across = x.shape[2] // side, x.shape[3] // side
    return Patches(batch=len(x), tokens=down * across, across=across, side=side)
