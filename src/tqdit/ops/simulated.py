"""The simulated (fake-quant) twin of `ops.reference`: codes as in the reference, then float arithmetic on their values.

It exists to check the integer path, as the literature computes it. It is not integer and must never be timed.
Its fp32 sums differ from the exact ones by at most gamma_K = (K + 4) 2^-24 times the sum of absolute products.
"""

import torch
from torch.nn import functional as F

from tqdit.ops.composed import Composed
from tqdit.ops.holders import LinearCodes
from tqdit.ops.quantizer import dequantize
from tqdit.ops.schema import Codes, OperandParams, WeightParams
from tqdit.system.isolation import without_autocast


def _weight(weight: WeightParams) -> torch.Tensor:
    return weight.codes.float() * weight.scale[:, None]


def linear(codes: Codes, params: OperandParams, weight: WeightParams, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias on dequantized operands, fp32."""
    with without_autocast(weight.codes.device.type):
        return F.linear(dequantize(codes, params), _weight(weight), bias)


def scores(
    q: torch.Tensor, q_params: OperandParams, k: torch.Tensor, k_params: OperandParams, factor: float
) -> torch.Tensor:
    """Return factor * Q K^T on dequantized operands, fp32."""
    with without_autocast(q.device.type):
        return torch.matmul(dequantize(q, q_params), dequantize(k, k_params).transpose(-1, -2)) * factor


def values(p: torch.Tensor, p_params: OperandParams, v: torch.Tensor, v_params: OperandParams) -> torch.Tensor:
    """Return P V on dequantized operands, fp32."""
    with without_autocast(p.device.type):
        return torch.matmul(dequantize(p, p_params), dequantize(v, v_params))


def weight_only_linear(x: torch.Tensor, weight: WeightParams, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias with the dequantized weight, fp32."""
    with without_autocast(x.device.type):
        return F.linear(x.float(), _weight(weight), bias)


class Simulated(Composed):
    """The simulated twin as a backend."""

    NAME = "simulated"
    INTEGER = False
    scores = staticmethod(scores)
    values = staticmethod(values)

    def kernel(self, operation: str) -> str:
        return "float32"

    def product(self, codes: Codes, source: OperandParams, layer: LinearCodes) -> torch.Tensor:
        return linear(codes, source, layer.weight, layer.bias)

    def float_input_linear(self, x: torch.Tensor, layer: LinearCodes, dtype: torch.dtype | None = None) -> torch.Tensor:
        return weight_only_linear(x, layer.weight, layer.bias).to(dtype or torch.float32)


BACKEND = Simulated
