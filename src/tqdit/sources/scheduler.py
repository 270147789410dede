"""Find the scheduler config of a diffusers folder, and check that a sampler serves it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdit.architectures.dit_checkpoint import DIFFUSION
from tqdit.architectures.sit_checkpoint import SCHEDULER as FLOW
from tqdit.architectures.sit_checkpoint import TIME
from tqdit.architectures.timestep import changed
from tqdit.errors import AssumptionWarning, InputError
from tqdit.sampling.schedules import check_scheduler, family
from tqdit.sources.components import PIPELINE, class_named
from tqdit.system.files import is_there, read_json

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
        taken, said = DIFFUSION, "DiT's is taken: DDIM, 1000 linear betas from 1e-4 to 0.02, epsilon"
        if changed(model) == TIME:
            taken, said = FLOW, "SiT's is taken: flow matching on the linear path"
        warnings.warn(f"{path.parent.parent} has no scheduler; {said}", AssumptionWarning, stacklevel=3)
        return dict(taken)
    try:
        check_scheduler(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config
