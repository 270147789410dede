"""The stages of a quantization, one function each: states, records, a solution, a model, an artifact.

    states = tqdit.calibration_states(transformer, recipe, scheduler=pipe.scheduler)    # or states of your own
    records = tqdit.calibrate(transformer, states, recipe)
    solution = tqdit.solve(transformer, records, recipe)
    model = tqdit.convert(solution)
    tqdit.save(solution, "w8a8", scheduler=pipe.scheduler)

They take diffusers transformers that are in memory, and leave them as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures.registry import config_of, sample
from tqdit.calibration import recorder, trajectories
from tqdit.calibration.records import Records
from tqdit.calibration.states import CalibrationSet, check_labels, states_sha256
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.runtime import convert as runtime
from tqdit.runtime.target import Device, Dtype, Target
from tqdit.sampling.guidance import Conditions
from tqdit.sampling.prompts import read_conditions
from tqdit.sampling.schedules import scheduler_config
from tqdit.search import solver
from tqdit.sources import saving
from tqdit.sources.conditions import hash_of, suitable
from tqdit.sources.in_memory import float_copy, source_in_memory
from tqdit.sources.labels import checked_labels
from tqdit.sources.origin import made_from
from tqdit.sources.resolve import weights_hash
from tqdit.sources.source import ModelSource
from tqdit.spec import Solution
from tqdit.system.isolation import isolated
from tqdit.system.validation import check_flags

Report = Callable[[str, float], None]  # (stage, finished fraction)
OTHER_SETTINGS = "the recipe's calibration settings are not those the records were made with (hessian is one of them)"


def silent(stage: str, fraction: float) -> None:
    """Report no progress."""


@isolated()
def calibration_states(
    transformer: nn.Module,
    recipe: Recipe = Recipe(),
    *,
    scheduler: Any,
    conditions: Conditions | str | Path | None = None,
    device: Device | None = None,
    report: Report = silent,
) -> CalibrationSet:
    """Draw the states that a transformer is calibrated on, from its own guided sampling.

    `scheduler`: one of diffusers, or its config. `conditions`: the prompts of a model of prompts (`Prompts`), or the
    model's own classes by default. `device`: where the transformer is, by default.
    """
    check_recipe(recipe)
    module = float_copy(transformer, _device(device))
    process = scheduler_config(scheduler)
    asked = suitable(config_of(module), read_conditions(conditions))
    return trajectories.collect(module, process, recipe, partial(report, "trajectories"), conditions=asked)


@isolated()
def calibrate(
    transformer: nn.Module,
    states: CalibrationSet,
    recipe: Recipe = Recipe(),
    *,
    device: Device | None = None,
    report: Report = silent,
) -> Records:
    """Run a transformer over states, forward and backward, and record what `solve` has to know of every matmul.

    Raises `InputError` for states of other time groups than the recipe's, or of too few for its `samples`.
    """
    check_recipe(recipe)
    if not isinstance(states, CalibrationSet):
        raise InputError(f"states are a CalibrationSet, got {type(states).__name__}")
    _check_groups(states, recipe)
    module = float_copy(transformer, _device(device))
    asked = suitable(config_of(module), states.conditions)
    check_labels(states.labels, asked)
    _check_shape(states, module)
    states = replace(states, conditions=asked)
    records = recorder.record(module, states, recipe, partial(report, "statistics"))
    return replace(
        records,
        recipe=recipe,
        time_groups=states.time_groups,
        states_sha256=states_sha256(states),
        source_sha256=weights_hash(module),
        conditions_sha256=hash_of(config_of(module), asked),
    )


@isolated()
def solve(
    transformer: nn.Module,
    records: Records,
    recipe: Recipe = Recipe(),
    *,
    device: Device | None = None,
    report: Report = silent,
) -> Solution:
    """Choose the grid and scales of every operand, and the codes of every weight.

    Records serve several recipes, whose calibration settings must be those of `calibrate`. Raises `InputError` for
    records of other settings or of another model.
    """
    check_recipe(recipe)
    if not isinstance(records, Records):
        raise InputError(f"records are what calibrate returns, got {type(records).__name__}")
    if records.recipe is None or records.time_groups is None or not recipe.records_match(records.recipe):
        raise InputError(OTHER_SETTINGS)
    source, module = source_in_memory(transformer), float_copy(transformer, _device(device))
    source_hash = weights_hash(module)
    if source_hash != records.source_sha256:
        raise InputError("the records are of other weights than the transformer's; give the model that calibrate had")
    made = made_from(source.name, source_hash, recipe, records.conditions_sha256)
    provenance = replace(made, calibration_sha256=records.states_sha256)
    return solver.solve(module, records, recipe, records.time_groups, provenance, partial(report, "search"))


@isolated()
def convert(
    solution: Solution, *, backend: str = "auto", device: Device = "auto", dtype: Dtype = "float32"
) -> nn.Module:
    """Make a diffusers transformer that runs on the codes of a solution. The options are those of `load`."""
    if not isinstance(solution, Solution):
        raise InputError(f"a solution is what solve returns, got {type(solution).__name__}")
    target = Target(backend, device, dtype)
    return runtime.convert(solution, target.backend, target.device, target.dtype)


@isolated()
def save(
    solution: Solution | nn.Module,
    out: str | Path,
    *,
    scheduler: Any = None,
    labels: Mapping[int, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a solution, or the integer model of one, as an artifact folder; all or nothing.

    `scheduler`: one of diffusers, or its config, for `sample` to find; `labels`: class names by number. Both are for
    DiT and PixArt: the artifact of a traced model is its transformer alone.
    Raises `InputError` for a model whose scales or biases are no longer those it was converted from, for a scheduler of
    other timesteps than the solution's, and where the solution needs a scheduler and none is given.
    """
    check_flags(overwrite=overwrite)
    found = getattr(solution, "solution", solution)
    if not isinstance(found, Solution):
        raise InputError(f"save takes a solution or an integer model, got a {type(solution).__name__}")
    if isinstance(solution, nn.Module):
        cast(Any, found.codes).check_unchanged(found)
    if found.graph is not None:
        _save_traced(found, Path(out), scheduler, labels, overwrite)
        return
    name, config = found.provenance.source or "", {} if scheduler is None else scheduler_config(scheduler)
    source = ModelSource(name, Path(), found.model_config, config, checked_labels(labels, found.model_config))
    saving.save(found, source, Path(out), overwrite)


