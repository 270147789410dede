"""A float model made by its own class out of a config, with initial weights or empty."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tqdit.errors import InputError

QUANTIZATION = "quantization_config"  # a key of a config that the classes of float models do not take


def float_model(kind: type[Any], config: Mapping[str, Any], unknown: Iterable[str] = ()) -> Any:
    """Make the float model of a class by its `from_config`, without the `unknown` keys, which the class does not have.

    Raises `InputError` with diffusers' reason for a config that diffusers refuses.
    """
    skipped = {QUANTIZATION, *unknown}
    try:
        return kind.from_config({key: value for key, value in config.items() if key not in skipped})
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"diffusers refuses it: {str(error).strip().partition(chr(10))[0]}") from None


def empty_of(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what `build` makes with parameters on the meta device; what it computes for itself is real."""
    with _EmptyOnMeta():
        return build()


class _EmptyOnMeta(TorchFunctionMode):
    """Memory for parameters is on the meta device; whatever is computed is real. Other threads notice nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
