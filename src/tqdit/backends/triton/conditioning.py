"""Launch the layers of an embedder: each is one kernel, with the lookups, the addition and the SiLU around it."""

import contextlib
import functools

import torch
import triton

from tqdit.backends.triton import candidates, naming, tuning
from tqdit.backends.triton.kernels.conditioning import activated_kernel
from tqdit.backends.triton.layouts import NATIVE, Config, Weight
from tqdit.backends.triton.relaunch import PLANS, Plan, aligned, check_device
from tqdit.ops.ends import Lookup


def activated(x: torch.Tensor | Lookup, weight: Weight, added: Lookup | None) -> torch.Tensor:
    """Return SiLU(x W^T + bias + added), fp32 (M, N), as `ops.ends.Ends.activated` does."""
    rows = len(x.rows) if isinstance(x, Lookup) else x.shape[0]
    columns, depth = weight.codes.shape[0], weight.depth
    out = torch.empty((rows, columns), dtype=torch.float32, device=weight.codes.device)

    def run(config: Config) -> None:
        _launch(x, weight, added, out, config)

    key = naming.float_key(rows, columns, depth, weight.bits)
    possible = functools.partial(candidates.float_input, rows, columns)
    with contextlib.suppress(tuning.Deferred):  # the kernel is noted, and `out` has undefined numbers
        run(tuning.choose([key], out.device, possible, run))
    return out


def _launch(x: torch.Tensor | Lookup, weight: Weight, added: Lookup | None, out: torch.Tensor, config: Config) -> None:
    high = weight.codes if weight.high is None else weight.high
    source, index = x if isinstance(x, Lookup) else (x, out)
    table, table_index = (out, out) if added is None else added
    assert source.stride(1) == table.stride(1) == 1
    tensors = source, index, weight.codes, high, weight.scale, weight.bias, table, table_index, out
    check_device(*tensors)
    sizes = *out.shape, weight.depth, len(source), len(table)
    strides = (source.stride(0), index.stride(0), table.stride(0), table_index.stride(0), weight.codes.stride(0),
               high.stride(0))  # fmt: skip
    forms = isinstance(x, Lookup), added is not None, weight.bits
    plan = _plan(out.get_device(), (index.dtype, table_index.dtype), sizes, strides, forms, config)
    launch = plan.launch if aligned(*tensors) else plan.launch_any
    launch(tensors)


@functools.lru_cache(PLANS)
def _plan(
    device: int, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], strides: tuple[int, ...],
    forms: tuple[int, ...], config: Config,
) -> Plan:  # fmt: skip
    """`sizes`: M, N, K and rows of both tables; `forms`: whether there is either table, and bits of the weight."""
    (m, n, *_), (bm, bn, bk) = sizes, config[:3]
    few = bm == 0
    bm = 1 << (m - 1).bit_length() if few else bm
    others = *sizes, *strides, *forms, NATIVE, few, bm < min(bn, 64), bm, bn, bk
    grid = triton.cdiv(n, bn), triton.cdiv(m, bm)
    return Plan(activated_kernel, grid, others, num_warps=config.warps, num_stages=config.stages)
