"""Quantized linear layers: fully integer, feed-forward with GELU between two, and weight-only."""

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.layers.params import ActivationParams, FixedDtype, QuantizedWeight
from tqdit.ops.schema import Backend


class IntLinear(FixedDtype):
    """y = x W^T + b on the codes of x and W; x is (B, N, in), y has x's dtype."""

    bias: torch.Tensor | None

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None, source: ActivationParams, backend: Backend
    ) -> None:
        super().__init__()
        self.weight = weight
        self.source = source
        self.backend = backend
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        params = self.source.select()
        codes = self.backend.quantize(x, params)
        return self.backend.linear(codes, params, self.weight.operand(), self.bias).to(x.dtype)


class IntFeedForward(nn.Module):
    """The pointwise feed-forward of a DiT block: linear, tanh-GELU, linear. (B, N, C) -> (B, N, C)."""

    def __init__(self, fc1: IntLinear, fc2: IntLinear) -> None:
        super().__init__()
        self.fc1 = fc1
        self.fc2 = fc2

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


class WeightOnlyLinear(FixedDtype):
    """y = x W^T + b with float x and integer W, for the layers that see (t, class) alone and the final layer."""

    bias: torch.Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, backend: Backend) -> None:
        super().__init__()
        self.weight = weight
        self.backend = backend
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.weight_only_linear(x, self.weight.operand(), self.bias).to(x.dtype)


class WeightOnlyPatchEmbed(nn.Module):
    """The patch embedding's convolution (kernel = stride = patch) as a linear layer on patches.

    (B, C, H, W) -> (B, D, H/p, W/p), as the `nn.Conv2d` it replaces.
    """

    def __init__(self, linear: WeightOnlyLinear, patch_size: int) -> None:
        super().__init__()
        self.linear = linear
        self.patch_size = patch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = F.pixel_unshuffle(x, self.patch_size)  # (B, C p p, H/p, W/p), rows ordered as conv weights
        return self.linear(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
