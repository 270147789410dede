"""`QuantizedLinear`: a linear layer of diffusers' own code whose weight is codes.

It is called as the `nn.Linear` that it replaces. Layers that read one activation share a `Source`, so that the
activation is quantized once.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.layers.dequantized import NO_WRITING, Dequantized
from tqdit.layers.shared_input import Source
from tqdit.ops.dispatch import get_backend
from tqdit.ops.modules import offloaded, present
from tqdit.ops.rotation import rotate
from tqdit.ops.schema import Backend, Float, WeightParams

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PRESENT: AbstractContextManager[None] = nullcontext()  # of a layer that is not offloaded


class QuantizedLinear(nn.Linear):
    """A linear layer y = x W^T + b with integer W, in the place of a float one.

    `source`: how x is quantized; None: x stays in float (weight-only). `backend`: the name of a backend; the weight is
    laid out again by the first call on another kind of device. x is (..., in) of fp32, fp16 or bf16, y is (..., out)
    in the dtype that a float layer would return.

    `weight` is the dequantized weight, made anew for every reader, so code that reads a layer's weight or its dtype
    works as before. Other values cannot be put in its place.
    """

    like: torch.Tensor
    layer: Any  # the weight in the layout of `kernels`
    kernels: Backend

    def __init__(
        self, weight: WeightParams, bias: torch.Tensor | None, source: Source | None, backend: str, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.codes.shape
        self.source = source
        self.bits = weight.bits
        self.has_bias = bias is not None
        self.requested = backend
        self.register_parameter("like", nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False))
        self._lay_out(weight, bias, weight.codes.device)

    def _lay_out(self, weight: WeightParams, bias: torch.Tensor | None, device: torch.device) -> None:
        self.kernels = get_backend(self.requested, device)
        prepare = self.kernels.prepare_float_input if self.source is None else self.kernels.prepare
        self.layer = prepare(weight, bias).to(device)
        self.prepared_for = device.type

    def lay_out_for(self, device: torch.device, memory: torch.device | None = None) -> None:
        """Lay the weight out for a kind of device, if it is not yet.

        `memory`: where the new layout stays, by default that device. Raises `InputError` for a layer that accelerate
        has sent away, whose tensors come with a hook of their own.
        """
        if self.prepared_for != device.type:
            if any(tensor.is_meta for tensor in self.layer.parameters()):
                raise InputError(f"an offloaded layer has to be laid out for {device.type} before it is offloaded")
            layer: Any = self.layer.cpu()
            weight = WeightParams(layer.unpacked().to(device), layer.scale.to(device), self.bits)
            self._lay_out(weight, layer.bias.to(device) if self.has_bias else None, device)
            self.layer.to(device if memory is None else memory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features or x.dtype not in FLOATS:
            raise InputError(
                f"a layer of {self.in_features} inputs in float32, float16 or bfloat16 was given {tuple(x.shape)} of"
                f" {x.dtype}"
            )
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if device != self.prepared_for:
            self.lay_out_for(x.device)
        if torch.compiler.is_compiling():
            return self._product(x, dtype, self.layer, self.source)
        modules: Any = self._modules  # where they are held, since `Module.__getattr__` takes long
        with self._present():
            return self._product(x, dtype, modules["layer"], modules.get("source"))

    def _present(self) -> AbstractContextManager[None]:
        """Bring the tensors of an offloaded layer to where they are used."""
        modules: Any = self._modules
        layer, source = modules["layer"], modules.get("source")
        params = layer if source is None else source._modules["params"]
        if not (offloaded(layer) or offloaded(params)):
            return PRESENT
        return present([layer] if source is None else [layer, params])

    def _product(self, x: torch.Tensor, dtype: torch.dtype, layer: Any, source: Source | None) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if not x.numel():
            return x.new_empty(shape, dtype=dtype)
        if source is None:
            return self.kernels.float_input_linear(x, layer, dtype)
        samples = len(x) if source.timed and x.ndim > 1 else 1
        rows = x.reshape(samples, -1, self.in_features)
        target = source.operand(samples)
        codes = source.shared(x, rows, target, self.kernels)
        return self.kernels.linear(codes, target, layer, Float(dtype)).view(shape)

    def unpacked(self) -> torch.Tensor:
        """Return the codes, int8 (out, in)."""
        with self._present():
            return cast(torch.Tensor, self.layer.unpacked())

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Return the dequantized weight (out, in) in the model's dtype, as a tensor of its own."""
        with self._present():
            values = self.layer.unpacked().float() * self.layer.scale.reshape(-1, 1)
            if self.source is not None:
                values = rotate(values, self.source.rotation) if self.source.rotation else values  # its own inverse
                factors = self.source.params.channels
                values = values if factors is None else values * factors
        values = values.to(self.like.dtype)
        return values if torch.compiler.is_compiling() else values.as_subclass(Dequantized)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """Return the bias (out,) in the model's dtype, or None."""
        if not self.has_bias:
            return None
        with self._present():
            values = self.layer.bias.to(self.like.dtype, copy=True)
        return values if torch.compiler.is_compiling() else values.as_subclass(Dequantized)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise InputError(NO_WRITING)
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Raise `InputError`: the codes are those of a solution, and are not drawn anew."""
        raise InputError("the weights of a quantized layer cannot be drawn anew")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add a stand-in for the weight, which has no values: diffusers looks there for the layers of a LoRA."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.like.detach().expand(1, self.in_features)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Load nothing here: the tensors of a quantized layer are those of its parts.

        Raises `InputError` for a weight or a bias that is not the layer's own, as of a float model or of an adapter
        that trains biases.
        """
        weight, bias = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}bias")
        own = self.bias
        if weight is not None and weight.shape != (1, self.in_features):
            raise InputError(f"'{prefix}weight' cannot be loaded: the layer has integer weights")
        if bias is not None and (own is None or not torch.equal(own.to(bias), bias)):
            raise InputError(f"'{prefix}bias' cannot be loaded: the biases of a quantized layer stay as they are")

    def extra_repr(self) -> str:
        """Return the layer's sizes, bits and grid for people."""
        kind = "float input" if self.source is None else str(self.source.params.spec.grid)
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, {kind}"
