"""The GPU backend: its verbs are Triton kernels, with int8 codes between them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tqdit.backends.triton import operators
from tqdit.backends.triton.layer import TritonLinear
from tqdit.backends.triton.layouts import Projected
from tqdit.ops.composed import FUNCTIONS
from tqdit.ops.schema import Activation, AttentionParams, Norm, OperandParams, Residual, WeightParams

STORED = 4, 6, 8  # bits of packed weights


class TritonBackend:
    """The backend whose weights are int8 on the device, whatever their bits: the fastest one.

    Rows of codes are padded to 16 bytes, what is beyond a layer's depth is never read. Codes of two regions are one
    int8 tensor, those of merged regions their integer. Projected codes are a `Projected`.
    """

    NAME = "triton"
    INTEGER = True
    GRAPHS = True
    PACKED = False

    def kernel(self, operation: str) -> str:
        if operation in ("scores", "values"):
            return "fused attention, int8"
        return "bf16 x 3 x int8" if operation == "float_input_linear" else "fused, int8"

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        stored = next(bits for bits in STORED if bits >= weight.bits) if self.PACKED else 8
        return TritonLinear(weight, bias, stored)

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return self.prepare(weight, bias)

    def quantize(self, x: torch.Tensor, target: OperandParams, norm: Norm | None = None) -> torch.Tensor:
        operands = operators.flatten(target)
        if norm is None:
            return operators.quantize(x.contiguous(), *operands)
        assert norm.shift.stride(0) == norm.scale.stride(0)
        return operators.norm_quantize(x.contiguous(), norm.shift, norm.scale, norm.eps, *operands)

    def project(
        self,
        codes: torch.Tensor,
        source: OperandParams,
        layer: TritonLinear,
        targets: Sequence[OperandParams],
        heads: int,
    ) -> Projected:
        batch, tokens, _ = codes.shape
        operands = operators.flatten(source, *(_per_head(target, heads) for target in targets))
        out = operators.project(codes, *_weight(layer), *operands, heads)
        return Projected(out, batch, tokens, layer.shape[0] // len(targets) // heads)

    def attend(
        self,
        projected: Projected,
        attention: AttentionParams,
        target: OperandParams,
        context: Projected | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        projections = (_per_head(params, attention.heads) for params in attention.projections)
        operands = operators.flatten(*projections, attention.softmax, target)
        keys = (context or projected).tokens
        sizes = [projected.batch, projected.tokens, keys, attention.heads, projected.head_dim]
        added = None if bias is None else bias.float().contiguous()
        return operators.attend(projected.codes, context.codes if context else None, added, sizes, *operands)

    def linear(
        self,
        codes: torch.Tensor,
        source: OperandParams,
        layer: TritonLinear,
        then: Activation | Residual | None = None,
    ) -> torch.Tensor:
        weight = _weight(layer)
        if then is None:
            return operators.linear(codes, *weight, *operators.flatten(source))
        if isinstance(then, Residual):
            return operators.linear_residual(codes, *weight, *operators.flatten(source), then.x.contiguous(), then.gate)
        if then.function != "gelu_tanh":  # no kernel has this function
            return self.quantize(FUNCTIONS[then.function](self.linear(codes, source, layer)), then.target)
        return operators.linear_activation(codes, *weight, *operators.flatten(source, then.target))

    def float_input_linear(self, x: torch.Tensor, layer: TritonLinear) -> torch.Tensor:
        rows = x.float().reshape(-1, x.shape[-1]).contiguous()
        return operators.float_input_linear(rows, *_weight(layer)).view(*x.shape[:-1], layer.shape[0])


class PackedTritonBackend(TritonBackend):
    """The backend that packs weights of at most 4 or 6 bits on the device.

    It takes less memory, and is slower where arithmetic is the bound.
    """

    NAME = "triton-packed"
    PACKED = True


def _per_head(params: OperandParams, heads: int) -> OperandParams:
    """Return an operand whose table has a unit per head, which kernels look up."""
    if params.table.shape[1] == heads:
        return params
    return params._replace(table=params.table.expand(-1, heads, -1).contiguous())


def _weight(layer: TritonLinear) -> tuple[list[torch.Tensor], list[int]]:
    tensors: list[Any] = [layer.codes, layer.scale, layer.bias, layer.sums]
    return tensors + ([] if layer.high is None else [layer.high]), [layer.shape[1], layer.bits]
