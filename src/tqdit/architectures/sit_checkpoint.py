"""The differences of a published SiT from a DiT (Ma et al. 2024): time, velocity and scheduler.

The module and the tensors' names are DiT's. SiT counts time from 0 at the noise to 1 at the data and predicts
v = data - noise. diffusers counts 1000 sigma, with sigma from 1 at the noise to 0 at the data, and its Euler step wants
noise - data: with time = 1 - timestep / 1000 and the opposite sign the two models are the same.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tqdit.architectures import timestep

SCHEDULER: Mapping[str, Any] = {  # the linear path, whose velocity has the same weight everywhere
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
FINAL_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")
TIME: Mapping[str, float] = {timestep.SCALE: -0.001, timestep.OFFSET: 1.0}


def flow_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config in diffusers' conventions of a SiT whose tensors imply `config`: as many outputs as inputs."""
    return {**config, "out_channels": config["in_channels"], **TIME}


def flow_tensor(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A published tensor in diffusers' conventions: rows (p, p, C or 2C) of the final layer become -rows (p, p, C).

    The second half of a patch's channels, where there is one, is never used. A tensor of other rows is left as it is.
    """
    channels, pixels = int(config["in_channels"]), int(config["patch_size"]) ** 2
    outputs = len(tensor) // pixels if tensor.ndim else 0
    if name not in FINAL_LAYER or len(tensor) != outputs * pixels or outputs not in (channels, 2 * channels):
        return tensor
    return -tensor.unflatten(0, (pixels, outputs))[:, :channels].flatten(0, 1)