def _save_traced(
    solution: Solution, out: Path, scheduler: Any, labels: Mapping[int, str] | None, overwrite: bool
) -> None:
    if scheduler is not None or labels is not None:
        raise InputError(
            "the artifact of a traced model is its transformer alone, without scheduler and labels; write the whole "
            "pipeline by its save_pretrained"
        )
    saving.save_traced(solution, out, overwrite)


def _device(device: Device | None) -> torch.device | None:
    return None if device is None else Target(device=device).device


def check_recipe(recipe: Any) -> None:
    """Raise `InputError` for what is no recipe, such as the name of a preset."""
    if not isinstance(recipe, Recipe):
        raise InputError(f'a recipe is a tqdit.Recipe, such as Recipe("plus", "w8a8"), got {type(recipe).__name__}')


def _check_shape(states: CalibrationSet, module: nn.Module) -> None:
    """Raise `InputError` for states of another number of channels than the model's."""
    expected, found = sample(config_of(module)).shape[0], states.x.shape[1]
    if found != expected:
        raise InputError(f"the states have {found} channels, the model takes {expected}")


def _check_groups(states: CalibrationSet, recipe: Recipe) -> None:
    """Raise `InputError` unless every time group of the recipe has as many states as its `samples` say.

    Visited timesteps may be too few for all groups.
    """
    found = states.time_groups.num_groups
    if found > recipe.groups or (found < recipe.groups and recipe.time_edges == "uniform"):
        raise InputError(f"the states have {found} time groups, the recipe {recipe.groups}")
    counts = torch.bincount(states.group, minlength=found)
    if int(counts.min()) < recipe.samples:
        raise InputError(
            f"time group {int(counts.argmin())} of {found} has {int(counts.min())} states, the recipe's "
            f"'samples' asks for {recipe.samples} in each"
        )
