"""The CPU backend: fused integer operations, compiled for this processor at first use.

Either half falls back by itself: on a processor without any of `instructions.KNOWN` the integer products go through
oneDNN, or in exact pieces of fp32; without a C++ compiler everything else runs in torch. Results are those of
`ops.reference`: the same accumulators, and the same codes but where LayerNorm, GELU or exp, rounded differently from
torch's, fall on the other side of a rounding boundary.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from tqdit.backends import cpu_ends, fused, native, onednn, operators, panels
from tqdit.backends.onednn import SIGN, PackedLinear, PackedWeight
from tqdit.backends.panels import PanelLinear
from tqdit.ops import reference
from tqdit.ops.composed import FUNCTIONS, Composed
from tqdit.ops.ends import EndLayer
from tqdit.ops.holders import LinearCodes
from tqdit.ops.schema import (
    Activation,
    AttentionParams,
    Codes,
    Norm,
    OperandParams,
    Residual,
    RowCodes,
    Then,
    WeightParams,
)
from tqdit.ops.tables import parameters
from tqdit.spec import Grid
from tqdit.system.isolation import without_autocast

Layer = PackedLinear | PanelLinear

WEIGHT_ROWS = 4096  # rows of a float-input weight that are in fp32 at a time, where nothing is compiled


class TorchCpu(Composed):
    """The backend of integer products in oneDNN or exact fp32, with the rest composed of torch operations.

    Codes are int8.
    """

    NAME = "cpu"
    INTEGER = True
    scores = staticmethod(reference.scores)
    values = staticmethod(reference.values)

    def kernel(self, operation: str) -> str:
        if operation == "linear":
            return "int8 in fp32, exact" if onednn.reason() else "onednn u8 x s8"
        return "float32 x int8" if operation == "float_input_linear" else "int8 in fp32, exact"

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return PackedLinear(weight, bias)

    def product(self, codes: Codes, source: OperandParams, layer: PackedLinear) -> torch.Tensor:
        if isinstance(codes, RowCodes):
            (total,) = _sums(_planes(codes.codes, source), source, layer.weight)
            return total.mul_(codes.scale[..., None]).mul_(layer.scale).add_(layer.bias)
        p = parameters(source, codes.ndim)
        sums = _sums(_planes(codes, source), source, layer.weight)
        if len(sums) == 1:
            return sums[0].mul_(p.scale * layer.scale).add_(layer.bias)
        fine = sums[0].mul_(-source.grid.sign * p.scale)
        return sums[1].mul_(p.coarse).add_(fine).mul_(layer.scale).add_(layer.bias)

    def float_input_linear(self, x: torch.Tensor, layer: LinearCodes, dtype: torch.dtype | None = None) -> torch.Tensor:
        rows = layer.codes.split(WEIGHT_ROWS)
        with without_autocast(x.device.type):
            out = torch.cat([torch.matmul(x.float(), part.float().t()) for part in rows], dim=-1).mul_(layer.scale)
        return (out if layer.bias is None else out.add_(layer.bias)).to(dtype or torch.float32)


class NativeCpu(TorchCpu):
    """The backend of compiled kernels.

    Codes are uint8, signed code + 128; those of two regions are two planes. A step of a row needs the row as a whole:
    where a target after attention or GELU is on the grid of rows, floats are written and then coded. The compiled
    verbs do so while the floats are in the cache; in a graph of torch they are two operators.
    """

    ENDS_EVERYWHERE = True

    def kernel(self, operation: str) -> str:
        if operation in ("scores", "values"):
            return f"fused attention, {native.instructions()} u8 x s8"
        if operation == "linear" and native.has_products():
            return f"fused, {native.instructions()} u8 x s8"
        return super().kernel(operation)

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return PanelLinear(weight, bias) if panels.supported(weight.codes.shape[1]) else PackedLinear(weight, bias)

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        columns = len(weight.codes)
        scale = weight.scale.expand(columns).contiguous()
        bias = torch.zeros_like(scale) if bias is None else bias.float().contiguous()
        return LinearCodes(weight._replace(codes=weight.codes.contiguous(), scale=scale), bias)

    def quantize(self, x: torch.Tensor, target: OperandParams, norm: Norm | None = None) -> Codes:
        return _quantize(x, target, norm)

    def project(
        self, codes: Codes, source: OperandParams, layer: Layer, targets: Sequence[OperandParams], heads: int
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            weight, flat = operators.flat_weight(layer.weight), operators.flat_codes(codes)
            return operators.project(*flat, *weight, heads, *operators.flatten(source, *targets))
        return fused.project(codes, source, layer.weight, targets, heads)

    def attend(
        self,
        projected: torch.Tensor,
        attention: AttentionParams,
        target: OperandParams,
        context: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> Codes:
        by_row, compiling = target.grid is Grid.ROW, torch.compiler.is_compiling()
        separate = compiling if by_row else target.channels is not None
        operands = (*attention.projections, attention.softmax, *(() if separate else (target,)))
        if compiling:
            out = operators.attend(projected, context, bias, attention.heads, *operators.flatten(*operands))
        else:
            out = fused.attend(projected, attention, None if separate else target, context, bias)
        return _quantize(out, target) if separate else out

    def linear(self, codes: Codes, source: OperandParams, layer: Layer, then: Then | None = None) -> Codes:
        if isinstance(then, Residual):
            return _added(codes, source, layer, then)
        if not isinstance(then, Activation):
            return _float(codes, source, layer, torch.float32 if then is None else then.dtype)
        if then.function != "gelu_tanh":
            return self.quantize(FUNCTIONS[then.function](_float(codes, source, layer)), then.target)
        if torch.compiler.is_compiling():
            if then.target.grid is Grid.ROW:
                return _quantize(_float(codes, source, layer), then.target, gelu=True)
            weight, operands = operators.flat_weight(layer.weight), operators.flatten(source, then.target)
            return operators.linear_gelu(*operators.flat_codes(codes), *weight, *operands)
        return fused.linear_gelu(codes, source, layer.weight, then.target)

    def float_input_linear(self, x: torch.Tensor, layer: LinearCodes, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert layer.bias is not None
        if not torch.compiler.is_compiling():
            return fused.float_input_linear(x, layer.codes, layer.scale, layer.bias, dtype)
        index = None if dtype is None else operators.DTYPES.index(dtype)
        return operators.float_input_linear(x, layer.codes, layer.scale, layer.bias, index)

    def embed(
        self, x: torch.Tensor, layer: EndLayer, position: torch.Tensor, side: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if not cpu_ends.supported(layer, x.dtype, dtype):
            return None
        weight = cpu_ends.weight_of(layer)
        if torch.compiler.is_compiling():
            return operators.embed(x, *weight, position, side, operators.DTYPES.index(dtype))
        return cpu_ends.embed(x, weight, position, side, dtype)

    def unembed(
        self, stream: torch.Tensor, shift_scale: torch.Tensor, eps: float, layer: EndLayer, x: torch.Tensor, side: int
    ) -> torch.Tensor | None:
        if not cpu_ends.supported(layer, x.dtype, stream.dtype):
            return None
        weight = cpu_ends.weight_of(layer)
        if torch.compiler.is_compiling():
            return operators.unembed(stream, shift_scale, eps, *weight, x, side)
        return cpu_ends.unembed(stream, shift_scale, eps, weight, x, side)


def unavailable(device: torch.device) -> str | None:
    """Return why the backend cannot run on a device, or None.

    It runs on every CPU, at worst in torch alone.
    """
    return None if device.type == "cpu" else "it runs on CPUs only"


def BACKEND() -> TorchCpu:  # noqa: N802  (a class in the other backends)
    """Return the compiled kernels' backend where they can be built, else `TorchCpu` with a warning."""
    if reason := native.reason():
        warnings.warn(f"integer models run in torch, several times slower: {reason} (docs/cpu.md)", stacklevel=3)
        return TorchCpu()
    return NativeCpu()


