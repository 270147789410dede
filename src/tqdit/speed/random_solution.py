"""A quantized model of a shape without calibration: random codes, plausible scales.

It is for timing, never for images.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tqdit.architectures.interface import Architecture
from tqdit.architectures.registry import architecture, graph
from tqdit.grids.regions import GELU_MINIMUM, coarse_softmax_scale, merging_exponents, softmax_exponents
from tqdit.plan import SitePlan, plan
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.spec import Grid, GridParams, IntFormat, Role, SiteSpec, Solution
from tqdit.speed.random_weights import Pool, standard_deviation
from tqdit.system.environment import versions
from tqdit.timegroups import TimeGroups

# Extent (largest minus smallest value) of each operand in a model whose layers have unit variance: about +-4 sigma.
EXTENTS = {Role.INPUT: 10.0, Role.QUERY: 10.0, Role.KEY: 10.0, Role.VALUE: 10.0}
GELU_MAXIMUM = 5.0
VARIATION = 0.03  # relative variation of a scale between time groups, heads and channels
NUM_TIMESTEPS = 1000
STREAM_MAX = 256.0  # beyond any value of the residual stream, which is the sum of some layers of unit variance


def random_solution(config: Mapping[str, Any], recipe: Recipe, seed: int = 0) -> Solution:
    """Return a Solution of the shape `config` under `recipe`, with values for every site and parameter.

    Activations of the resulting model have unit variance and fill their grids. Where a search would choose a grid, it
    is the first one tried, which costs most, so that timing is on the safe side. No float copy of a weight is made; all
    blocks share the tensors of one embedder, as an artifact's do. Raises `InputError` for a config that is not
    supported.
    """
    structure, kind = graph(config), architecture(config)
    shapes = structure.shapes
    draw = _Draw(max(shape.numel() for shape in shapes.values()), kind, kind.tokens(config), seed)
    linears = [linear for block in structure.blocks for linear in block.linears]
    widths = {linear.source.name: structure.features(linear)[0] for linear in linears}
    params: dict[str, GridParams] = {}
    codes: dict[str, torch.Tensor] = {}
    for site in plan(structure, recipe).values():
        spec, twin = site.spec, kind.twin(site.spec.name)
        if twin != spec.name:
            params[spec.name] = GridParams(spec, params[twin].scale)
            codes[spec.name] = codes[twin]
        elif spec.is_weight:
            params[spec.name] = draw.weight_params(spec, shapes[spec.name])
            codes[spec.name] = draw.codes(spec, shapes[spec.name])
        else:
            params[spec.name] = draw.activation_params(site, widths.get(spec.name, 0))
    floats: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name not in codes:
            twin = kind.twin(name)
            floats[name] = floats[twin] if twin != name else draw.parameter(name, shape)
    provenance = Provenance(
        preset=recipe.label,
        recipe=recipe.model_dump(mode="json"),
        source=f"random {kind.shape_name(config)}",
        versions=versions(),
    )
    groups = TimeGroups.uniform(0, NUM_TIMESTEPS, recipe.groups)
    return Solution(dict(config), groups, params, codes, floats, provenance, STREAM_MAX)


class _Draw:
    """A source of random codes and parameters of one model."""

    def __init__(self, largest: int, kind: Architecture, keys: int, seed: int) -> None:
        """Draw the numbers of a model.

        `largest`: elements of the largest tensor. `keys`: tokens over which a softmax row spreads.
        """
        self._pool = Pool(largest, seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = keys
        self._kind = kind
        self._codes: dict[int, torch.Tensor] = {}  # bits -> the pool as codes

    def codes(self, spec: SiteSpec, shape: torch.Size) -> torch.Tensor:
        """Return int8 codes of N(0, 1) values on a grid that ends at `_clip`."""
        if spec.bits not in self._codes:
            fmt = IntFormat(spec.bits)
            scaled = (self._pool.values * (fmt.qmax / _clip(spec.bits))).round_()
            self._codes[spec.bits] = scaled.clamp_(fmt.qmin, fmt.qmax).to(torch.int8)
        return self._pool.take(shape, self._codes[spec.bits])

    def weight_params(self, spec: SiteSpec, shape: torch.Size) -> GridParams:
        """Return scales that give the layer unit variance."""
        step = _clip(spec.bits) / spec.format.qmax * standard_deviation(self._kind, spec.name, shape)
        return GridParams(spec, self._varied(spec, step))

    def activation_params(self, site: SitePlan, width: int) -> GridParams:
        """Return parameters of a site on the first of its grids. `width`: channels of a linear layer's input."""
        channels = torch.ones(width) if site.channels else None  # a factor costs the same whatever it is
        return replace(self._grid_params(site), channels=channels)

    def _grid_params(self, site: SitePlan) -> GridParams:
        spec, fmt = site.spec, site.spec.format
        levels = fmt.qmax - fmt.qmin
        if spec.grid.per_row:
            nothing = torch.zeros(spec.scale_shape)
            return GridParams(spec, spec.grid.initial(nothing, nothing, spec.bits, spec.name)[0])
        if spec.grid is Grid.MRQ_SOFTMAX:
            coarse = torch.full((spec.groups, spec.units), coarse_softmax_scale(spec.bits))
            return GridParams(spec, torch.stack([coarse * 2.0 ** -self._exponents(site), coarse], -1))
        if spec.grid is Grid.MRQ_GELU:
            coarse = self._varied(spec, GELU_MAXIMUM / fmt.qmax)
            fine = torch.full_like(coarse, GELU_MINIMUM / -fmt.qmin)
            if site.merging:
                fine = coarse * 2.0 ** -(merging_exponents(spec.bits, spec.grid).stop - 1)
            return GridParams(spec, torch.stack([fine, coarse], -1))
        if spec.role is Role.SOFTMAX:
            return GridParams(spec, *_from_low(spec, self._varied(spec, 1 / levels), 0.0))
        if spec.role is Role.GELU:
            step = self._varied(spec, (GELU_MAXIMUM + GELU_MINIMUM) / levels)
            return GridParams(spec, *_from_low(spec, step, GELU_MINIMUM))
        spread = max(1, levels // 32)  # the middle of the codes is zero; ranges are not quite symmetric
        zero_point = torch.randint(-spread, spread + 1, (spec.groups, spec.units), generator=self._generator)
        return GridParams(spec, self._varied(spec, EXTENTS[spec.role] / levels), zero_point.to(torch.int32))

    def parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return a parameter that stays in float."""
        return self._pool.take(shape).mul_(standard_deviation(self._kind, name, shape))

    def _varied(self, spec: SiteSpec, step: float) -> torch.Tensor:
        noise = torch.randn(spec.groups, spec.units, generator=self._generator).clamp_(-3, 3)
        return (1 + VARIATION * noise) * step

    def _exponents(self, site: SitePlan) -> torch.Tensor:
        """Return i of s1 = s2 2^-i.

        The fine region ends near the largest probabilities of a row, one to either side.
        """
        spec = site.spec
        legal = softmax_exponents(spec.bits, merging=site.merging)
        middle = round(math.log2(max(self._keys / 16, 1)))
        shift = torch.randint(-1, 2, (spec.groups, spec.units), generator=self._generator)
        return (middle + shift).clamp(legal.start, legal.stop - 1).float()


def _clip(bits: int) -> float:
    """Return the end of a grid for N(0, 1), in standard deviations: fewer levels pay for less of the tail."""
    return min(4.0, bits / 2)


def _from_low(spec: SiteSpec, step: torch.Tensor, low: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of a grid whose lowest value is about -`low`."""
    return step, (spec.format.qmin + torch.round(low / step)).to(torch.int32)
