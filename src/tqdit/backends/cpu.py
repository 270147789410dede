"""The CPU backend: fused integer operations, compiled for this processor at first use.

Either half falls back by itself: without AVX-512 VNNI the integer products go through oneDNN, or in exact pieces of
fp32; without a C++ compiler everything else runs in torch. Results are those of `ops.reference`: the same
accumulators, and the same codes but where LayerNorm, GELU or exp, rounded differently from torch's, fall on the other
side of a rounding boundary.
"""

import ctypes
import warnings

import torch
from torch import nn

from tqdit.backends import native, onednn, panels
from tqdit.backends.onednn import SIGN, PackedLinear
from tqdit.backends.panels import PanelLinear
from tqdit.grids.regions import sign
from tqdit.ops import reference
from tqdit.ops.composed import Composed
from tqdit.ops.holders import LinearCodes
from tqdit.ops.schema import AttentionParams, OperandParams, WeightParams

Layer = PackedLinear | PanelLinear

WEIGHT_ROWS = 4096  # of a float-input weight that exist in fp32 at a time, where nothing is compiled


class TorchCpu(Composed):
    """Integer products through oneDNN or exact fp32, the rest composed of torch operations; codes are int8."""

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

    def linear(self, codes: torch.Tensor, source: OperandParams, layer: PackedLinear) -> torch.Tensor:
        sums = _sums(_planes(codes, source), source, layer)
        if len(sums) == 1:
            return sums[0].mul_(source.scale * layer.scale).add_(layer.bias)
        fine = sums[0].mul_(-sign(source.grid) * source.scale)
        return sums[1].mul_(source.coarse).add_(fine).mul_(layer.scale).add_(layer.bias)

    def float_input_linear(self, x: torch.Tensor, layer: LinearCodes) -> torch.Tensor:
        rows = layer.codes.split(WEIGHT_ROWS)
        out = torch.cat([torch.matmul(x.float(), part.float().t()) for part in rows], dim=-1).mul_(layer.scale)
        return out if layer.bias is None else out.add_(layer.bias)


