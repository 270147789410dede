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
from tqdit.plan import SitePlan, plan
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.spec import Grid, GridParams, Solution
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
    sites = plan(graph, recipe, 1)
    linears = [linear for block in graph.blocks for linear in block.linears]
    rotations = {name: sites[linear.source.name].rotation for linear in linears for name in linear.weights}
    weights = _Weights(model, rotations, device)
    params = {name: _params(site, weights(name) if site.spec.is_weight else None) for name, site in sites.items()}
    floats = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in sites}
    codes = _Rounded(weights, {name: params[name] for name, site in sites.items() if site.spec.is_weight})
    config = {key: value for key, value in plain_config(model).items() if key != QUANTIZATION}
    return Solution(config, ALWAYS, params, codes, floats, provenance, graph=graph)


class _Weights:
    """The weights of a model as they are coded: on a device, and rotated where the input that they read is."""

    def __init__(self, model: nn.Module, rotations: Mapping[str, int], device: torch.device | None) -> None:
        self._model, self._rotations, self._device = model, rotations, device

    def __call__(self, name: str) -> torch.Tensor:
        weight = self._model.get_parameter(name).detach().to(self._device)
        return rotate(weight, size) if (size := self._rotations.get(name, 0)) else weight

    def shape(self, name: str) -> torch.Size:
        return self._model.get_parameter(name).shape


def _params(site: SitePlan, weight: torch.Tensor | None) -> GridParams:
    """Return the min-max scales of a weight, or the fraction of an input's rows."""
    spec = site.spec
    if weight is not None:
        magnitude = weight.flatten(1).abs().amax(1).float()
        magnitude = magnitude if spec.units > 1 else magnitude.amax(0, keepdim=True)
        return GridParams(spec, uniform.minmax_symmetric(magnitude, spec.bits, spec.name)[None].cpu())
    if spec.grid is not Grid.ROW:
        raise InputError(f"site '{spec.name}' is on the grid '{spec.grid}', whose scales have to be calibrated")
    return GridParams(spec, torch.full((1, 1), 1 / IntFormat(spec.bits).qmax), rotation=site.rotation)


class _Rounded(Mapping[str, torch.Tensor]):
    """The weights of a model as codes, int8, each rounded to nearest when it is read."""

    def __init__(self, weights: _Weights, params: Mapping[str, GridParams]) -> None:
        self._weights, self._params = weights, params

    def __getitem__(self, name: str) -> torch.Tensor:
        params, weight = self._params[name], self._weights(name)
        scale = params.scale.reshape(-1, *(1,) * (weight.ndim - 1)).to(weight.device)
        return uniform.quantize(weight, scale, 0, params.spec.bits)

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def shape_of(self, name: str) -> torch.Size:
        """Return the shape of a weight without coding it."""
        return self._weights.shape(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)
