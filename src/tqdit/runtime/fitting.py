"""Check that a Solution fits the model of its config: every site and parameter is there, as the kernels expect it.

The kernels index scales by head and channel, and choose their arithmetic by grid, without further checks. Of a class
with an architecture, nothing is built or allocated before the file is known to hold as much as its config says. Of a
traced model, the parameters are built empty first; tables that the class computes for itself take memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tqdit.architectures.registry import architecture, check_supported
from tqdit.architectures.traced import traced
from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.graph import Graph
from tqdit.grids.softmax_row import fixed_scale
from tqdit.plan import BY_ROW, TWO_REGION, plan
from tqdit.recipe import Recipe
from tqdit.spec import MAX_BITS, MIN_BITS, Granularity, Grid, GridParams, Role, SiteSpec, Solution

LEAST_ACTIVATION_BITS = 4
PER_CHANNEL = Recipe("paper", groups=1, weight_granularity="per_channel")  # its plan gives the number of channels
FIELDS = ("role", "grid", "granularity", "groups", "units")


def read(folder: Path, root: Path | None = None) -> Solution:
    """Read an artifact and check that its solution fits the model; see `artifact.read` and `check_solution`.

    Raises `InputError` that names the folder.
    """
    solution = artifact.read(folder, root)
    try:
        check_solution(solution)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    return solution


def check_solution(solution: Solution) -> None:
    """Check that a solution has the sites and parameters of its config's model.

    A recipe's choices are free for every site: bits, time groups or none, two regions or one or the grid of rows, one
    scale per weight or per output channel, channel factors of a linear layer's input, codes or floats at both ends.
    Raises `InputError` that names the site and the field, or the parameter, that the model cannot have.
    """
    graph = _graph(solution)
    timed = {operand.name for operand in graph.operands if operand.timed}
    optional = {f"{name}.weight" for name in graph.ends}  # codes or float
    rotated = {operand.name for operand in graph.operands if operand.apart}
    expected = {
        name: site.spec
        for name, site in plan(graph, PER_CHANNEL).items()
        if name in solution.params or name not in optional
    }
    for name, spec in expected.items():
        if name not in solution.params:
            kind = "codes for weight" if spec.is_weight else "parameters for activation"
            raise InputError(f"the solution has no {kind} site '{name}'")
        _check_site(solution, solution.params[name].spec, spec, name in timed)
    widths = {linear.source.name: graph.features(linear)[0] for block in graph.blocks for linear in block.linears}
    for name in expected:
        _check_channels(solution.params[name], widths.get(name))
        _check_rotation(solution.params[name], widths.get(name) if name in rotated else None)
    _check_parameters(solution, expected, graph.shapes)


def _graph(solution: Solution) -> Graph:
    """Return the graph of a solution's model, which is known to hold no more than the solution does."""
    config = solution.model_config
    if solution.graph is not None:
        traced(config["_class_name"]).check_solution(solution)
        return solution.graph
    check_supported(config)
    found = architecture(config)
    found.check_sizes(config, _shapes(solution.codes) | _shapes(solution.floats))
    return found.graph(config)


def _shapes(held: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor. The codes of a model's layers need not be unpacked for it."""
    shape_of = getattr(held, "shape_of", None)
    return {name: tuple(held[name].shape if shape_of is None else shape_of(name)) for name in held}


def _check_site(solution: Solution, found: SiteSpec, expected: SiteSpec, timed: bool) -> None:
    """Compare a site with the site that the model needs, field by field."""
    legal: dict[str, tuple[Any, ...]] = {field: (getattr(expected, field),) for field in FIELDS}
    if not expected.is_weight:
        other = (choice[expected.role] for choice in (TWO_REGION, BY_ROW) if expected.role in choice)
        legal["grid"] = (*other, Grid.UNIFORM)
    if timed:
        legal["groups"] = (1, solution.time_groups.num_groups)
    if expected.role is Role.WEIGHT:
        legal["granularity"] = (Granularity.PER_TENSOR, Granularity.PER_CHANNEL)
        legal["units"] = (1 if found.granularity is Granularity.PER_TENSOR else expected.units,)
    legal["bits"] = tuple(range(MIN_BITS if expected.is_weight else LEAST_ACTIVATION_BITS, MAX_BITS + 1))
    for field, values in legal.items():
        if (value := getattr(found, field)) not in values:
            named = " or ".join(map(str, values))
            raise InputError(f"site '{expected.name}' has {field} {value}; its model needs {named}")
    _check_tensors(solution.params[expected.name])


def _check_tensors(params: GridParams) -> None:
    found = params.spec
    if (params.zero_point is not None) != found.has_zero_point:
        raise InputError(f"site '{found.name}' has {'no' if params.zero_point is None else 'a'} zero_point")
    shape = found.scale_shape
    for what, tensor in (("scale", params.scale), ("zero_point", params.zero_point)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"site '{found.name}' has a {what} of shape {tuple(tensor.shape)}, not {shape}")
    if found.grid is Grid.SOFTMAX_ROW and not (params.scale.float() == fixed_scale(found.bits)).all():
        raise InputError(f"site '{found.name}' has another scale of softmax rows than that of {found.bits} bits")


def _check_channels(params: GridParams, width: int | None) -> None:
    """Check that channel factors are as many as the channels of a linear layer's input.

    `width`: the number of those, or None for a site that is no such input: its channels have no factors.
    """
    if params.channels is None:
        return
    if width is None:
        raise InputError(f"site '{params.spec.name}' has channels; only inputs of linear layers can have factors")
    if tuple(params.channels.shape) != (width,):
        given = tuple(params.channels.shape)
        raise InputError(f"site '{params.spec.name}' has channels of shape {given}, not {(width,)}")


def _check_rotation(params: GridParams, width: int | None) -> None:
    """Check that a rotation is of an operand that is quantized apart, whose `width` is whole blocks."""
    if params.rotation and (width is None or width % params.rotation):
        raise InputError(f"site '{params.spec.name}' has a rotation of {params.rotation}, its model's width is {width}")


def _check_parameters(
    solution: Solution, expected: Mapping[str, SiteSpec], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that exactly the model's parameters are there, each in its shape, as codes or in float."""
    found = {True: _shapes(solution.codes), False: _shapes(solution.floats)}
    for name, shape in shapes.items():
        held = found[name in expected]
        if name not in held:
            raise InputError(f"the solution has no value for parameter '{name}'")
        if held[name] != tuple(shape):
            raise InputError(f"parameter '{name}' has shape {held[name]}, the model's is {tuple(shape)}")
    for given, known in ((solution.params, expected), (solution.codes, expected), (solution.floats, shapes)):
        if extra := sorted(set(given) - set(known)):
            raise InputError(f"the solution has '{extra[0]}', which this model has no place for")