class NativeCpu(TorchCpu):
    """The same with compiled kernels. Codes are uint8, signed code + 128; those of two regions are two planes."""

    def kernel(self, operation: str) -> str:
        if operation in ("scores", "values"):
            return f"fused attention, {native.instructions()} u8 x s8"
        if operation == "linear" and native.has_vnni():
            return "fused, avx512-vnni u8 x s8"
        return super().kernel(operation)

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return PanelLinear(weight, bias) if panels.supported(weight.codes.shape[1]) else PackedLinear(weight, bias)

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        columns = len(weight.codes)
        scale = weight.scale.expand(columns).contiguous()
        bias = torch.zeros_like(scale) if bias is None else bias.float().contiguous()
        return LinearCodes(weight._replace(codes=weight.codes.contiguous(), scale=scale), bias)

    @torch.compiler.disable
    def norm_quantize(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, target: OperandParams
    ) -> torch.Tensor:
        x = x.float().contiguous()
        out = torch.empty(x.shape, dtype=torch.uint8)
        assert shift.stride(0) == scale.stride(0)
        native.call(
            "norm_quantize", x, _rows(shift, x), _rows(scale, x), shift.stride(0), eps,
            native.operand(target, len(x)), *x.shape, out, torch.get_num_threads(),
        )  # fmt: skip
        return out

    @torch.compiler.disable
    def qkv(self, codes: torch.Tensor, source: OperandParams, layer: Layer, params: AttentionParams) -> torch.Tensor:
        call = _Call(codes, source, layer)
        out = torch.empty(call.shape, dtype=torch.uint8)
        native.call(
            "linear_heads",
            call.struct,
            *(native.operand(target, len(out)) for target in params.projections),
            params.heads,
            out,
        )
        return out

    @torch.compiler.disable
    def attention(
        self, qkv: torch.Tensor, params: AttentionParams, target: OperandParams, trace: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`trace`: int8 (B, H, N, N), filled with the codes of the probabilities; for tests."""
        batch, tokens, columns = qkv.shape
        assert qkv.dtype is torch.uint8
        assert qkv.is_contiguous()
        dim = columns // (3 * params.heads)
        out = torch.empty(batch, tokens, columns // 3, dtype=torch.uint8)
        operands = (*params.projections, params.softmax, target)
        call = native.AttentionCall(
            qkv.data_ptr(), out.data_ptr(), None if trace is None else trace.data_ptr(), batch, tokens, params.heads,
            dim, torch.get_num_threads(), *(native.operand(o, batch) for o in operands), dim**-0.5,
        )  # fmt: skip
        native.call("attention", call)
        return out

    @torch.compiler.disable
    def linear_gelu(
        self, codes: torch.Tensor, source: OperandParams, layer: Layer, target: OperandParams
    ) -> torch.Tensor:
        call = _Call(codes, source, layer)
        two = target.grid.two_region and target.shift is None
        out = torch.empty(2 if two else 1, *call.shape, dtype=torch.uint8)
        native.call("linear_gelu", call.struct, native.operand(target, call.shape[0]), out[0], out[1] if two else None)
        return out if two else out[0]

    @torch.compiler.disable
    def linear_residual(
        self, codes: torch.Tensor, source: OperandParams, layer: Layer, gate: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        stream = x.float().contiguous()
        out = torch.empty_like(stream)
        call = _Call(codes, source, layer)
        assert call.shape == x.shape
        native.call("linear_residual", call.struct, _rows(gate, stream), gate.stride(0), stream, out)
        return out.to(x.dtype)

    @torch.compiler.disable
    def float_input_linear(self, x: torch.Tensor, layer: LinearCodes) -> torch.Tensor:
        rows = x.float().reshape(-1, x.shape[-1]).contiguous()
        columns, depth = layer.codes.shape
        assert rows.shape[1] == depth
        out = torch.empty(len(rows), columns, dtype=torch.float32)
        native.call(
            "weight_only", rows, layer.codes, layer.scale, layer.bias, len(rows), columns, depth, out,
            torch.get_num_threads(),
        )  # fmt: skip
        return out.view(*x.shape[:-1], columns)


class _Call:
    """`LinearCall` of linear.h with the tensors it points into. `shape`: of the result, (B, N, out)."""

    def __init__(self, codes: torch.Tensor, source: OperandParams, layer: Layer) -> None:
        planes = list(codes) if codes.ndim == 4 else [codes]
        batch, tokens, depth = planes[0].shape
        assert depth == layer.shape[1], f"codes of depth {depth} for a layer of depth {layer.shape[1]}"
        assert all(plane.dtype is torch.uint8 for plane in planes)
        self.shape = batch, tokens, layer.shape[0]
        self.struct = native.LinearCall(
            weight=layer.scale.data_ptr(), bias=layer.bias.data_ptr(), batch=batch, tokens=tokens, depth=depth,
            columns=layer.shape[0], threads=torch.get_num_threads(), source=native.operand(source, batch),
        )  # fmt: skip
        if isinstance(layer, PanelLinear):
            self.alive = planes
            self.struct.packed, self.struct.column_sums = layer.packed.data_ptr(), layer.sums.data_ptr()
            pointers = ("first", "second")
        else:
            self.alive = _sums(planes, source, layer)
            pointers = ("first_sums", "second_sums")
        for name, tensor in zip(pointers, self.alive, strict=False):
            assert tensor.is_contiguous()
            setattr(self.struct, name, tensor.data_ptr())


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot run on a device, or None. It runs on every CPU, at worst in torch alone."""
    return None if device.type == "cpu" else "it runs on CPUs only"


def BACKEND() -> TorchCpu:  # noqa: N802  (a class in the other backends)
    """The compiled kernels where they can be built; a warning where they cannot."""
    if reason := native.reason():
        warnings.warn(f"integer models run in torch, several times slower: {reason} (docs/cpu.md)", stacklevel=3)
        return TorchCpu()
    if not native.has_openmp():
        warnings.warn("the CPU kernels were compiled without OpenMP and use one thread", stacklevel=3)
    return NativeCpu()


def _planes(codes: torch.Tensor, source: OperandParams) -> list[torch.Tensor]:
    """uint8 operands of the products that signed codes need: one, or one per region."""
    if not source.grid.two_region:
        return [codes.contiguous().view(torch.uint8) ^ SIGN]
    negative, positive = (part.to(torch.int32) for part in reference.split_regions(codes))
    if source.shift is None:
        return [(-negative).to(torch.uint8), positive.to(torch.uint8)]
    half = 1 << (source.bits - 1)
    return [((positive << source.shift) + sign(source.grid) * negative + half).to(torch.uint8)]


def _sums(planes: list[torch.Tensor], source: OperandParams, layer: PackedLinear) -> list[torch.Tensor]:
    """The integer sums of each plane with the weight, zero points taken out, as fp32 (B, N, out)."""
    if not source.grid.two_region:
        return [_product(planes[0], (source.zero_point.flatten() + SIGN).tolist(), layer)]
    zero = 0 if source.shift is None else 1 << (source.bits - 1)
    return [_product(plane, [zero], layer) for plane in planes]


def _product(codes: torch.Tensor, zeros: list[int], layer: PackedLinear) -> torch.Tensor:
    """One product if the batch shares a zero point, else one per sample."""
    batch, tokens, depth = codes.shape
    if len(zeros) == 1:
        return layer.product(codes.view(-1, depth), zeros[0]).view(batch, tokens, -1)
    return torch.stack([layer.product(x, zero) for x, zero in zip(codes, zeros, strict=True)])


def _rows(rows: torch.Tensor, x: torch.Tensor) -> ctypes.c_void_p:
    """One row per sample of x (B, N, C), its elements adjacent; the rows need not be."""
    assert rows.shape == (x.shape[0], x.shape[2])
    assert rows.dtype is torch.float32
    assert rows.stride(-1) == 1
    return ctypes.c_void_p(rows.data_ptr())
