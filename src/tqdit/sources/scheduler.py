"""Find the scheduler config of a diffusers folder, and check that a sampler and an artifact's time groups serve it."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdit.architectures.dit_checkpoint import DIFFUSION
from tqdit.architectures.sit_checkpoint import SCHEDULER as FLOW
from tqdit.architectures.sit_checkpoint import TIME
from tqdit.architectures.timestep import changed
from tqdit.errors import AssumptionWarning, InputError
from tqdit.sampling.schedules import check_scheduler, family
from tqdit.sources.components import PIPELINE, class_named
from tqdit.sources.source import ModelSource
from tqdit.system.files import is_there, read_json
from tqdit.timegroups import TimeGroups

SCHEDULER = Path("scheduler", "scheduler_config.json")


def find_scheduler(path: Path, index: Mapping[str, Any] | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler config at `path`, checked; DiT's or SiT's with an `AssumptionWarning` where there is none.

    `index`: a pipeline's model_index.json, whose class counts where the config names none. `model`: the transformer's
    config, which says whether the model is a converted SiT. Raises `InputError` that names the file, for a scheduler
    that no sampler serves, and for a missing config of a flow-matching pipeline.
    """
    config = read_json(path) if is_there(path) else None
    named = class_named(index, "scheduler")
    if named is not None and "_class_name" not in (config or {}):
        try:
            process = family({"_class_name": named})
        except InputError as error:
            raise InputError(f"{path.parent.parent / PIPELINE}: {error}") from None
        if process is not family(None):  # a config without a class would mean another process
            if config is None:
                raise InputError(f"{path} is missing; {PIPELINE} names a {named}, whose shift nothing else says")
            config = {"_class_name": named, **config}
    if config is None:
        taken, said = assumed(model), "DiT's is taken: DDIM, 1000 linear betas from 1e-4 to 0.02, epsilon"
        if taken is FLOW:
            said = "SiT's is taken: flow matching on the linear path"
        warnings.warn(f"{path.parent.parent} has no scheduler; {said}", AssumptionWarning, stacklevel=3)
        return dict(taken)
    try:
        check_scheduler(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def assumed(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the scheduler config that is taken for a model's config where none lies beside the model."""
    return FLOW if changed(model) == TIME else DIFFUSION


def check_timesteps(groups: TimeGroups, source: ModelSource, artifact: str) -> None:
    """Raise `InputError` unless time groups cover exactly the timesteps of the scheduler of `source`.

    The scheduler is the one that is assumed if `source` has none. `artifact`: what has the groups, for the message.
    """
    with_scheduler = source if source.scheduler else replace(source, scheduler=assumed(source.config))
    low, high, closed = with_scheduler.time_range
    found, expected = groups.interval, TimeGroups((), low, high, closed).interval
    if found == expected:
        return
    if not source.scheduler:
        raise InputError(f"{artifact} has timesteps in {found}; give its scheduler, since {expected} would be assumed")
    name = source.scheduler.get("_class_name", DIFFUSION["_class_name"])
    raise InputError(f"{artifact} has timesteps in {found}, the {name} of '{source.name}' has {expected}")