def _quantize(x: torch.Tensor, target: OperandParams, norm: Norm | None = None, gelu: bool = False) -> Codes:
    """Return codes as `fused.quantize` does; `gelu` is for targets on the grid of rows."""
    if not torch.compiler.is_compiling():
        return fused.quantize(x, target, norm, gelu)
    shift, scale, eps = (None, None, 0.0) if norm is None else norm
    tensors, kinds = operators.flatten(target)
    if target.grid is Grid.ROW:
        return RowCodes(*operators.quantize_rows(x, shift, scale, float(eps), tensors, kinds, gelu))
    return operators.quantize(x, shift, scale, float(eps), tensors, kinds)


def _float(codes: Codes, source: OperandParams, layer: Layer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        return fused.linear(codes, source, layer.weight, dtype)
    weight, operands = operators.flat_weight(layer.weight), operators.flatten(source)
    return operators.linear(*operators.flat_codes(codes), *weight, *operands, operators.DTYPES.index(dtype))


def _added(codes: Codes, source: OperandParams, layer: Layer, then: Residual) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        return fused.linear_added(codes, source, layer.weight, then)
    weight, operands = operators.flat_weight(layer.weight), operators.flatten(source)
    return operators.linear_added(*operators.flat_codes(codes), *weight, *operands, then.gate, then.x)


def _planes(codes: torch.Tensor, source: OperandParams) -> list[torch.Tensor]:
    """Return the uint8 operands of the products that signed codes need: one, or one per region."""
    if not source.grid.two_region:
        return [codes.contiguous().view(torch.uint8) ^ SIGN]
    negative, positive = (part.to(torch.int32) for part in reference.split_regions(codes))
    if source.two_products:
        return [(-negative).to(torch.uint8), positive.to(torch.uint8)]
    half, factor = 1 << (source.bits - 1), parameters(source, codes.ndim).factor
    return [(positive * factor + source.grid.sign * negative + half).to(torch.uint8)]


def _sums(planes: list[torch.Tensor], source: OperandParams, weight: PackedWeight) -> list[torch.Tensor]:
    """Return the integer sums of each plane with the weight, zero points taken out, as fp32 (B, N, out)."""
    zeros = onednn.zero_points(source)
    if torch.compiler.is_compiling():
        return [operators.product(plane, zeros, *operators.flat_weight(weight)) for plane in planes]
    return [onednn.product(plane, zeros, weight) for plane in planes]
