"""Read the codes and the floats of a traced model back from its modules."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.layers.quantized import QuantizedLinear
from tqdit.ops.modules import present


class WholeLayer:
    """The place of all codes of a layer, in the layout that it has now; see `layers.codes.Place`."""

    rows = slice(None)

    def __init__(self, owner: QuantizedLinear) -> None:
        self.owner = owner

    @property
    def layer(self) -> Any:
        """Return the layer in its backend's layout."""
        return self.owner.layer

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the weight."""
        return torch.Size((self.owner.out_features, self.owner.in_features))


class ModelFloats(Mapping[str, torch.Tensor]):
    """The parameters of a traced model that stay in float, by the name that they have in the float model.

    They are read from the model's modules, in the order of the solution's, wherever adapters have moved these to.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, QuantizedLinear], given: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name in given:
            owner, _, leaf = name.rpartition(".")
            self._places[name] = (layers.get(owner) or modules[owner], leaf)

    def __getitem__(self, name: str) -> torch.Tensor:
        owner, leaf = self._places[name]
        with present([owner.layer if isinstance(owner, QuantizedLinear) else owner]):
            value = owner.layer.bias if isinstance(owner, QuantizedLinear) else getattr(owner, leaf)
            if value.is_meta:
                raise InputError(f"'{name}' is offloaded; remove accelerate's hooks before reading it")
            value = cast(torch.Tensor, value).detach().cpu()
        if isinstance(owner, QuantizedLinear):  # products add the bias in fp32, and a model's dtype may be less
            rounded = value.to(owner.like.dtype)
            value = rounded if torch.equal(rounded.float(), value) else value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
