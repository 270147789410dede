"""The integer-exact torch version of every operation: the oracle of all tests and of every other backend.

Every product is of int8 codes and accumulates to int32 without rounding; scales enter in an fp32 epilogue. The verbs
of `Reference` are composed of the functions below.
"""

import functools

import torch
from torch.library import custom_op

from tqdit.ops.composed import Composed
from tqdit.ops.holders import LinearCodes
from tqdit.ops.schema import Codes, OperandParams, RowCodes, WeightParams
from tqdit.ops.tables import Parameters, parameters
from tqdit.spec import Grid
from tqdit.system.isolation import without_autocast

MAX_PRODUCT = 128 * 128  # largest product of two int8 codes
EXACT_FP32 = 2**24 // MAX_PRODUCT  # number of products whose sum fp32 holds exactly
_ZERO = torch.zeros((), dtype=torch.int32)


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b of int8 codes, int32 and exact: (..., M, K) x (..., K, N).

    torch has an int8 kernel for matrices only. Elsewhere the codes travel in a float type in which every partial sum is
    an integer it represents exactly: fp32 below 2^24; above, fp32 pieces of K for a matrix, fp64 for a batch.
    """
    k = a.shape[-1]
    assert a.dtype == b.dtype == torch.int8
    assert k * MAX_PRODUCT < 2**31, f"K = {k} overflows an int32 accumulator"
    return _operator(a, b) if torch.compiler.is_compiling() else _int_matmul(a, b)


def _int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    k = a.shape[-1]
    if b.ndim == 2 and _has_int8_kernel(a.numel() // k, k, b.shape[1], a.device):
        return torch._int_mm(a.reshape(-1, k), b).reshape(*a.shape[:-1], b.shape[-1])
    with without_autocast(a.device.type):
        if k <= EXACT_FP32:
            return torch.matmul(a.float(), b.float()).to(torch.int32)
        if b.ndim > 2:
            return torch.matmul(a.double(), b.double()).to(torch.int32)
        pieces = zip(a.split(EXACT_FP32, dim=-1), b.split(EXACT_FP32), strict=True)
        return sum((torch.matmul(x.float(), y.float()).to(torch.int32) for x, y in pieces), start=_ZERO.to(a.device))


@custom_op("tqdit::int_matmul", mutates_args=())
def _operator(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute `int_matmul` as an operator of torch's graphs.

    It stays exact there whatever autocast and compilers do around it.
    """
    return _int_matmul(a, b)


@_operator.register_fake
def _(a, b):  # type: ignore[no-untyped-def]
    return torch.matmul(a.float(), b.float()).to(torch.int32)


def column_sums(codes: torch.Tensor) -> torch.Tensor:
    """Return the sums of the codes of each output channel, int32 (out,).

    The zero point of an activation multiplies these sums.
    """
    ones = torch.ones(codes.shape[1], 1, dtype=torch.int8, device=codes.device)
    return int_matmul(codes, ones).squeeze(1)


def _has_int8_kernel(m: int, k: int, n: int, device: torch.device) -> bool:
    """Say whether torch._int_mm computes this product exactly.

    It takes any shape on a CPU whose kernel is exact, and aligned shapes on an NVIDIA GPU.
    """
    if device.type == "cpu":
        return k > 1 and _cpu_kernel_is_exact()  # at K = 1 torch 2.13 returns memory it never wrote
    return device.type == "cuda" and m > 16 and k % 8 == 0 and n % 8 == 0


