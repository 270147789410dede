"""The product of a layer whose weight stays in float, with the same result for a sample in a batch of any size."""

import torch
from torch.library import custom_op
from torch.nn import functional as F

from tqdit.system.isolation import without_autocast


def float_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b; on a CPU sample by sample, because libraries order the sums by the number of rows."""
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    return _operator(x, weight, bias) if torch.compiler.is_compiling() else _sample_by_sample(x, weight, bias)


def _sample_by_sample(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with without_autocast(x.device.type):
        return torch.cat([F.linear(part, weight, bias) for part in x.split(1)])


@custom_op("tqdit::float_linear", mutates_args=())
def _operator(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `float_linear` as an operator of torch's graphs, where the batch may have any size.

    An exported program may run under autocast, which would round the operands.
    """
    return _sample_by_sample(x, weight, bias)


@_operator.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], len(weight))
