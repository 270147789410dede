"""Launch the kernels of layers that take floats: their product, and a weight as floats for torch's product."""

import functools

import torch
import triton

from tqdit.backends.triton.kernels.float_input import dequantize_kernel, few_rows_kernel, float_input_kernel
from tqdit.backends.triton.layouts import NATIVE, Config, Weight
from tqdit.backends.triton.relaunch import PLANS, Plan, aligned, check_device

FEW_ROWS = 2  # rows of a float input: only so few are worth multiplying without tensor cores


def float_input(x: torch.Tensor, weight: Weight, config: Config, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return x W^T + bias, (M, N) of `dtype`, of x (M, K) in fp32, fp16 or bf16.

    `block_m` of 0: without tensor cores, for up to FEW_ROWS rows.
    """
    (m, x_stride), n = (x.shape[0], x.stride(0)), weight.codes.shape[0]
    assert x.stride(1) == 1
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    high = weight.codes if weight.high is None else weight.high
    tensors = x, weight.codes, high, weight.scale, weight.bias, out
    check_device(*tensors)
    plan = _float_plan(
        x.get_device(), x.dtype, dtype, m, n, weight.depth, x_stride, weight.codes.stride(0), high.stride(0),
        weight.bits, config,
    )  # fmt: skip
    launch = plan.launch if aligned(*tensors) else plan.launch_any
    launch(tensors)
    return out


@functools.lru_cache(PLANS)
def _float_plan(
    device: int, given: torch.dtype, made: torch.dtype, m: int, n: int, depth: int, x_stride: int, codes_stride: int,
    high_stride: int, bits: int, config: Config,
) -> Plan:  # fmt: skip
    bm, bn, bk = config[:3]
    sizes = m, n, depth, x_stride, codes_stride, high_stride, bits, NATIVE
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if bm == 0:
        rows = 1 << (m - 1).bit_length()
        return Plan(few_rows_kernel, (triton.cdiv(n, bn), 1), (*sizes, rows, bn, bk), **options)
    others = *sizes, bm < min(bn, 64), bm, bn, bk
    return Plan(float_input_kernel, (triton.cdiv(n, bn), triton.cdiv(m, bm)), others, **options)


def dequantize(weight: Weight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (N, K) and its bias (N,) as floats of a dtype, each rounded once."""
    n, k, high = weight.codes.shape[0], weight.depth, weight.codes if weight.high is None else weight.high
    out = torch.empty((n, k), dtype=dtype, device=weight.codes.device)
    bias = torch.empty((n,), dtype=dtype, device=weight.codes.device)
    tensors = weight.codes, high, weight.scale, weight.bias, out, bias
    plan = _dequantize_plan(out.get_device(), dtype, n, k, weight.codes.stride(0), high.stride(0), weight.bits)
    launch = plan.launch if aligned(*tensors) else plan.launch_any
    launch(tensors)
    return out, bias


@functools.lru_cache(PLANS)
def _dequantize_plan(
    device: int, dtype: torch.dtype, n: int, k: int, codes_stride: int, high_stride: int, bits: int
) -> Plan:
    bn, bk = (8, 512) if NATIVE else (32, 256)
    others = n, k, codes_stride, high_stride, bits, NATIVE, bn, bk
    return Plan(dequantize_kernel, (triton.cdiv(n, bn), triton.cdiv(k, bk)), others, num_warps=4)