@functools.cache
def _cpu_kernel_is_exact() -> bool:
    """Probe whether torch._int_mm is exact on this CPU: without VNNI its sums of two products saturate at 16 bits."""
    codes = torch.randint(-128, 128, (64, 256), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[:8], codes[8:16] = 127, -128
    return torch.equal(torch._int_mm(codes, codes.t()).long(), codes.long() @ codes.t().long())


def split_regions(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of region 1 and those of region 2; no place has both."""
    return codes.clamp(max=0), codes.clamp(min=0)


def linear(codes: Codes, params: OperandParams, weight: WeightParams, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias of codes, fp32 (..., out).

    Uniform: s_x s_w (acc - z_x colsum(W)) + bias. Rows: (acc s_row) s_w + bias. MRQ: (s2 (C2 W) +- s1 (C1 W)) s_w +
    bias. MRQ whose regions merge (s2 = s1 2^i): s1 s_w acc + bias with acc = 2^i (C2 W) +- C1 W, still an integer.
    """
    w = weight.codes.t()
    if isinstance(codes, RowCodes):
        out = int_matmul(codes.codes, w).float().mul_(codes.scale[..., None]).mul_(weight.scale)
        return out if bias is None else out.add_(bias)
    p = parameters(params, codes.ndim)
    assert weight.colsum is not None
    if params.grid.two_region:
        negative, positive = (int_matmul(c, w) for c in split_regions(codes))
        out = _two_regions(negative, positive, params, p, weight.scale)
    else:
        acc = int_matmul(codes, w) - p.zero_point * weight.colsum
        out = acc.float().mul_(p.scale * weight.scale)
    return out if bias is None else out.add_(bias)


def _two_regions(
    negative: torch.Tensor, positive: torch.Tensor, params: OperandParams, p: Parameters, other: torch.Tensor
) -> torch.Tensor:
    """Return the value of the two accumulators of an MRQ operand, times the other operand's scale."""
    if params.merged:
        acc = positive * p.factor + params.grid.sign * negative
        return acc.float().mul_(p.scale * other)
    fine = negative.float() * (params.grid.sign * p.scale)
    return (positive.float() * p.coarse).add_(fine).mul_(other)


def scores(
    q: torch.Tensor, q_params: OperandParams, k: torch.Tensor, k_params: OperandParams, factor: float
) -> torch.Tensor:
    """Return factor s_q s_k (q - z_q)(k - z_k)^T; sums of codes correct the zero points in int32."""
    of_q, of_k = parameters(q_params, q.ndim), parameters(k_params, k.ndim)
    z_q, z_k = of_q.zero_point, of_k.zero_point
    acc = int_matmul(q, k.transpose(-1, -2))
    acc -= z_q * _code_sum(k).transpose(-1, -2)
    acc -= z_k * _code_sum(q)
    acc += z_q * z_k * q.shape[-1]
    return acc.float().mul_(of_q.scale * of_k.scale * factor)


def values(p: torch.Tensor, p_params: OperandParams, v: torch.Tensor, v_params: OperandParams) -> torch.Tensor:
    """Return P V, fp32: s_v (+-s1 (C1 V) + s2 (C2 V)) for MRQ probabilities, one product for uniform ones.

    Softmax rows: (C V) (s_v / sum(C)) with codes C counted from 0.
    """
    of_p, of_v = parameters(p_params, p.ndim), parameters(v_params, v.ndim)
    if p_params.grid is Grid.SOFTMAX_ROW:
        total = _code_sum(p) - of_p.zero_point * p.shape[-1]
        return _centred(p, v, of_p, of_v).float().mul_(of_v.scale / total.float())
    if p_params.grid.two_region:
        negative, positive = (_times_value(c, v, of_v) for c in split_regions(p))
        return _two_regions(negative, positive, p_params, of_p, of_v.scale)
    return _centred(p, v, of_p, of_v).float().mul_(of_p.scale * of_v.scale)


def weight_only_linear(x: torch.Tensor, weight: WeightParams, bias: torch.Tensor | None) -> torch.Tensor:
    """Return (x codes^T) s_w + bias, fp32: float activations on integer weights."""
    with without_autocast(x.device.type):
        out = torch.matmul(x.float(), weight.codes.float().t()) * weight.scale
    return out if bias is None else out + bias


def _centred(p: torch.Tensor, v: torch.Tensor, of_p: Parameters, of_v: Parameters) -> torch.Tensor:
    """Return (P - z_p) (V - z_v), int32."""
    centred_sum = _code_sum(v.transpose(-1, -2)).transpose(-1, -2) - of_v.zero_point * v.shape[-2]
    return _times_value(p, v, of_v) - of_p.zero_point * centred_sum


def _times_value(c: torch.Tensor, v: torch.Tensor, of_v: Parameters) -> torch.Tensor:
    """Return C (v - z_v), int32."""
    return int_matmul(c, v) - of_v.zero_point * _code_sum(c)


def _code_sum(codes: torch.Tensor) -> torch.Tensor:
    """Return the sums of rows of codes, int32; the last axis stays with size 1."""
    return codes.sum(-1, keepdim=True, dtype=torch.int32)


class Reference(Composed):
    """The oracle as a backend. It runs on every device that torch has."""

    NAME = "reference"
    INTEGER = True
    scores = staticmethod(scores)
    values = staticmethod(values)

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> LinearCodes:
        return LinearCodes(weight._replace(colsum=column_sums(weight.codes)), bias)

    def kernel(self, operation: str) -> str:
        return "float32 x int8" if operation == "float_input_linear" else "int8"

    def product(self, codes: Codes, source: OperandParams, layer: LinearCodes) -> torch.Tensor:
        return linear(codes, source, layer.weight, layer.bias)

    def float_input_linear(self, x: torch.Tensor, layer: LinearCodes, dtype: torch.dtype | None = None) -> torch.Tensor:
        return weight_only_linear(x, layer.weight, layer.bias).to(dtype or torch.float32)


BACKEND = Reference
