"""Quantize a model of a described architecture, which is calibrated on samples that it draws itself.

The model is found by its path or name and becomes an artifact folder, or it is in memory and becomes an integer model.
`recorded.py` does the same for models of any class, on recorded calls.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tqdit.calibration.store import discard
from tqdit.calibration.work import STAGES
from tqdit.prepared import Prepared, calibrated, solve_prepared
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Device, Dtype, Target
from tqdit.sampling.guidance import Conditions
from tqdit.sampling.prompts import read_conditions
from tqdit.sources.conditions import suitable
from tqdit.sources.in_memory import float_copy, source_in_memory
from tqdit.sources.resolve import load_float, resolve
from tqdit.sources.saving import fill, has_left, is_made, least_bytes, save
from tqdit.sources.sizes import float_sizes
from tqdit.sources.summary import Summary, summarize
from tqdit.stages import Report, check_recipe, silent
from tqdit.system import jobs
from tqdit.system.deprecation import formerly_positional
from tqdit.system.distributed import chosen_device
from tqdit.system.isolation import isolated
from tqdit.system.outputs import check_space, check_target, filled
from tqdit.system.validation import check_flags, check_paths, check_report


@isolated()
def prepare(
    model: str | Path,
    recipe: Recipe,
    report: Report = silent,
    device: Device = "auto",
    work: Path | None = None,
    conditions: Conditions | str | Path | None = None,
) -> Prepared:
    """Calibrate a float model: draw its trajectories, then record its activations and Fisher weights.

    With a `work` folder every finished piece goes there, and is not computed again if the same calibration of the same
    model put it there before; the records then take memory only while they are in use. Inside `distributed.joined`
    the ranks share the work; they must see the same `work` folder, or an `InputError` says so.
    """
    check_report(report)
    source, conditions = resolve(model), read_conditions(conditions)
    suitable(source.config, conditions)
    return calibrated(
        source, load_float(source), recipe, report=report, device=device, work=work, conditions=conditions
    )


@formerly_positional("overwrite", "report", "device", "resumable", stacklevel=3, public="quantize")
@isolated()
def quantize_source(
    model: str | Path,
    out: str | Path,
    recipe: Recipe = Recipe(),
    *,
    overwrite: bool = False,
    report: Report = silent,
    device: Device = "auto",
    resumable: bool = False,
    conditions: Conditions | str | Path | None = None,
) -> Summary:
    """Quantize MODEL into the artifact folder `out`. Returns seconds (of this run), peak memory and sizes.

    `resumable`: finished work is kept in the folder `out`.work until the artifact is written. The same call continues
    from there after an interruption and gives the same bytes; another model or recipe starts anew. Inside
    `distributed.joined` the ranks share the work, the first one writes, and the bytes are those of one process.
    `conditions`: the prompts of a model of prompts (`Prompts`, or the path of their file), or the model's own classes
    by default.
    Raises `InputError`, before any work, if another process is writing `out`, and for an `out` that cannot be written.
    """
    check_recipe(recipe)
    check_flags(overwrite=overwrite, resumable=resumable)
    check_report(report)
    out, conditions = Path(out), read_conditions(conditions)
    work = jobs.work_folder(out) if resumable else None
    with jobs.reserved(out) as place:
        perhaps_made = work is not None and not overwrite and has_left(out, work)
        if not perhaps_made:
            check_target(out, overwrite)
        source = resolve(model)
        suitable(source.config, conditions)
        module = load_float(source)
        sizes = float_sizes(source, module)  # hours later the source may be gone
        seconds = 0.0
        if not (perhaps_made and is_made(out, source, module, recipe, conditions)):
            check_target(out, overwrite)
            if place:
                check_space(out, least_bytes(source, module, recipe))
            prepared = calibrated(
                source, module, recipe, report=report, device=device, work=work, conditions=conditions
            )
            solution, search_seconds = solve_prepared(prepared, recipe, report)
            seconds = prepared.seconds + search_seconds
            if place:
                with filled(place, overwrite) as folder:
                    fill(folder, solution, source, out)
        if place and work:
            discard(work, STAGES)
    return summarize(source.name, recipe, sizes, seconds, out, chosen_device(device))


@isolated()
def quantize_module(  # noqa: PLR0913 - options
    model: nn.Module,
    recipe: Recipe = Recipe(),
    *,
    scheduler: Any,
    conditions: Conditions | str | Path | None = None,
    backend: str = "auto",
    device: Device | None = None,
    dtype: Dtype = "float32",
    out: str | Path | None = None,
    labels: Mapping[int, str] | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> nn.Module:
    """Quantize a diffusers transformer; returns the integer model. The float model is left as it is.

    `scheduler`: one of diffusers, or its config, whose sampling makes the calibration states. `conditions`: the prompts
    of a model of prompts, or the model's own classes by default. `device`: where the transformer is, by default.
    `out`: an artifact folder that is written too, with class names `labels`.
    Raises `InputError` as `quantize_source` does.
    """
    check_recipe(recipe)
    check_flags(overwrite=overwrite)
    check_report(report)
    check_paths(out=out)
    device = next(model.parameters()).device if device is None else device
    target, source = Target(backend, device, dtype), source_in_memory(model, scheduler, labels)
    conditions = read_conditions(conditions)
    if out is not None:
        check_target(Path(out), overwrite)
    module = float_copy(model, target.device)
    prepared = calibrated(source, module, recipe, report=report, device=target.device, conditions=conditions)
    solution, _ = solve_prepared(prepared, recipe, report)
    if out is not None:
        save(solution, source, Path(out), overwrite)
    return convert(solution, target.backend, target.device, target.dtype)
