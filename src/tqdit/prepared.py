"""Calibrate a described architecture once and solve it for several recipes; finished pieces may go to a work folder."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from tqdit.architectures.registry import config_of
from tqdit.artifact.tensors import decisive
from tqdit.calibration import recorder, trajectories
from tqdit.calibration.records import Records
from tqdit.calibration.states import states_sha256
from tqdit.calibration.work import STAGES, calibration_settings, stage_store
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.runtime.target import Device, Target
from tqdit.sampling.guidance import Conditions, conditions_sha256
from tqdit.search import solver
from tqdit.sources.conditions import hash_of, suitable
from tqdit.sources.origin import made_from
from tqdit.sources.resolve import weights_hash
from tqdit.sources.source import ModelSource
from tqdit.spec import Solution
from tqdit.stages import OTHER_SETTINGS, Report, silent
from tqdit.system import jobs
from tqdit.system.environment import environment
from tqdit.system.isolation import isolated
from tqdit.timegroups import TimeGroups


@dataclass(frozen=True)
class Prepared:
    """A float model with its calibration records: what several bit-widths can be solved from.

    `work`: the folder that keeps finished pieces for another run, if there is one. Of several processes each has the
    records of its share of the blocks. `conditions_sha256`: None for the model's own classes.
    """

    source: ModelSource
    model: nn.Module
    recipe: Recipe
    time_groups: TimeGroups
    records: Records
    data_hash: str
    source_hash: str
    seconds: float
    work: Path | None = None
    conditions_sha256: str | None = None


def calibrated(
    source: ModelSource,
    module: nn.Module,
    recipe: Recipe,
    *,
    report: Report,
    device: Device,
    work: Path | None = None,
    conditions: Conditions | None = None,
) -> Prepared:
    """Calibrate a model that is loaded; `quantizing.prepare` says what for."""
    source.check_components()
    asked = suitable(source.config, conditions)
    sampling = trajectories.calibration_sampling(recipe, source.scheduler)
    target = Target(device=device).device
    module = module.to(target)
    if work:
        jobs.check_shared(work)
    start = time.perf_counter()
    source_hash = weights_hash(module)
    settings = {"scheduler": source.scheduler, **calibration_settings(recipe), "sampler": sampling.sampler}
    if conditions is not None:
        settings["conditions"] = conditions_sha256(conditions)
    shape = decisive(config_of(module))
    in_bf16 = trajectories.draws_in_bf16(target)
    store = stage_store(work, STAGES[0], source_hash, shape, environment(str(target))["device"], in_bf16, settings)
    data = trajectories.collect(
        module, source.scheduler, recipe, partial(report, "trajectories"), store=store, conditions=asked
    )
    report("statistics", 0.0)
    records = recorder.record(module, data, recipe, partial(report, "statistics"), store=store)
    seconds = time.perf_counter() - start
    conditions_hash = hash_of(source.config, conditions)
    return Prepared(
        source, module, recipe, data.time_groups, records, states_sha256(data), source_hash, seconds, work,
        conditions_hash,
    )  # fmt: skip


@isolated()
def solve_prepared(prepared: Prepared, recipe: Recipe, report: Report = silent) -> tuple[Solution, float]:
    """Search every scale under `recipe`; return the solution and the seconds that the search took.

    The recipe's calibration settings must be those of `prepared`, or an `InputError` says so.
    Inside `distributed.joined` the ranks share the blocks, and each returns the whole solution.
    """
    if not recipe.records_match(prepared.recipe):
        raise InputError(OTHER_SETTINGS)
    start = time.perf_counter()
    made = made_from(prepared.source.name, prepared.source_hash, recipe, prepared.conditions_sha256)
    provenance = replace(made, calibration_sha256=prepared.data_hash)
    # The calibration set's hash and the hardware that made it stand for the records.
    where = next(prepared.model.parameters()).device
    shape = decisive(config_of(prepared.model))
    store = stage_store(prepared.work, STAGES[1], shape, environment(str(where))["device"], provenance.to_json())
    report("search", 0.0)
    solution = solver.solve(
        prepared.model,
        prepared.records,
        recipe,
        prepared.time_groups,
        provenance,
        partial(report, "search"),
        store,
    )
    return solution, time.perf_counter() - start
