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
    specs = {name: site.spec for name, site in plan(graph, recipe, 1).items()}
    weights = {name: parameter for name, parameter in model.state_dict(keep_vars=True).items() if name in specs}
    params = {name: _params(spec, weights.get(name), device) for name, spec in specs.items()}
    floats = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in specs}
    codes = _Rounded(model, {name: params[name] for name in weights}, device)
    config = {key: value for key, value in plain_config(model).items() if key != QUANTIZATION}
    return Solution(config, ALWAYS, params, codes, floats, provenance, graph=graph)


def _params(spec: SiteSpec, weight: torch.Tensor | None, device: torch.device | None) -> GridParams:
    """Return the min-max scales of a weight, or the fraction of an input's rows."""
    if weight is not None:
        values = weight.detach().to(device).flatten(1)
        magnitude = values.abs().amax(1).float()
        magnitude = magnitude if spec.units > 1 else magnitude.amax(0, keepdim=True)
        return GridParams(spec, uniform.minmax_symmetric(magnitude, spec.bits, spec.name)[None].cpu())
    if spec.grid is not Grid.ROW:
        raise InputError(f"site '{spec.name}' is on the grid '{spec.grid}', whose scales have to be calibrated")
    return GridParams(spec, torch.full((1, 1), 1 / IntFormat(spec.bits).qmax))


class _Rounded(Mapping[str, torch.Tensor]):
    """The weights of a model as codes, int8, each rounded to nearest when it is read."""

    def __init__(self, model: nn.Module, params: Mapping[str, GridParams], device: torch.device | None) -> None:
        self._model, self._params, self._device = model, params, device

    def __getitem__(self, name: str) -> torch.Tensor:
        params, weight = self._params[name], self._model.get_parameter(name).detach().to(self._device)
        scale = params.scale.reshape(-1, *(1,) * (weight.ndim - 1)).to(weight.device)
        return uniform.quantize(weight, scale, 0, params.spec.bits)

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def shape_of(self, name: str) -> torch.Size:
        """Return the shape of a weight without coding it."""
        return self._model.get_parameter(name).shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)
