"""Models of a few layers, each of which does one thing that a trace has to notice."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, TOKENS, BATCH = 8, 5, 2


class Toy(nn.Module):
    """One block with layers `a` and `b`, called by `forward_of(block, x, t, prompt)`, and a layer that embeds t."""

    def __init__(self, forward_of: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        block = nn.Module()
        for name, layer in {"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH), **layers}.items():
            block.add_module(name, layer)
        self.blocks = nn.ModuleList([block])
        self.time = nn.Linear(1, WIDTH)
        self._forward = forward_of

    def forward(self, x: Any, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        t = self.time(timestep.reshape(-1, 1).to(self.time.weight.dtype))
        return self._forward(self.blocks[0], x, t[:, None], prompt)


def call(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, prompt = torch.randn(2, BATCH, TOKENS, WIDTH, generator=generator).to(dtype)
    return {"x": x, "timestep": torch.full((BATCH,), 0.5), "prompt": prompt}


def plain(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Read the sample with both layers."""
    return block.a(x) + block.b(x)


def fails(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Fail after the first layer."""
    block.a(x)
    raise RuntimeError("out of cheese")


def borrows(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Read the weight of `b` without calling it."""
    return block.a(x) + F.linear(x, block.b.weight)


def borrows_and_calls(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Call `b`, and read its weight transposed as well."""
    return block.a(x) + block.b(x) @ block.b.weight.t()


def looks(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Read dtype, device and shape of a weight, which every model does."""
    x = x.to(block.b.weight.dtype).to(block.b.weight.device).type_as(block.b.weight)
    return block.a(x) + block.b(x)[..., : block.b.weight.shape[0]]
