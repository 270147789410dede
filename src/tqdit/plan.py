"""Plan a model's sites and the grids that the search tries. No other module reads a recipe's choices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from tqdit.architectures.registry import graph as graph_of
from tqdit.graph import Graph, Linear, Operand
from tqdit.recipe import Recipe
from tqdit.spec import MAX_BITS, Granularity, Grid, Role, SiteSpec

TWO_REGION = {Role.SOFTMAX: Grid.MRQ_SOFTMAX, Role.GELU: Grid.MRQ_GELU}  # the other roles have one region
DECIBELS_PER_BIT = 6.02  # of SQNR, by which `Recipe.fallback` is less for inputs of fewer than 8 bits
STATIC_OR_ROW = (Grid.UNIFORM, Grid.ROW)  # a static scale is kept where it is as good as a scale for each row
BY_ROW = {Role.INPUT: Grid.ROW, Role.SOFTMAX: Grid.SOFTMAX_ROW, Role.GELU: Grid.ROW}


class Objective(StrEnum):
    """The weight of errors in a matmul's output."""

    PLAIN = "plain"  # unweighted
    FISHER = "fisher"  # weighted by the Fisher diagonal (HO)
    FISHER_BY_STEP = "fisher_by_step"  # weighted by the Fisher diagonal times the sampler's step weight
    IMAGE = "image"  # between time groups by what errors do to the image, inside of one by the Fisher diagonal


@dataclass(frozen=True)
class SitePlan:
    """One site before it is solved.

    `spec` is the site with the first of its `grids`. The search tries them in this order, and keeps the first of
    equally good ones. With `merging`, regions of a two-region grid have scales that fit one integer product. With
    `channels`, the search also tries factors for the channels of the operand. `apart`: the operand is quantized by an
    operation of its own, as in traced models. `rotation`: channels of the blocks that it is rotated in, or 0.
    `fallback`: the SQNR in dB below which its layers take float inputs instead, or None.
    """

    spec: SiteSpec
    grids: tuple[Grid, ...]
    merging: bool = False
    channels: bool = False
    apart: bool = False
    rotation: int = 0
    fallback: float | None = None

    @property
    def tried(self) -> tuple[SiteSpec, ...]:
        """Return the site on each of its grids. The scale of a row needs no time groups."""
        rows = {True: 1, False: self.spec.groups}
        return tuple(replace(self.spec, grid=grid, groups=rows[grid.per_row]) for grid in self.grids)


def plan(graph: Graph, recipe: Recipe, groups: int | None = None) -> dict[str, SitePlan]:
    """Return every site of a model by name: all weights of layers on float inputs, then block by block.

    `groups`: the number of time groups that were made, by default the recipe's. Visited timesteps may make fewer than
    the recipe asks for. The order is that of an artifact's manifest.
    """
    return {site.spec.name: site for site in _sites(graph, recipe, recipe.groups if groups is None else groups)}


def sites(config: Mapping[str, Any], recipe: Recipe) -> tuple[SiteSpec, ...]:
    """Return every site of a config's model, on the first of the grids that are tried.

    Raises `InputError` for a config that is not supported.
    """
    return tuple(site.spec for site in plan(graph_of(config), recipe).values())


def objective(recipe: Recipe) -> Objective:
    """Return what the search weighs errors with."""
    if recipe.hessian == "none":
        return Objective.PLAIN
    if recipe.hessian == "image":
        return Objective.IMAGE
    return Objective.FISHER if recipe.loss == "epsilon" else Objective.FISHER_BY_STEP


def second_order_rounding(recipe: Recipe) -> bool:
    """Say whether weights are rounded by second order (GPTQ), and not to nearest."""
    return recipe.rounding == "second_order"


def needs_records(recipe: Recipe) -> bool:
    """Say whether a traced model has to be calibrated. Scales of rows and weights rounded to nearest need no records.

    `rounds` and `fallback` judge by records, too.
    """
    by_row = recipe.input_grid == "row" or recipe.rotation > 0
    measured = recipe.rounds > 0 or recipe.fallback > 0 or recipe.input_channels == "best"
    return measured or not by_row or second_order_rounding(recipe)


