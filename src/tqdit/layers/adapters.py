"""Low-rank adapters on integer layers: places where peft can put them, and the operations of a block that has some."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.ops import reference
from tqdit.ops.holders import LinearCodes
from tqdit.ops.quantizer import dequantize
from tqdit.ops.schema import OperandParams, WeightParams


class AdapterSlot(nn.Linear):
    """Stands where the float model has a linear layer, under its name: peft wraps it as it would wrap that one.

    It computes zeros, so that the wrapped one computes what the adapters add. Its `weight` says shape and device, and
    that the layer is int8.
    """

    anchor: torch.Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self.register_buffer("anchor", torch.zeros(1, 1, dtype=torch.int8), persistent=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.anchor.expand(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, in) -> (B, N, out)."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Holder(nn.Module):
    """A module on the path to slots. What is put into any holder changes `contents`: a call of a model compares that
    with what it saw last, since looking into every slot would take longer than launching a graph.
    """

    contents: ClassVar[object] = object()  # another one each time, so that no copy of it is ever equal

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Holder.contents = object()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        Holder.contents = object()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        Holder.contents = object()


class Slots:
    """The slots of one block by the layer they belong to: "qkv" has three, the other layers one."""

    def __init__(
        self,
        block: nn.Module,
        names: Mapping[str, Sequence[str]],
        shapes: Mapping[str, torch.Size],
        closed: Sequence[str] = (),
    ) -> None:
        """Add them to `block`. `names`: layer -> dotted names inside the block; `shapes`: (out, in) by name.

        `closed`: names of layers without a slot; what is there is nothing that peft would wrap, so that it says so.
        """
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._codes: dict[str, LinearCodes] = {}
        for name in closed:
            _holder(block, name.split("."))
        for layer, dotted in names.items():
            for name in dotted:
                *path, leaf = name.split(".")
                parent = _holder(block, path)
                out_features, in_features = shapes[name]
                parent.add_module(leaf, AdapterSlot(in_features, out_features))
                self._places.setdefault(layer, []).append((parent, leaf))

    @property
    def used(self) -> bool:
        """Whether anything has been put around a slot."""
        places = [place for places in self._places.values() for place in places]
        return any(type(parent._modules[leaf]) is not AdapterSlot for parent, leaf in places)

    def of(self, layer: str) -> list[Any]:
        """What is in a layer's slots, from its first output on. `InputError` for adapters that are more than LoRA."""
        found = [parent._modules[leaf] for parent, leaf in self._places[layer]]
        for module in found:
            if type(module) is not AdapterSlot:
                _check_plain_lora(module)
        return found

    def adapted(self, name: str, layer: Any) -> "AdaptedLayer":
        """A layer, as a backend's `prepare` returned it, with its slots. It is unpacked once, a second copy of it."""
        codes = self._codes.get(name)
        if codes is None or codes.scale.device != layer.scale.device:
            plain = layer.unpacked()
            weight = WeightParams(plain, layer.scale, reference.column_sums(plain))
            codes = self._codes[name] = LinearCodes(weight, layer.bias)
        return AdaptedLayer(codes, self.of(name))

    def take(self, other: "Slots") -> None:
        """Have what is in the slots of the same block of another model."""
        for layer, places in self._places.items():
            for (parent, leaf), module in zip(places, other.of(layer), strict=True):
                parent.add_module(leaf, module.to(parent._modules[leaf].anchor.device))  # type: ignore[union-attr]


def _holder(block: nn.Module, path: Sequence[str]) -> nn.Module:
    """The module at a path inside a block; empty ones are made on the way."""
    for part in path:
        if part not in block._modules:
            block.add_module(part, Holder())
        block = block.get_submodule(part)
    return block


def _check_plain_lora(module: Any) -> None:
    """What is added must not depend on the layer's own weight or output, which a slot does not have."""
    if not hasattr(module, "lora_A") or getattr(module, "lora_variant", None):
        raise InputError(f"only plain LoRA goes on integer layers, not {type(module).__name__} of another kind")


class AdaptedLayer(NamedTuple):
    """A linear layer in plain codes, and what is in its slots."""

    codes: LinearCodes
    slots: list[Any]


class Adapted(reference.Reference):
    """The operations of a block with adapters: the reference's, since an epilogue has no place for them.

    An adapter reads what the integer layer reads: the values of the codes.
    """

    def linear(self, codes: torch.Tensor, source: OperandParams, layer: Any) -> torch.Tensor:
        x = dequantize(codes, source)
        added = [slot(x) for slot in layer.slots]
        return super().linear(codes, source, layer.codes) + torch.cat(added, dim=-1)
