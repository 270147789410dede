"""Make models of a shape with random weights that are not degenerate, to measure speed on.

A float model's speed does not depend on values, but zeros would hide it (a zero-initialised DiT computes zeros) and
NaN would slow it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tqdit.architectures.building import empty_model, set_parameter, share_embedder
from tqdit.architectures.interface import Architecture
from tqdit.architectures.registry import architecture

BIAS_STD = 0.1


class Pool:
    """A pool of normal numbers, drawn once and dealt out in shifted windows.

    Drawing 675 M numbers would take longer than the benchmark.
    """

    MARGIN = 1 << 20  # the number of different windows of the largest tensor

    def __init__(self, largest: int, seed: int) -> None:
        """Draw a pool for tensors of up to `largest` elements."""
        self._generator = torch.Generator().manual_seed(seed)
        self.values = torch.randn(largest + self.MARGIN, generator=self._generator)

    def take(self, shape: torch.Size, values: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor of its own, of `shape`: a random window of `values`, N(0, 1) by default.

        `values` is the pool in another form. No fp32 copy is made of a window of integers.
        """
        source = self.values if values is None else values
        count = shape.numel()
        start = int(torch.randint(len(source) - count + 1, (), generator=self._generator))
        return source[start : start + count].clone().reshape(shape)


def random_float(config: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Return a float model of a shape with unit-variance layers, in eval mode on the CPU.

    All blocks share one embedder. Sharing makes it smaller and faster than diffusers' own model, never slower: a
    baseline must not lose by copies.
    """
    model = empty_model(config)
    share_embedder(model)
    kind = architecture(config)
    pool = Pool(max(p.numel() for p in model.parameters()), seed)
    for name, parameter in list(model.named_parameters()):  # a shared parameter is listed once
        value = pool.take(parameter.shape).mul_(standard_deviation(kind, name, parameter.shape)).to(dtype)
        set_parameter(model, name, value)
    nn.Module.to(model, dtype)  # the position table; diffusers' own `to` would warn
    return model.eval()


def standard_deviation(kind: Architecture, name: str, shape: torch.Size) -> float:
    """Return the standard deviation of a random parameter.

    Weights (out, in, ...) keep unit variance; the rows of a table have it.
    """
    if name.endswith(".bias"):
        return BIAS_STD
    return 1.0 if kind.is_table(name) else shape[1:].numel() ** -0.5
