"""Quantize any transformer of diffusers from the calls that a pipeline made to it.

with tqdit.record(pipe) as calls:
    pipe("a lighthouse at dusk", num_inference_steps=28)
pipe.transformer = tqdit.quantize(pipe.transformer, tqdit.Recipe("plus", "w8a8"), calls=calls)
"""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures.registry import plain_config
from tqdit.architectures.traced_graph import trace
from tqdit.architectures.tracing import eager
from tqdit.architectures.untraced import untraced_graph
from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import pipeline_card, traced_card, write_card
from tqdit.calibration import replay
from tqdit.calibration.called import in_eval_mode, place_of, same_module
from tqdit.calibration.calls import Calls
from tqdit.calibration.pipeline_calls import Recording, read_calls
from tqdit.errors import InputError
from tqdit.plan import needs_records
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Device, Target, checked_device, checked_dtype
from tqdit.search import solver
from tqdit.search.direct import direct_solution
from tqdit.sources import any_class, saving
from tqdit.sources.in_memory import check_float, check_transformer, name_of
from tqdit.sources.origin import made_from
from tqdit.sources.resolve import found_folder
from tqdit.sources.traced_summary import FolderSummary, TransformerSummary, summarize
from tqdit.spec import Solution
from tqdit.stages import Report, check_recipe, silent
from tqdit.system.environment import environment, peak_memory_bytes
from tqdit.system.isolation import isolated
from tqdit.system.outputs import check_target, replacing
from tqdit.system.validation import check_flags, check_paths, check_report

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

    `calls`: what `record` yields, its file, or the keyword arguments of calls (see
    `calibration.pipeline_calls.read_calls`); None for a recipe that needs no calibration, such as the preset "dynamic".
    The model is calibrated where it is and in its own dtype, and is left as it was. `device`, `dtype`: of the integer
    model, by default those of the float one. `out`: an artifact folder that is written too.
    Raises `InputError` for calls of another model, and before any work for a model that is quantized, has adapters or
    is offloaded, and for an `out` that cannot be written.
    """
    check_recipe(recipe)
    check_flags(overwrite=overwrite)
    check_report(report)
    check_paths(out=out)
    check_transformer(model)
    model = same_module(model)
    check_float(model)
    where = next(model.parameters()).device if device is None else device
    target, wanted = Target(backend, where), None if dtype is None else checked_dtype(dtype)
    if out is not None:
        check_target(Path(out), overwrite)
    with in_eval_mode(model), eager(model):
        solution = solution_of(model, recipe, calls, report)
    if out is not None:
        saving.save_traced(solution, Path(out), overwrite)
    return convert(solution, target.backend, target.device, wanted)


@isolated()
def quantize_folder(
    model: str | Path,
    out: str | Path,
    recipe: Recipe = Recipe(),
    *,
    calls: Any = None,
    device: Device = "auto",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> FolderSummary:
    """Quantize the transformers of a folder or of a Hub's model, of any class, into the folder `out`.

    A pipeline becomes a pipeline: its other parts are copied, weights by hard links where the disk allows it. A
    transformer's folder becomes one. The artifact has seals of its transformers alone, since hashing text encoders
    would take as long as loading them. `calls`: as in `quantize_recorded`; a recording has calls for each transformer.
    `dtype`: of the float model during calibration, by default as stored.
    Raises `InputError` as `quantize_recorded` does; then nothing is written.
    """
    check_recipe(recipe)
    check_flags(overwrite=overwrite)
    check_report(report)
    out, where, started = Path(out), checked_device(device), time.perf_counter()
    wanted = None if dtype is None else checked_dtype(dtype)
    check_target(out, overwrite)
    source = any_class.find(found_folder(model))
    if needs_records(recipe) and calls is None:
        raise InputError(_needs_calls(recipe))
    recording = Recording.load(calls) if isinstance(calls, str | Path) else calls
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    with replacing(out, overwrite) as folder:
        source.copy_components(folder)
        parts = []
        for component, place in source.folders.items():
            report(f"loading {component}", 0.0)
            module = any_class.load_transformer(place)
            digest = weights_sha256(module)  # of the weights as stored, whatever the calibration runs in
            if wanted is not None and module.dtype is not wanted:
                del module  # a model in both dtypes may not fit in memory
                module = any_class.load_transformer(place, wanted)
            module.to(where)
            given = None if recording is None else _calls_of(recording, component, module, source.folders)
            solution = solution_of(module, recipe, given, report, (source.name, digest))
            inside = Path() if source.index is None else Path(component)
            (folder / inside).mkdir(exist_ok=True)
            parts.append(_written(component, solution, folder / inside, out / inside, given))
            del module, solution
        if source.index is not None:
            write_card(folder, _pipeline_card(source, recipe, parts), out)
    return FolderSummary(
        source.name, recipe.label, recipe.bits, tuple(parts), time.perf_counter() - started, peak_memory_bytes(),
        torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None, environment(str(where)),
    )  # fmt: skip


def _calls_of(recording: Any, component: str, module: nn.Module, components: Iterable[str]) -> Calls:
    """Return the calls of a component: by its name if the recording has it, else those that suit the model.

    `components`: of the pipeline. Raises `InputError` for a component without calls beside one that has some: they may
    suit both, but be of other times.
    """
    if isinstance(recording, Recording) and component in recording:
        return read_calls(recording[component], module)
    try:
        if isinstance(recording, Recording) and (others := [name for name in components if name in recording]):
            raise InputError(f"the recording has calls of {', '.join(others)} alone; record more steps or times")
        return read_calls(recording, module)
    except InputError as error:
        raise InputError(f"{component}: {error}") from None


def _written(component: str, solution: Solution, folder: Path, former: Path, calls: Calls | None) -> TransformerSummary:
    """Write a transformer's artifact into a folder of its own, which will replace `former`."""
    artifact.write(solution, folder)
    size = artifact.size_bytes(folder)
    write_card(folder, traced_card(solution, size), former)
    used = solution.provenance.calibration_sha256 is not None and calls is not None
    recipe = solution.provenance.recipe
    kept = calls.thinned(recipe["samples"], recipe["groups"], recipe["seed"]) if used and calls is not None else ()
    return summarize(component, solution, size, len(kept))


