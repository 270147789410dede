"""Linear layers of a quantized model: weights are codes, or floats at both ends; inputs are codes or floats."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.layers.params import ActivationParams
from tqdit.ops.ends import EndLayer, Ends
from tqdit.ops.float_linear import float_linear
from tqdit.ops.modules import Ready, Untrainable, offloaded, present, untouched
from tqdit.ops.schema import Backend


class IntLinear(Untrainable):
    """A site's input parameters and the layer, or stacked layers, that read the site, in the backend's layout."""

    def __init__(self, source: ActivationParams, layer: nn.Module) -> None:
        super().__init__()
        self.source = source
        self.layer = layer


class WeightOnlyLinear(Untrainable):
    """A linear layer y = x W^T + b with float x and integer W.

    The layers that see (t, class) alone and the final layer are such layers.
    """

    def __init__(self, layer: nn.Module, backend: Backend) -> None:
        super().__init__()
        self.layer = layer
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if torch.compiler.is_compiling() or not offloaded(layer):
            return self.backend.float_input_linear(x, layer).to(x.dtype)
        with present([layer]):
            return self.backend.float_input_linear(x, layer).to(x.dtype)


class WeightOnlyPatchEmbed(Untrainable):
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


class FloatLinear(nn.Linear):
    """A linear layer y = x W^T + b with float W, whose result for a sample does not depend on the batch on a CPU."""

    backend: Any = None  # of the model, which may have a kernel for the layer and what is around it

    @classmethod
    def like(cls, linear: nn.Linear, backend: Any) -> "FloatLinear":
        """Return an empty module of the sizes of a layer."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.backend = backend
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return float_linear(x, self.weight, self.bias)


class FloatPatchEmbed(nn.Conv2d):
    """The patch embedding's convolution (kernel = stride = patch) with its float weight, as a linear layer on patches.

    (B, C, H, W) -> (B, D, H/p, W/p). As a convolution it would be computed in TF32 on a GPU, by torch's default.
    """

    backend: Any = None  # as of a `FloatLinear`

    @classmethod
    def like(cls, conv: nn.Conv2d, backend: Any) -> "FloatPatchEmbed":
        """Return an empty module of the sizes of a convolution."""
        side: Any = conv.stride
        has_bias = conv.bias is not None
        made = cls(conv.in_channels, conv.out_channels, side, side, bias=has_bias, device="meta")
        made.backend = backend
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = F.pixel_unshuffle(x, self.stride[0]).permute(0, 2, 3, 1)
        return float_linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def at_an_end(module: nn.Module, ready: Ready = untouched) -> tuple[Ends, EndLayer] | None:
    """Return a layer at an end of a model as kernels take it, and the backend whose kernels they are.

    None where a kernel would pass something over: hooks, offloading, an adapter, or a module of another class. `ready`
    says what of this there may be.
    """
    if not ready(module):
        return None
    if type(module) is FloatLinear or type(module) is FloatPatchEmbed:
        found = EndLayer(module.weight.flatten(1), module.bias)
        return (module.backend, found) if isinstance(module.backend, Ends) else None
    if type(module) is WeightOnlyPatchEmbed:
        return at_an_end(module.linear, ready)
    if type(module) is WeightOnlyLinear and ready(module.layer) and isinstance(module.backend, Ends):
        return module.backend, EndLayer(codes=module.layer)
    return None
