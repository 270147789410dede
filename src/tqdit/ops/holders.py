"""Modules that hold tensors whose dtype and values are part of the number format."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from tqdit.ops.modules import HOOK, Untrainable, Watched, check_same
from tqdit.ops.schema import WeightParams


class FixedDtype(Watched, Untrainable):
    """A module whose tensors change device but neither dtype nor value: an fp16 scale would move every code.

    A state dict that is loaded has to have the same values. The grids and time groups that belong to them are no
    tensors, so other values would be neither the one model nor the other.
    """

    def hold(self, name: str, tensor: torch.Tensor | None) -> None:
        """Make a tensor a parameter without gradient: libraries that offload move parameters, and often nothing else.

        It is put where `register_parameter` would put it. That method itself is changed by accelerate while any thread
        makes an empty model.
        """
        self._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)

    def keep(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Keep a copy of a small tensor as a buffer: a change of it changes nothing else.

        None becomes a plain attribute, since accelerate does not expect an empty buffer.
        """
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor.clone(), persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == HOOK:
            self.changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == HOOK:
            self.changed()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def moved(x: torch.Tensor) -> torch.Tensor:
            new = fn(x)
            return new if new.dtype == x.dtype else x.to(new.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check that a state dict has the values that the module has already; nothing is copied."""
        own = self.state_dict(prefix=prefix, keep_vars=True)
        check_same(own, {name: value for name, value in state_dict.items() if name in own})
        if strict:
            missing_keys.extend(name for name in own if name not in state_dict)
            unexpected_keys.extend(name for name in state_dict if name.startswith(prefix) and name not in own)


def per_output(values: torch.Tensor | None, weight: WeightParams) -> torch.Tensor:
    """Return a copy of a layer's scales or biases as fp32 (out,).

    `values` of shape (1,) is for all outputs; None is 0.
    """
    copy = torch.zeros(len(weight.codes), dtype=torch.float32, device=weight.scale.device)
    return copy if values is None else copy.copy_(values)


class LinearCodes(FixedDtype):
    """The codes of a linear layer, int8 (out, in), with its scale and bias.

    `scale` is fp32 (out,) or (1,). Column sums are there if they were given. All are copies: given codes may be part of
    a mapped file, and the rest is the solution's.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    colsum: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: WeightParams, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bits = weight.bits
        self.hold("codes", weight.codes.clone())
        self.hold("scale", weight.scale.clone())
        self.hold("colsum", None if weight.colsum is None else weight.colsum.clone())
        self.hold("bias", None if bias is None else bias.clone())

    def unpacked(self) -> torch.Tensor:
        """Return the codes, int8 (out, in)."""
        return self.codes

    @property
    def weight(self) -> WeightParams:
        """Return the weight as an operation takes it."""
        return WeightParams(self.codes, self.scale, self.bits, self.colsum)
