"""Make a Solution without calibration: a scale for each row of inputs, and weights rounded to nearest.

Every scale follows from the values at hand, so nothing has to be recorded. A weight is coded when it is read, so
nothing but the float model and the codes of one layer is in memory at a time.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from tqdit.architectures.from_config import QUANTIZATION
from tqdit.architectures.registry import plain_config
from tqdit.errors import InputError
from tqdit.graph import Graph
from tqdit.grids import uniform
from tqdit.grids.formats import IntFormat
from tqdit.ops.rotation import rotate
from tqdit.plan import plan
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.spec import Grid, GridParams, SiteSpec, Solution
from tqdit.timegroups import TimeGroups

ALWAYS = TimeGroups((), 0.0, 1.0, closed=True)  # no parameter depends on the time


def direct_solution(
    model: nn.Module, graph: Graph, recipe: Recipe, provenance: Provenance, device: torch.device | None = None
) -> Solution:
    """Return the solution of a float model on row grids, with weights rounded to nearest.

    Its codes and floats are read from `model`, whose layers must not change before their codes have been read.
    `device`: where weights are coded, one at a time; by default where they are. Raises `InputError` that names a weight
    with NaN or Inf, and for a recipe whose inputs are not on the grid of rows.
    """
    sites, linears = plan(graph, recipe, 1), [linear for block in graph.blocks for linear in block.linears]
    turned = {name: sites[linear.source.name].rotation for linear in linears for name in linear.weights}
    codes = _Rounded(model, {name: site.spec for name, site in sites.items() if site.spec.is_weight}, turned, device)
    params = {
        name: codes.params(name) if site.spec.is_weight else _fraction(site.spec, site.rotation)
        for name, site in sites.items()
    }
    floats = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in sites}
    config = {key: value for key, value in plain_config(model).items() if key != QUANTIZATION}
    return Solution(config, ALWAYS, params, codes, floats, provenance, graph=graph)


def _fraction(spec: SiteSpec, rotation: int) -> GridParams:
    """Return the parameters of an input: the fraction of a row's largest magnitude."""
    if spec.grid is not Grid.ROW:
        raise InputError(f"site '{spec.name}' is on the grid '{spec.grid}', whose scales have to be calibrated")
    return GridParams(spec, torch.full((1, 1), 1 / IntFormat(spec.bits).qmax), rotation=rotation)


class _Rounded(Mapping[str, torch.Tensor]):
    """The weights of a model as codes, int8, each rounded to nearest when it is read.

    `turned`: the rotation of the input of each layer that has one, by the name of its weight.
    """

    def __init__(
        self, model: nn.Module, specs: Mapping[str, SiteSpec], turned: Mapping[str, int], device: torch.device | None
    ) -> None:
        self._model, self._specs, self._turned, self._device = model, specs, turned, device
        self._scales: dict[str, torch.Tensor] = {}

    def params(self, name: str) -> GridParams:
        """Return the min-max scales of a weight, which are kept."""
        spec, values = self._specs[name], self._values(name).flatten(1)
        magnitude = values.abs().amax(1).float()
        magnitude = magnitude if spec.units > 1 else magnitude.amax(0, keepdim=True)
        self._scales[name] = uniform.minmax_symmetric(magnitude, spec.bits, spec.name)[None].cpu()
        return GridParams(spec, self._scales[name])

    def _values(self, name: str) -> torch.Tensor:
        """Return a weight on the device, rotated as its input will be."""
        weight = self._model.get_parameter(name).detach().to(self._device)
        rotation = self._turned.get(name, 0)
        return rotate(weight, rotation) if rotation else weight

    def __getitem__(self, name: str) -> torch.Tensor:
        values = self._values(name)
        scale = self._scales[name].reshape(-1, *(1,) * (values.ndim - 1)).to(values.device)
        return uniform.quantize(values, scale, 0, self._specs[name].bits)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def shape_of(self, name: str) -> torch.Size:
        """Return the shape of a weight without coding it."""
        return self._model.get_parameter(name).shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
