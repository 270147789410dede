"""The float model itself in a smaller float type, and torchao's int8: what runs without this project."""

import copy
import importlib.util
from importlib.metadata import version

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.speed.baselines import Baseline, quiet

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def in_dtype(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of a float model that computes in "bf16" or "fp16" and takes and gives fp32."""
    twin = nn.Module.to(copy.deepcopy(model), DTYPES[name])
    return Baseline(twin, twin)


def torchao_missing() -> str | None:
    """Return why torchao's row cannot be measured here, or None."""
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def torchao_int8(model: nn.Module) -> nn.Module:
    """Return a copy of a float model whose linear layers are torchao's dynamic int8, really in integers.

    Activations have a symmetric scale per token, weights one for each output channel. The layers are those that the
    simulated methods quantize; attention stays in float, as torchao has no integer attention.
    """
    with quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    twin = copy.deepcopy(model)
    blocks = registry.graph(registry.config_of(model)).blocks
    wanted = {name for block in blocks for linear in block.linears for name in linear.modules}
    quantize_(twin, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), lambda _, path: path in wanted)
    return twin


def torchao_version() -> str:
    """Return the version of torchao."""
    return version("torchao")
