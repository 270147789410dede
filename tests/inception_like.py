"""A small TorchScript network with the interface of `inception-2015-12-05.pt`, written from its description."""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES, TOWER = 24, 10, 9


class Mixed(nn.Module):
    """A layer of two branches, the first of which is `conv`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(6, TOWER, 1), nn.ReLU())
        self.tower = nn.Sequential(nn.Conv2d(6, FEATURES - TOWER, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x)], 1)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3])


class Inception(nn.Module):
    """The whole network. `corner`: resize as other libraries do; `name`: of the layer with the spatial features."""

    def __init__(self, corner: bool = False, name: str = "mixed_6") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.corner = corner
        first = nn.Sequential(nn.Conv2d(3, 6, 63, stride=59), nn.ReLU())
        self.layers = nn.Sequential(OrderedDict([("conv", first), (name, Mixed()), ("pool2", Pool())]))
        self.output = nn.Linear(FEATURES, CLASSES)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        batch, channels, height, width = img.shape
        theta = torch.eye(2, 3, device=img.device)
        if not self.corner:  # without the half pixel of other libraries
            theta[0, 2] += 1 / width - 1 / 299
            theta[1, 2] += 1 / height - 1 / 299
        grid = F.affine_grid(theta[None].repeat(batch, 1, 1), [batch, channels, 299, 299], align_corners=False)
        x = F.grid_sample(img.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(1)


def save(path: Path, corner: bool = False, name: str = "mixed_6") -> Inception:
    """Write the network and return it, before it was compiled."""
    network = Inception(corner, name).eval()
    torch.jit.script(network).save(str(path))
    return network
