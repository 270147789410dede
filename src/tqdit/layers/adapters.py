"""Low-rank adapters on integer layers: the places where peft puts them, and the operations of a block that has some."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.ops import reference
from tqdit.ops.holders import LinearCodes
from tqdit.ops.modules import Watched, offloaded
from tqdit.ops.quantizer import dequantize
from tqdit.ops.schema import Codes, OperandParams, WeightParams
from tqdit.spec import MAX_BITS


class AdapterSlot(nn.Linear):
    """A stand-in for a linear layer of the float model, under that layer's name: peft wraps the stand-in.

    It computes zeros, so that the wrapped one computes what the adapters add. Its `weight` says the shape, the device,
    and the dtype of adapters; there is nothing to read or to write in it.
    """

    anchor: torch.Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self.register_buffer("anchor", torch.zeros(1, 1, dtype=torch.float32), persistent=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Return a stand-in for the weight, which has a shape, a dtype and a device but no values."""
        return self.anchor.expand(self.out_features, self.in_features).as_subclass(_NoWeight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros: (B, N, in) -> (B, N, out)."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


class _NoWeight(torch.Tensor):
    """The weight of a slot: shape, dtype and device without values. Reading or writing them is an `InputError`."""

    @property
    def data(self) -> torch.Tensor:
        raise InputError(
            "integer layers have no weights that an adapter could be merged into or start from, as merging, DoRA and"
            " PiSSA need: let plain LoRA run beside them, or merge it into the float model and quantize that"
        )

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _ = self.data


class Holder(Watched):
    """A module on the path to slots.

    The place of a slot takes plain LoRA, or a slot again. Anything else is an `InputError`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            _check_plain_lora(value, name)
        super().__setattr__(name, value)
        self.changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.changed()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self.changed()


class Slots:
    """The slots of one block by the layer they belong to: "qkv" has three, the other layers have one."""

    def __init__(
        self,
        block: nn.Module,
        names: Mapping[str, Sequence[str]],
        shapes: Mapping[str, torch.Size],
        closed: Sequence[str] = (),
    ) -> None:
        """Add slots to `block`.

        `names`: layer -> dotted names inside the block; `shapes`: (out, in) by name. `closed`: names of layers without
        a slot; a module stands there that peft cannot wrap, so that peft says so.
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
        """Say whether anything has been put around a slot."""
        places = [place for places in self._places.values() for place in places]
        return any(type(parent._modules[leaf]) is not AdapterSlot for parent, leaf in places)

    def adapters(self, layer: str) -> list[Any]:
        """Return the modules in a layer's slots, from its first output on.

        Raises `InputError` for adapters that are more than LoRA.
        """
        found = [parent._modules[leaf] for parent, leaf in self._places[layer]]
        for (_, leaf), module in zip(self._places[layer], found, strict=True):
            _check_plain_lora(module, leaf)
        return found

    def adapted(self, name: str, layer: Any) -> "AdaptedLayer":
        """Return a layer, which a backend's `prepare` made, together with its slots.

        The layer is unpacked once, a second copy of its codes. An offloaded layer is unpacked at every call, since its
        tensors are not to stay.
        """
        codes = self._codes.get(name)
        if codes is None or codes.scale.device != layer.scale.device:
            plain = layer.unpacked()
            weight = WeightParams(plain, layer.scale, MAX_BITS, reference.column_sums(plain))
            codes = LinearCodes(weight, layer.bias)
            if offloaded(layer):
                self._codes.pop(name, None)
            else:
                self._codes[name] = codes
        return AdaptedLayer(codes, self.adapters(name))

    def take(self, other: "Slots") -> None:
        """Take over the modules in the slots of the same block of another model."""
        for layer, places in self._places.items():
            for (parent, leaf), module in zip(places, other.adapters(layer), strict=True):
                parent.add_module(leaf, module.to(parent._modules[leaf].anchor.device))  # type: ignore[union-attr]


def _holder(block: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the module at a path inside a block; empty holders are made on the way."""
    for part in path:
        if part not in block._modules:
            block.add_module(part, Holder())
        block = block.get_submodule(part)
    return block


def _check_plain_lora(module: Any, name: str) -> None:
    """Raise `InputError` unless a module may stand in the place of a slot.

    Allowed are a slot, a holder, and adapters that add what depends on the layer's input alone. A slot has neither the
    layer's own weight nor its output, which other adapters need.
    """
    if isinstance(module, AdapterSlot | Holder):
        return
    peft = sys.modules.get("peft.tuners.lora.layer")  # the maker of an adapter has imported this module
    if peft is None or type(module) is not peft.Linear or module.lora_variant:
        variants = sorted({type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()})
        kind = f" with {', '.join(variants)}" if variants else ""
        raise InputError(
            f"only plain LoRA goes on integer layers, not what the adapter has for '{name}':"
            f" {type(module).__module__}.{type(module).__name__}{kind}"
        )


class AdaptedLayer(NamedTuple):
    """A linear layer in plain codes, and the modules in its slots."""

    codes: LinearCodes
    slots: list[Any]


class Adapted(reference.Reference):
    """The operations of a block with adapters: the reference's, since an epilogue has no place for an adapter.

    An adapter reads what the integer layer reads: the values of the codes.
    """

    def product(self, codes: Codes, source: OperandParams, layer: Any) -> torch.Tensor:
        x = dequantize(codes, source)
        if source.channels is not None:  # the adapter knows the layer's own input
            x = x / source.channels
        added = [slot(x) for slot in layer.slots]
        return super().product(codes, source, layer.codes) + torch.cat(added, dim=-1)
