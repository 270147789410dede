"""Reach what scores need inside `inception-2015-12-05.pt`, NVIDIA's TorchScript conversion of the Inception network.

The file's module takes images [N, 3, H, W] with values from 0 to 255, and resizes them itself. Its `forward` returns
the pooled features [N, 2048] with `return_features=True`, and class probabilities, in which `no_output_bias=True`
leaves out the last layer's bias as the original Inception score does. `layers` are its layers in their order, and
`output` is the last one. A compiled module calls no hooks, so the spatial features are computed by its own layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 299  # pixels of an image inside the network
SPATIAL_CHANNELS = 7  # of the spatial features: 7 * 17 * 17 = 2,023 numbers, about as many as the pooled ones
MIXED, CONVOLUTION = "mixed_6", "conv"  # the layer of the spatial features, as in TensorFlow's "mixed_6/conv:0"
TOLERANCE = 1e-3  # of a probe, relative to the largest feature: rounding differs from one form of a layer to another


def has_interface(network: Any) -> bool:
    """Say whether a TorchScript module's `forward` has the arguments of the Inception file."""
    schema = getattr(getattr(network, "forward", None), "schema", None)
    names = {argument.name for argument in schema.arguments} if schema else set()
    return {"return_features", "no_output_bias"} <= names


def resized(images: Tensor) -> Tensor:
    """Return images [N, C, H, W] in 0 to 255 as the network resizes them: [N, C, 299, 299] in [-1, 1).

    The resizing is TensorFlow's old bilinear one: output pixel i reads the input at i * H / 299, without the half pixel
    that other libraries add, and without a filter. A library's own resizing gives another FID.
    """
    height, width = images.shape[2:]
    # A pixel with the index s has the coordinate (2 s + 1) / size - 1 in grid_sample's units.
    rows, columns = (
        (2 * torch.arange(SIDE, device=images.device) * (size / SIDE) + 1) / size - 1 for size in (height, width)
    )
    grid = torch.stack([columns.expand(SIDE, SIDE), rows[:, None].expand(SIDE, SIDE)], -1)
    grid = grid.expand(len(images), -1, -1, -1)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (sampled - 128) / 128


def spatial_features(network: Any, images: Tensor) -> Tensor:
    """Return the first seven channels of `mixed_6/conv`, flattened as TensorFlow does: [N, H * W * 7], channels last.

    The order matters beside statistics of others (`mu_s`, `sigma_s`): torch's own order would compare each number with
    another one. Raises `LookupError` for a network without such a layer.
    """
    x = resized(images)
    for name, layer in network.layers.named_children():
        if name == MIXED:
            maps = getattr(layer, CONVOLUTION)(x)[:, :SPATIAL_CHANNELS]
            return maps.permute(0, 2, 3, 1).flatten(1)
        x = layer(x)
    raise LookupError(MIXED)


def probabilities(network: Any, pooled: Tensor) -> Tensor:
    """Return class probabilities [N, classes] of pooled features, without the bias of the last layer."""
    weight = network.output.weight
    return (pooled.to(weight.dtype) @ weight.T).float().softmax(1)


def problem_of_spatial_features(network: Any, probe: Tensor) -> str | None:
    """Say why the spatial features of a network cannot be had, or None if they can.

    All of its layers, one after another on images resized here, must give the network's own pooled features: then the
    layers before `mixed_6/conv` are those of the network, and the resizing is its own.
    """
    try:
        x = resized(probe)
        for _, layer in network.layers.named_children():
            x = layer(x)
        spatial_features(network, probe)
        same = _close(x.flatten(1), network(probe, return_features=True).flatten(1))
    except (AttributeError, LookupError, RuntimeError):
        return f"the network has no layers.{MIXED}.{CONVOLUTION} that can be called"
    return None if same else "its layers, called one after another, do not give its features"


def problem_of_probabilities(network: Any, probe: Tensor) -> str | None:
    """Say why class probabilities cannot be had from pooled features, or None if they can."""
    try:
        pooled = network(probe, return_features=True).flatten(1)
        same = _close(probabilities(network, pooled), network(probe, no_output_bias=True))
    except (AttributeError, RuntimeError):
        return "the network has no output.weight over its features"
    return None if same else "its output.weight does not give its probabilities"


def _close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= TOLERANCE * y.abs().max())
