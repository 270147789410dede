"""The GPU backend: seven Triton kernels a block, codes in int8 between them."""

from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.backends.triton import operators
from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.layer import TritonLinear
from tqdit.backends.triton.layouts import Operand
from tqdit.ops.schema import AttentionParams, OperandParams, WeightParams
from tqdit.ops.tables import parameter_table
from tqdit.spec import Grid

MODES = {
    (Grid.UNIFORM, False): rounding.UNIFORM,
    (Grid.MRQ_GELU, False): rounding.GELU,
    (Grid.MRQ_GELU, True): rounding.GELU_MERGED,
    (Grid.MRQ_SOFTMAX, False): rounding.SOFTMAX,
    (Grid.MRQ_SOFTMAX, True): rounding.SOFTMAX_MERGED,
}


class Heads(NamedTuple):
    """Codes of q, k and v as one flat buffer (see `launch.heads`), and its shape."""

    codes: torch.Tensor
    batch: int
    tokens: int
    head_dim: int


class TritonBackend:
    """Weights are int8 on the device, whatever their bits: fastest.

    Rows of codes are padded to 16 bytes, what is beyond a layer's depth is never read. Codes of two regions are one
    int8 tensor, those of merged regions their integer.
    """

    NAME = "triton"
    INTEGER = True
    TABLES = True
    GRAPHS = True
    PACKED = False

    def kernel(self, operation: str) -> str:
        if operation in ("scores", "values"):
            return "fused attention, int8"
        return "bf16 x 3 x int8" if operation == "float_input_linear" else "fused, int8"

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return TritonLinear(weight, bias, _stored_bits(weight.codes) if self.PACKED else 8)

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return self.prepare(weight, bias)

    def norm_quantize(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, target: OperandParams
    ) -> torch.Tensor:
        assert shift.stride(0) == scale.stride(0)
        return operators.norm_quantize(x.contiguous(), shift, scale, eps, *_flat(target))

    def qkv(self, codes: torch.Tensor, source: OperandParams, layer: TritonLinear, params: AttentionParams) -> Heads:
        batch, tokens, _ = codes.shape
        head_dim = layer.shape[0] // 3 // params.heads
        operands = _flat(source, *params.projections)
        out = operators.linear_heads(codes, *_weight(layer), *operands, head_dim)
        return Heads(out, batch, tokens, head_dim)

    def attention(self, qkv: Heads, params: AttentionParams, target: OperandParams) -> torch.Tensor:
        operands = _flat(*params.projections, params.softmax, target)
        return operators.attention(qkv.codes, qkv.batch, qkv.tokens, params.heads, qkv.head_dim, *operands)

    def linear_gelu(
        self, codes: torch.Tensor, source: OperandParams, layer: TritonLinear, target: OperandParams
    ) -> torch.Tensor:
        return operators.linear_gelu(codes, *_weight(layer), *_flat(source, target))

    def linear_residual(
        self, codes: torch.Tensor, source: OperandParams, layer: TritonLinear, gate: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return operators.linear_residual(codes, *_weight(layer), *_flat(source), gate, x.contiguous())

    def float_input_linear(self, x: torch.Tensor, layer: TritonLinear) -> torch.Tensor:
        rows = x.float().reshape(-1, x.shape[-1]).contiguous()
        return operators.float_input_linear(rows, *_weight(layer)).view(*x.shape[:-1], layer.shape[0])


class PackedTritonBackend(TritonBackend):
    """The same with weights of at most 4 or 6 bits packed on the device: smaller, slower where arithmetic bounds."""

    NAME = "triton-packed"
    PACKED = True


def operand(params: OperandParams) -> Operand:
    """An activation site as kernels take it; selected parameters are made a table of samples."""
    mode = MODES[params.grid, params.shift is not None].value
    if params.table is not None:
        return Operand(params.table, params.group, mode, params.bits)
    table = parameter_table(params)
    group = torch.arange(len(table), device=table.device) if len(table) > 1 else None
    return Operand(table, group, mode, params.bits)


def _flat(*params: OperandParams) -> operators.Flat:
    return operators.flatten(*map(operand, params))


def _weight(layer: TritonLinear) -> tuple[list[torch.Tensor], list[int]]:
    tensors: list[Any] = [layer.codes, layer.scale, layer.bias, layer.sums]
    return tensors + ([] if layer.high is None else [layer.high]), [layer.shape[1], layer.bits]


def _stored_bits(codes: torch.Tensor) -> int:
    low, high = (int(value) for value in codes.aminmax())
    return next(bits for bits in (4, 6, 8) if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1))
