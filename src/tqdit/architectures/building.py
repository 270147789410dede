"""A float model of a config: with diffusers' initial weights, or empty, to be filled by whoever has its weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tqdit.architectures.from_config import empty_of
from tqdit.architectures.registry import architecture, config_of


def new_model(config: Mapping[str, Any]) -> nn.Module:
    """Make the float model of a config, whose weights are diffusers' initial ones.

    Raises `InputError` for a config that is not supported or that diffusers refuses.
    """
    found = architecture(config)
    found.check(config)
    return found.build(config)


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """Make `new_model` with parameters on the meta device; what it computes for itself, such as tables, is real."""
    return empty_of(lambda: new_model(config))


def share_embedder(model: nn.Module) -> None:
    """Let all blocks use one instance of what diffusers copies into every block, such as an embedder."""
    architecture(config_of(model)).share(model)


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter at a dotted path, without gradient and without a copy."""
    owner, _, leaf = name.rpartition(".")
    # accelerate changes `register_parameter` while another thread loads a model.
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
