"""Whether a Solution is one of its model: every site and parameter is there, and what the kernels take it for.

The kernels index scales by head and channel, and choose their arithmetic by grid, without looking again. Nothing is
built or allocated before the file has been found to hold as much as its config says.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tqdit.architectures.building import empty_model
from tqdit.architectures.shapes import width
from tqdit.architectures.sites import ARCHITECTURE, BlockLayout, blocks, check_supported, sites
from tqdit.artifact import folder as artifact
from tqdit.artifact.tensors import decisive
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.spec import MAX_BITS, MIN_BITS, Granularity, Grid, GridParams, Role, SiteSpec, Solution

LEAST_ACTIVATION_BITS = 4
PATCHES = "pos_embed.proj.weight"
GRIDS = {Role.SOFTMAX: (Grid.MRQ_SOFTMAX, Grid.UNIFORM), Role.GELU: (Grid.MRQ_GELU, Grid.UNIFORM)}  # else uniform
PER_CHANNEL = Recipe("paper", groups=1, weight_granularity="per_channel")  # for the number of channels
FIELDS = ("role", "grid", "granularity", "groups", "units")


def read(folder: Path, root: Path | None = None) -> Solution:
    """Call `artifact.read`, and `check_solution` of what it found. Raises `InputError` that names the folder."""
    solution = artifact.read(folder, root)
    try:
        check_solution(solution)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    return solution


def check_solution(solution: Solution) -> None:
    """Raise `InputError` that names the site and the field, or the parameter, that a model of this config cannot have.

    What a recipe may choose is free for every site: bits, time groups or none, MRQ or uniform after softmax and GELU,
    one scale per weight or per output channel.
    """
    config = solution.model_config
    check_supported(config)
    _check_sizes(config, solution)
    expected = {spec.name: spec for spec in sites(config, PER_CHANNEL)}
    for name, spec in expected.items():
        if name not in solution.params:
            kind = "codes for weight" if spec.is_weight else "parameters for activation"
            raise InputError(f"the solution has no {kind} site '{name}'")
        _check_site(solution, solution.params[name].spec, spec)
    _check_parameters(solution, expected)


def _check_sizes(config: Mapping[str, Any], solution: Solution) -> None:
    """That the config's numbers are no larger than what the solution holds."""
    if (layers := config["num_layers"]) > len(solution.params):
        raise InputError(f"the config has num_layers = {layers}, the solution has sites of fewer blocks")
    if PATCHES not in solution.codes:
        raise InputError(f"the solution has no codes for weight site '{PATCHES}'")
    side = config["patch_size"]
    _check_shape(PATCHES, solution.codes, (width(config), config["in_channels"], side, side))


def _check_site(solution: Solution, found: SiteSpec, expected: SiteSpec) -> None:
    """Compare with what the model needs, field by field."""
    legal: dict[str, tuple[Any, ...]] = {field: (getattr(expected, field),) for field in FIELDS}
    if expected.role in GRIDS:
        legal["grid"] = GRIDS[expected.role]
    if not expected.is_weight:
        legal["groups"] = (1, solution.time_groups.num_groups)
    if expected.role is Role.WEIGHT:
        legal["granularity"] = (Granularity.PER_TENSOR, Granularity.PER_CHANNEL)
        legal["units"] = (1 if found.granularity is Granularity.PER_TENSOR else expected.units,)
    legal["bits"] = tuple(range(MIN_BITS if expected.is_weight else LEAST_ACTIVATION_BITS, MAX_BITS + 1))
    for field, values in legal.items():
        if (value := getattr(found, field)) not in values:
            named = " or ".join(map(str, values))
            raise InputError(f"site '{expected.name}' has {field} {value}; its model needs {named}")
    _check_shapes_of_params(solution.params[expected.name])


def _check_shapes_of_params(params: GridParams) -> None:
    found = params.spec
    if (params.zero_point is None) != (found.is_weight or found.grid.two_region):
        raise InputError(f"site '{found.name}' has {'no' if params.zero_point is None else 'a'} zero_point")
    shape = (found.groups, found.units, 2) if found.grid.two_region else (found.groups, found.units)
    for what, tensor in (("scale", params.scale), ("zero_point", params.zero_point)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"site '{found.name}' has a {what} of shape {tuple(tensor.shape)}, not {shape}")


def _check_parameters(solution: Solution, expected: Mapping[str, SiteSpec]) -> None:
    """Every parameter of the model is there in its shape, as codes or in float, and nothing else is."""
    shapes = _parameter_shapes(solution.model_config)
    for name, shape in shapes.items():
        held = solution.codes if name in expected else solution.floats
        if name not in held:
            raise InputError(f"the solution has no value for parameter '{name}'")
        _check_shape(name, held, shape)
    for given, known in ((solution.params, expected), (solution.codes, expected), (solution.floats, shapes)):
        if extra := sorted(set(given) - set(known)):
            raise InputError(f"the solution has '{extra[0]}', which this model has no place for")


def _parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name. Blocks are alike."""
    inside = BlockLayout(0).prefix + "."
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _with_one_block(json.dumps(decisive(config))).items():
        if name.startswith(inside):
            rest = name.removeprefix(inside)
            shapes |= {f"{block.prefix}.{rest}": shape for block in blocks(config)}
        else:
            shapes[name] = shape
    return shapes


@lru_cache(maxsize=16)  # a model takes 20 ms
def _with_one_block(config: str) -> Mapping[str, tuple[int, ...]]:
    """Parameters and shapes of an empty model of one block and one patch. `config` is JSON."""
    values = json.loads(config)
    small = {"_class_name": ARCHITECTURE, "num_layers": 1, "sample_size": values["patch_size"]}
    return {name: tuple(parameter.shape) for name, parameter in empty_model(values | small).named_parameters()}


def _check_shape(name: str, held: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    """Compare with the shape of the tensor `name` of `held`; the codes of a model's layers need not be unpacked."""
    shape_of = getattr(held, "shape_of", None)
    found = tuple(held[name].shape if shape_of is None else shape_of(name))
    if found != shape:
        raise InputError(f"parameter '{name}' has shape {found}, the model's is {shape}")