def _pipeline_card(source: any_class.Transformers, recipe: Recipe, parts: Sequence[TransformerSummary]) -> str:
    """Return the card of a pipeline; its transformers have cards of their own."""
    kind = (source.index or {}).get("_class_name")
    facts = {"made from": source.name, "preset": recipe.label}
    for part in parts:
        size = f"{part.size_bytes / 1e6:.2f} MB, {part.size_ratio_bfloat16:.3f} of bf16"
        facts[part.component] = (
            f"{part.kind}, {size}: {part.integer} linear layers in integers, {part.weight_only} with integer weights "
            f"alone, {sum(part.left.values())} in float"
        )
    return pipeline_card(source.name, facts, kind if isinstance(kind, str) else "DiffusionPipeline", recipe.bits)


def _needs_calls(recipe: Recipe) -> str:
    return (
        f'the recipe "{recipe.label}" is calibrated from recorded calls: give calls, which tqdit.record(pipe) yields, '
        'or the recipe "dynamic", which needs none'
    )


def solution_of(
    model: nn.Module, recipe: Recipe, calls: Any, report: Report = silent, source: tuple[str, str] | None = None
) -> Solution:
    """Return the solution of a model for its recorded calls, or without calls under a recipe that needs none.

    `source`: the name and the hash of the float model, by default where it was loaded from, and `weights_sha256`.
    """
    name, digest = source or (name_of(model), weights_sha256(model))
    provenance = made_from(name, digest, recipe)
    if not needs_records(recipe):
        graph = untraced_graph(model) if calls is None else traced_graph(model, read_calls(calls, model))
        return direct_solution(model, graph, recipe, provenance)
    if calls is None:
        kind = type(model).__name__
        other = f"; without calls a {kind} needs scheduler=..., such as pipe.scheduler"
        raise InputError(_needs_calls(recipe) + (other if any_class.has_own_samples(kind) else ""))
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
    device, dtype = place_of(model)
    return trace(model, calls[0].to(device, dtype), calls.timestep)


def weights_sha256(model: nn.Module) -> str:
    """Return the sha256 of a model's state dict, by name, dtype and value, and of its config."""
    digest = hashlib.sha256(repr(sorted(_plain(plain_config(model)).items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in config.items()}