def grids(recipe: Recipe, role: Role, at_hand: bool = False) -> tuple[Grid, ...]:
    """Return the grids that the search tries for an operand of a role, in order.

    `at_hand`: the operand is quantized with its row at hand. Two regions of `MAX_BITS` bits whose scales merge have
    only levels of a uniform grid, so a uniform grid is tried in their place.
    """
    two_region = TWO_REGION.get(role)
    inputs = recipe.input_grid if at_hand else recipe.attended_grid
    choices = {Role.SOFTMAX: recipe.softmax_grid, Role.GELU: recipe.gelu_grid, Role.INPUT: inputs}
    choice = choices.get(role, "uniform")
    if choice == "row":
        return (BY_ROW[role],)
    if role is Role.INPUT and choice == "best":
        return STATIC_OR_ROW
    idle = _merging(recipe, role) and recipe.activation_bits == MAX_BITS
    if two_region is None or choice == "uniform" or (choice == "best" and idle):
        return (Grid.UNIFORM,)
    return (two_region,) if choice == "mrq" else (two_region, Grid.UNIFORM)


def _merging(recipe: Recipe, role: Role) -> bool:
    """Say whether two regions have to fit one integer product."""
    products = {Role.SOFTMAX: recipe.softmax_products, Role.GELU: recipe.gelu_products}
    return products.get(role) == "one"


def _sites(graph: Graph, recipe: Recipe, groups: int) -> Iterator[SitePlan]:
    for name in graph.float_input:
        if recipe.ends == "float" and name in graph.ends:
            continue
        yield _weight(graph, f"{name}.weight", Role.WEIGHT_ONLY, recipe.float_input_bits, Granularity.PER_CHANNEL)
    for block in graph.blocks:
        for matmul in block.matmuls:
            if isinstance(matmul, Linear):
                source = matmul.source
                yield _apart(graph, matmul, recipe, groups) if source.apart else _activation(source, recipe, groups)
                for name in matmul.weights:
                    yield _weight(graph, name, Role.WEIGHT, recipe.weight_bits, recipe.granularity)
            else:
                for operand in matmul.operands:
                    yield _activation(operand, recipe, groups)


def _weight(graph: Graph, name: str, role: Role, bits: int, granularity: Granularity) -> SitePlan:
    units = graph.shapes[name][0] if granularity is Granularity.PER_CHANNEL else 1
    return SitePlan(SiteSpec(name, role, bits, Grid.UNIFORM, granularity, units=units), (Grid.UNIFORM,))


def _activation(operand: Operand, recipe: Recipe, groups: int) -> SitePlan:
    role = operand.role
    granularity = Granularity.PER_HEAD if role in (Role.QUERY, Role.KEY, Role.VALUE) else Granularity.PER_TENSOR
    tried = grids(recipe, role, operand.quantized_by_row)
    rows = groups if _grouped(operand, recipe) and not tried[0].per_row else 1
    spec = SiteSpec(operand.name, role, recipe.activation_bits, tried[0], granularity, rows, operand.units)
    channels = role is Role.GELU and recipe.gelu_channels == "best" and tried != (Grid.ROW,)
    return SitePlan(spec, tried, _merging(recipe, role), channels)


def _apart(graph: Graph, linear: Linear, recipe: Recipe, groups: int) -> SitePlan:
    """Plan an input that is quantized apart. What made it, such as GELU, does not decide its grids."""
    operand, bits = linear.source, recipe.activation_bits
    fits = recipe.rotation and graph.features(linear)[0] % recipe.rotation == 0
    rotation = recipe.rotation if fits else 0
    # Ranges of rotated values are not recorded, so these have the grid of rows alone.
    tried = (Grid.ROW,) if rotation else grids(recipe, Role.INPUT, at_hand=True)
    rows = groups if _grouped(operand, recipe) and not tried[0].per_row else 1
    spec = SiteSpec(operand.name, operand.role, bits, tried[0], Granularity.PER_TENSOR, rows)
    lowest = recipe.fallback - DECIBELS_PER_BIT * (MAX_BITS - bits) if recipe.fallback else None
    return SitePlan(spec, tried, False, recipe.input_channels == "best", True, rotation, lowest)


def _grouped(operand: Operand, recipe: Recipe) -> bool:
    """Say whether the operand has parameters for every time group."""
    grouped = {"all": True, "softmax": operand.role is Role.SOFTMAX, "none": False}[recipe.time_grouped]
    return grouped and operand.timed
