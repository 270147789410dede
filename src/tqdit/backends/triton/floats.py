"""The verbs of layers inside a float model: floats become codes, and codes floats, in as few steps as there can be.

Plain calls come here without torch's dispatcher, and a kernel of a known shape is launched without Triton's: in a model
of many small layers the host is what takes time. Configurations follow from sizes by a rule where the kernel for Hopper
runs; elsewhere, from the nearest size that was timed.
"""

import functools
import operator

import torch
from torch.nn import functional as F

from tqdit.backends.triton import candidates, float_launch, hopper, launch, naming, tuning
from tqdit.backends.triton.kernels.quantize import quantize_rows_kernel
from tqdit.backends.triton.layouts import Config, Weight, groups_of, pitch, powers_of_two, row_stride, with_steps
from tqdit.backends.triton.relaunch import check_device
from tqdit.ops import quantizer
from tqdit.ops.schema import Codes, OperandParams, RowCodes
from tqdit.spec import Grid

INT8 = 8  # bits of a weight that is not packed
MANY_ROWS, DEEP = 32, 128  # float rows and depth from which torch's product is faster, the weight's rounding included
STATIC = Config(4, 256, 0, warps=4)  # of `quantize_kernel`


def quantize(x: torch.Tensor, target: OperandParams) -> Codes:
    """Return the codes of x (B, N, C), the reference's, as `launch.quantize` does."""
    if not launch.NATIVE:
        return launch.quantize(x, target, tuning.INTERPRETED["quantize"])
    config = candidates.quantize_rows(x.shape[2]) if target.grid is Grid.ROW else STATIC
    return launch.quantize(x, target, config)


def quantize_in_torch(x: torch.Tensor, target: OperandParams) -> torch.Tensor:
    """Return codes as `quantize` does, in operations of torch that a compiler fuses with those that made x.

    The target is on a uniform grid. A compiler may keep x in fp32 where a plain call rounds it, or divide within 2
    ulp: a code then differs by as many steps as that value does, and by one where it is near a rounding boundary.
    """
    codes, _ = with_steps(quantizer.quantize(x, target))
    return F.pad(codes, (0, pitch(x.shape[2]) - x.shape[2]))


def quantize_rows_in_graph(x: torch.Tensor, target: OperandParams) -> RowCodes:
    """Return codes on the grid of rows as `quantize` does, inside a graph of torch.compile.

    The compiler knows the kernel, and the code that it makes launches the kernel without an operator's Python.
    """
    batch, tokens, width = x.shape
    x, x_stride = launch.rows_apart(x)
    out = torch.empty((batch, tokens, pitch(width)), dtype=torch.int8, device=x.device)
    steps = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    groups = groups_of(target)
    rows, (block, first, rest, warps) = batch * tokens, _row_blocks(operator.index(width))  # a number, not a symbol
    quantize_rows_kernel[(-(-rows // block), 1)](
        x, target.table, groups.tensor, out, steps, target.channels, rows, tokens, x_stride, pitch(width), width,
        groups.stride, row_stride(target), target.bits, launch.NATIVE, block, first, rest, num_warps=warps,
    )  # fmt: skip
    return RowCodes(out, steps)


@torch.compiler.assume_constant_result  # the functions that it calls cannot be traced
def _row_blocks(width: int) -> tuple[int, int, int, int]:
    """Return the rows of a program, the two powers of two that hold a row, and warps."""
    config = candidates.quantize_rows(width)
    return config.block_m, *powers_of_two(width, 16), config.warps


def linear(given: Codes, source: OperandParams, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return x W^T + bias of `dtype` as `launch.plain` does."""
    codes, steps = with_steps(given)
    device, rows, columns = codes.device, codes.shape[0] * codes.shape[1], weight.codes.shape[0]
    two = source.two_products
    if hopper.takes_floats(device, columns, weight.bits, two, dtype):
        config = candidates.hopper_float(rows, columns, hopper.processors(device), steps is not None)
        return launch.plain(given, source, weight, config, dtype)

    def run(config: Config) -> torch.Tensor:
        return launch.plain(given, source, weight, config, dtype)

    sizes = rows, columns, weight.depth, weight.bits, two, 0
    own, like = (naming.linear_key(name, *sizes, steps is not None) for name in ("float", "residual bfloat16"))
    possible = functools.partial(candidates.linear, rows, two, weight.bits)
    return run(tuning.choose_near((own, like), device, possible, run))


def float_input(x: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return x W^T + bias, (M, N) of `dtype`, for x (M, K).

    Many rows of fp16 or bf16 are multiplied by torch, with a weight that is rounded to their dtype for the call.
    """
    rows, columns, depth = x.shape[0], weight.codes.shape[0], weight.depth
    check_device(x, weight.codes)
    if x.dtype is dtype is not torch.float32 and rows > MANY_ROWS and depth >= DEEP:
        return F.linear(x, *float_launch.dequantize(weight, dtype))

    def run(config: Config) -> torch.Tensor:
        return float_launch.float_input(x, weight, config, dtype)

    if launch.NATIVE and x.dtype is not torch.float32 and weight.bits == INT8:
        return run(candidates.float_rows(rows, columns, depth))
    key = naming.float_key(rows, columns, depth, weight.bits)
    return run(tuning.choose_near((key,), x.device, functools.partial(candidates.float_input, rows, columns), run))
