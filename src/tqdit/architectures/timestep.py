"""What a model embeds in place of its `timestep` argument t: offset + scale * t.

diffusers' models embed t itself and have no config keys for anything else, so the two keys here are this package's. A
checkpoint of SiT (Ma et al. 2024) counts time from 0 at the noise to 1 at the data; converted, its model has the scale
-1/1000 and the offset 1, and an argument in diffusers' units, 0 to 1000.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from tqdit.errors import InputError

SCALE = "timestep_scale"
OFFSET = "timestep_offset"
DEFAULTS: Mapping[str, float] = {SCALE: 1.0, OFFSET: 0.0}  # what diffusers embeds
LARGEST = 1e6  # of a scale or an offset; fp32 keeps fractions of such a time apart


class ScaledTimesteps(nn.Module):
    """Embed offset + scale * timestep by a projection: (B,) of any number type -> (B, 256) fp32."""

    def __init__(self, projection: nn.Module, scale: float, offset: float) -> None:
        """`projection`: diffusers' `Timesteps`, which has no parameters."""
        super().__init__()
        self.projection, self.scale, self.offset = projection, scale, offset

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.projection(timestep.float() * self.scale + self.offset))


def changed(config: Mapping[str, Any]) -> dict[str, float]:
    """The keys of this module that a config has with another value than diffusers' own, with their values."""
    return {key: config[key] for key, default in DEFAULTS.items() if config.get(key, default) != default}


def check_timestep(config: Mapping[str, Any]) -> None:
    """Raise `InputError` for a scale or an offset that is no finite number in range, or for a scale of 0."""
    for key in (key for key in DEFAULTS if key in config):
        value = config[key]
        number = type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST
        if not number or (key == SCALE and value == 0):
            legal = f"a number from -{LARGEST:.0f} to {LARGEST:.0f}{', but not 0' if key == SCALE else ''}"
            raise InputError(f"model config has {key} = {repr(value)[:40]}; it must be {legal}")


def apply_timestep(blocks: Any, config: Mapping[str, Any]) -> None:
    """Let every block's embedder heed a config's scale and offset; it stays diffusers' own where these are the
    defaults.
    """
    if not changed(config):
        return
    scale, offset = (float(config.get(key, default)) for key, default in DEFAULTS.items())
    for block in blocks:
        block.norm1.emb.time_proj = ScaledTimesteps(block.norm1.emb.time_proj, scale, offset)
