"""Shapes of models by name, as diffusers configs: what a model computes, without its weights."""

from collections.abc import Mapping
from typing import Any

from tqdit.architectures.registry import architecture, supported
from tqdit.errors import InputError


def shape_names() -> tuple[str, ...]:
    """The published names of every architecture."""
    return tuple(name for kind in supported() for name in architecture(kind).shape_names())


def shape_config(name: str) -> dict[str, Any]:
    """Return the config of a name such as "DiT-XL/2" or "DiT-XL/2@512".

    Raises `InputError` naming the unknown part and what is known.
    """
    for kind in supported():
        found = architecture(kind)
        if name.partition("@")[0] in found.shape_names():
            return found.shape_config(name)
    raise InputError(f"unknown shape '{name}'; known: {', '.join(shape_names())}, some also with a side such as @512")


def shape_name(config: Mapping[str, Any]) -> str:
    """Return the published name of a config's shape, or its sizes: "DiT-6x192/2@32"."""
    return architecture(config).shape_name(config)


def shape_key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what is equal for two configs exactly when their models cost the same."""
    return architecture(config).shape_key(config)


def tokens(config: Mapping[str, Any]) -> int:
    """Tokens N that a block has per sample."""
    return architecture(config).tokens(config)


def width(config: Mapping[str, Any]) -> int:
    """Channels of the residual stream."""
    return architecture(config).width(config)
