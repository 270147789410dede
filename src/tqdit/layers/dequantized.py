"""Show the weight of a quantized layer to code that reads it, and refuse what would be written to it."""

from typing import Any

import torch

from tqdit.errors import InputError

NO_WRITING = (
    "a quantized layer has integer weights, so what is written to its weight or bias would be lost: keep an adapter"
    " beside the layer (do not fuse or merge it)"
)
IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__")


class Dequantized(torch.Tensor):
    """A dequantized weight or bias: a copy, so that what is written to it would be lost. Writing is an `InputError`.

    What is computed of it is a plain tensor, but for its views.
    """

    @property
    def data(self) -> torch.Tensor:
        """Return the values."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        """Raise `InputError`: the values are a copy."""
        raise InputError(NO_WRITING)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if writes and isinstance(args[0], cls):
            raise InputError(NO_WRITING)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            views = isinstance(result, torch.Tensor) and any(
                isinstance(value, cls) and value.data_ptr() == result.data_ptr() for value in args
            )
            return result.as_subclass(cls) if views else result
