"""Read the weight codes of a converted model back out of its layers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.layers.params import ActivationParams
from tqdit.ops.modules import present
from tqdit.ops.tables import operand
from tqdit.spec import Solution


@dataclass(frozen=True)
class Place:
    """The place of a weight's codes: `rows` of those of a layer."""

    layer: Any
    rows: slice
    shape: torch.Size


class LayerCodes(Mapping[str, torch.Tensor]):
    """Weight codes by site, int8 on the CPU, unpacked on demand from the layers of a model."""

    def __init__(
        self, places: Mapping[str, Place], sites: Mapping[str, ActivationParams], float_ends: Mapping[str, nn.Module]
    ) -> None:
        """Find the codes of a model's layers. `sites`, `float_ends`: its activation sites, and its ends in float."""
        self._places = places
        self._sites = sites
        self._float_ends = float_ends

    def __getitem__(self, site: str) -> torch.Tensor:
        place = self._places[site]
        with _readable(site, place.layer):
            return place.layer.unpacked()[place.rows].reshape(place.shape).cpu()

    def __contains__(self, site: object) -> bool:
        return site in self._places  # Mapping's own method would unpack the codes

    def shape_of(self, site: str) -> torch.Size:
        """Return the shape of a site's codes, without unpacking them."""
        return self._places[site].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def check_unchanged(self, solution: Solution) -> None:
        """Raise `InputError` if a scale, zero point, bias or end in float of the model is not that of `solution`."""
        for site, place in self._places.items():
            layer, bias = place.layer, solution.floats.get(f"{site.removesuffix('.weight')}.bias")
            with _readable(site, layer):
                mine = layer.scale if len(layer.scale) == 1 else layer.scale[place.rows]
                pairs = [(mine, solution.params[site].scale)]
                if bias is not None:
                    pairs.append((layer.bias[place.rows], bias))
                _check_equal(site, pairs)
        for name, module in self._sites.items():
            with _readable(name, module):
                expected = operand(solution.params[name])
                _check_equal(name, [(module.table, expected.table), _factors(module.channels, expected.channels)])
        for name, end in self._float_ends.items():
            with _readable(name, end):
                _check_equal(
                    name, [(value, solution.floats[f"{name}.{leaf}"]) for leaf, value in end.named_parameters()]
                )


def _factors(mine: torch.Tensor | None, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two sites' channel factors in one shape; no factors are factors of 1."""
    first, second = (torch.ones(1) if factors is None else factors.cpu() for factors in (mine, given))
    return first.expand_as(second) if len(first) == 1 else first, second


@contextmanager
def _readable(site: str, module: nn.Module) -> Iterator[None]:
    """Bring the tensors of an offloaded module here.

    Raises `InputError` where its tensors come with a whole block only.
    """
    with present([module]):
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise InputError(f"the tensors of '{site}' are offloaded; remove accelerate's hooks before reading them")
        yield


def _check_equal(site: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Raise `InputError` unless a model has the same values at a site as its solution.

    The solution may have one value for all channels.
    """
    for mine, given in pairs:
        if not torch.equal(mine.flatten().cpu(), given.flatten().to(mine.dtype).expand(mine.numel())):
            raise InputError(f"'{site}' was changed in the integer model; what it was solved for cannot be saved so")
