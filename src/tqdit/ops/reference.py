"""Integer-exact torch version of every operation: the oracle of all tests and of every other backend.

Every product is of int8 codes and accumulates to int32 without rounding; scales enter in an fp32 epilogue.
"""

import functools

import torch

from tqdit.grids.regions import sign
from tqdit.ops.quantizer import quantize
from tqdit.ops.schema import OperandParams, WeightParams

__all__ = ["INTEGER", "NAME", "linear", "quantize", "scores", "values", "weight_only_linear"]

NAME = "reference"
INTEGER = True

MAX_PRODUCT = 128 * 128  # of two int8 codes


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of int8 codes, int32 and exact: (..., M, K) x (..., K, N).

    torch has an int8 kernel for matrices only. Elsewhere the codes travel in the narrowest float type in which every
    partial sum is an integer it represents exactly: fp32 below 2^24, fp64 above.
    """
    k = a.shape[-1]
    assert a.dtype == b.dtype == torch.int8
    assert k * MAX_PRODUCT < 2**31, f"K = {k} overflows an int32 accumulator"
    if b.ndim == 2 and _has_int8_kernel(a.numel() // k, k, b.shape[1], a.device):
        return torch._int_mm(a.reshape(-1, k), b).reshape(*a.shape[:-1], b.shape[-1])
    carrier = torch.float32 if k * MAX_PRODUCT <= 2**24 else torch.float64
    return torch.matmul(a.to(carrier), b.to(carrier)).to(torch.int32)


def _has_int8_kernel(m: int, k: int, n: int, device: torch.device) -> bool:
    """Whether torch._int_mm takes this product, exactly: any shape on a CPU that can, aligned ones on an NVIDIA GPU."""
    if device.type == "cpu":
        return _cpu_kernel_is_exact()
    return device.type == "cuda" and m > 16 and k % 8 == 0 and n % 8 == 0


@functools.cache
def _cpu_kernel_is_exact() -> bool:
    """Probe torch._int_mm once: without VNNI its sums of two products saturate at 16 bits."""
    codes = torch.randint(-128, 128, (64, 256), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[:8], codes[8:16] = 127, -128
    return torch.equal(torch._int_mm(codes, codes.t()).long(), codes.long() @ codes.t().long())


def split_regions(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of region 1 and of region 2; disjoint supports."""
    return codes.clamp(max=0), codes.clamp(min=0)


def linear(codes: torch.Tensor, params: OperandParams, weight: WeightParams, bias: torch.Tensor | None) -> torch.Tensor:
    """Uniform: s_x s_w (acc - z_x colsum(W)) + bias. MRQ: (s2 (C2 W) +- s1 (C1 W)) s_w + bias."""
    w = weight.codes.t()
    if params.grid.two_region:
        negative, positive = split_regions(codes)
        fine = int_matmul(negative, w).float() * (sign(params.grid) * params.scale)
        out = (int_matmul(positive, w).float() * params.coarse).add_(fine).mul_(weight.scale)
    else:
        acc = int_matmul(codes, w) - params.zero_point * weight.colsum
        out = acc.float().mul_(params.scale * weight.scale)
    return out if bias is None else out.add_(bias)


def scores(
    q: torch.Tensor, q_params: OperandParams, k: torch.Tensor, k_params: OperandParams, factor: float
) -> torch.Tensor:
    """factor s_q s_k (q - z_q)(k - z_k)^T, the zero points corrected in int32 by sums of codes."""
    z_q, z_k = q_params.zero_point, k_params.zero_point
    acc = int_matmul(q, k.transpose(-1, -2))
    acc -= z_q * _code_sum(k).transpose(-1, -2)
    acc -= z_k * _code_sum(q)
    acc += z_q * z_k * q.shape[-1]
    return acc.float().mul_(q_params.scale * k_params.scale * factor)


def values(p: torch.Tensor, p_params: OperandParams, v: torch.Tensor, v_params: OperandParams) -> torch.Tensor:
    """P V = s_v (+-s1 (C1 V) + s2 (C2 V)) for MRQ probabilities; one product for uniform ones."""
    if p_params.grid.two_region:
        negative, positive = split_regions(p)
        fine = _times_value(negative, v, v_params).float() * (sign(p_params.grid) * p_params.scale)
        out = (_times_value(positive, v, v_params).float() * p_params.coarse).add_(fine)
        return out.mul_(v_params.scale)
    centred_sum = _code_sum(v.transpose(-1, -2)).transpose(-1, -2) - v_params.zero_point * v.shape[-2]
    acc = _times_value(p, v, v_params) - p_params.zero_point * centred_sum
    return acc.float().mul_(p_params.scale * v_params.scale)


def weight_only_linear(x: torch.Tensor, weight: WeightParams, bias: torch.Tensor | None) -> torch.Tensor:
    """(x codes^T) s_w + bias: float activations on integer weights, fp32."""
    out = torch.matmul(x.float(), weight.codes.float().t()) * weight.scale
    return out if bias is None else out + bias


def _times_value(c: torch.Tensor, v: torch.Tensor, v_params: OperandParams) -> torch.Tensor:
    """C (v - z_v) in int32."""
    return int_matmul(c, v) - v_params.zero_point * _code_sum(c)


def _code_sum(codes: torch.Tensor) -> torch.Tensor:
    """Row sums, int32, last axis kept."""
    return codes.sum(-1, keepdim=True, dtype=torch.int32)
