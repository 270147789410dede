"""Quantize any transformer of diffusers from the calls that a pipeline made to it.

with tqdit.record(pipe) as calls:
    pipe("a lighthouse at dusk", num_inference_steps=28)
pipe.transformer = tqdit.quantize(pipe.transformer, tqdit.Recipe("plus", "w8a8"), calls=calls)
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures.registry import plain_config
from tqdit.architectures.traced_graph import trace
from tqdit.architectures.untraced import untraced_graph
from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import TRACED_USE, model_card, write_card
from tqdit.calibration import replay
from tqdit.calibration.calls import Calls, read_calls
from tqdit.errors import InputError
from tqdit.plan import needs_records
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Device, Target, checked_dtype
from tqdit.runtime.traced import shape_name
from tqdit.search import solver
from tqdit.search.direct import direct_solution
from tqdit.sources.in_memory import check_transformer
from tqdit.sources.origin import made_from
from tqdit.spec import Solution
from tqdit.stages import Report, check_recipe, silent
from tqdit.system.files import check_target, replacing
from tqdit.system.isolation import isolated
from tqdit.system.validation import check_flags

CALLS = "calls_sha256"  # an entry of provenance beside those that every artifact has


@isolated()
def quantize_recorded(  # noqa: PLR0913 - options
    model: nn.Module,
    recipe: Recipe = Recipe(),
    *,
    calls: Any = None,
    backend: str = "auto",
    device: Device | None = None,
    dtype: str | torch.dtype | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> nn.Module:
    """Quantize a diffusers transformer of any class; returns the integer model, which is called as the float one.

    `calls`: what `record` yields, its file, or the keyword arguments of calls (see `calibration.calls.read_calls`);
    None for a recipe that needs no calibration, such as the preset "dynamic". The model is calibrated where it is and
    in its own dtype, and is left as it was. `device`, `dtype`: of the integer model, by default those of the float one.
    `out`: an artifact folder that is written too.
    Raises `InputError` for calls of another model, and before any work for an `out` that cannot be written.
    """
    check_recipe(recipe)
    check_flags(overwrite=overwrite)
    check_transformer(model)
    where = next(model.parameters()).device if device is None else device
    target, wanted = Target(backend, where), None if dtype is None else checked_dtype(dtype)
    if out is not None:
        check_target(Path(out), overwrite)
    solution = solution_of(model, recipe, calls, report)
    if out is not None:
        save_traced(solution, Path(out), overwrite)
    return convert(solution, target.backend, target.device, wanted)


def solution_of(model: nn.Module, recipe: Recipe, calls: Any, report: Report = silent) -> Solution:
    """Return the solution of a model for its recorded calls, or without calls under a recipe that needs none."""
    if hasattr(model, "solution"):
        raise InputError("the model is already quantized; give the float model")
    name = str(plain_config(model).get("_name_or_path") or type(model).__name__)
    provenance = made_from(name, weights_sha256(model), recipe)
    if not needs_records(recipe):
        graph = untraced_graph(model) if calls is None else traced_graph(model, read_calls(calls, model))
        return direct_solution(model, graph, recipe, provenance)
    if calls is None:
        raise InputError(
            f'the recipe "{recipe.label}" is calibrated from recorded calls: give calls=..., which tqdit.record(pipe) '
            'yields, or the recipe Recipe("dynamic")'
        )
    found = read_calls(calls, model)
    return _solved(model, recipe, found.thinned(recipe.samples, recipe.groups, recipe.seed), provenance, report)


def _solved(model: nn.Module, recipe: Recipe, calls: Calls, provenance: Provenance, report: Report) -> Solution:
    graph, groups = traced_graph(model, calls), calls.time_groups(recipe.groups)
    report("statistics", 0.0)
    records = replay.record(model, graph, calls, groups, recipe, partial(report, "statistics"))
    report("search", 0.0)
    made = replace(provenance, calibration_sha256=calls.sha256)
    return solver.solve(model, records, recipe, groups, made, partial(report, "search"), graph=graph)


def traced_graph(model: nn.Module, calls: Calls) -> Any:
    """Return the graph of a model, traced from its first call."""
    parameter = next(model.parameters())
    return trace(model, calls[0].to(parameter.device, parameter.dtype), calls.timestep)


def save_traced(solution: Solution, out: Path, overwrite: bool = False) -> None:
    """Write the artifact of a traced model's solution, as a whole or not at all."""
    with replacing(out, overwrite) as folder:
        artifact.write(solution, folder)
        size = artifact.size_bytes(folder)
        write_card(folder, model_card(solution, shape_name(solution), size, draw=TRACED_USE), out)


def weights_sha256(model: nn.Module) -> str:
    """Return the sha256 of a model's state dict, by name, dtype and value, and of its config."""
    digest = hashlib.sha256(repr(sorted(_plain(plain_config(model)).items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in config.items()}
