"""The parameters of a model whose blocks are alike, without building all of them."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from tqdit.architectures.building import empty_model


def parameter_shapes(one_block: Mapping[str, Any], prefix: str, layers: int) -> dict[str, torch.Size]:
    """Return the shape of every parameter by name, in the model's order.

    `one_block` is the config of the same model with a single block, and of as few tokens as it can have. `prefix` is
    what the names of blocks begin with, such as "transformer_blocks.".
    """
    settings = {key: value for key, value in one_block.items() if key == "_class_name" or not key.startswith("_")}
    small = _shapes(json.dumps(settings, sort_keys=True))
    first = f"{prefix}0."
    inside = {name.removeprefix(first): shape for name, shape in small.items() if name.startswith(first)}
    shapes: dict[str, torch.Size] = {}
    for name, shape in small.items():
        if not name.startswith(first):
            shapes[name] = shape
        elif name not in shapes:
            shapes |= {f"{prefix}{index}.{leaf}": size for index in range(layers) for leaf, size in inside.items()}
    return shapes


@lru_cache(maxsize=16)  # a model takes 20 ms
def _shapes(config: str) -> Mapping[str, torch.Size]:
    """Parameters of an empty model. `config` is JSON."""
    return {name: parameter.shape for name, parameter in empty_model(json.loads(config)).named_parameters()}
