"""Write a solution, and the files that belong to its source, as an artifact folder."""

import contextlib
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tqdit.architectures.registry import architecture, config_of
from tqdit.architectures.shapes import shape_name
from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import (
    LOAD_MODEL,
    LOAD_PIPELINE,
    LOAD_TRANSFORMER,
    keep_edited,
    model_card,
    traced_card,
    write_card,
)
from tqdit.artifact.tensors import decisive
from tqdit.errors import InputError, RepairWarning
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import Conditions
from tqdit.sources.components import PIPELINE
from tqdit.sources.conditions import hash_of, is_prompted
from tqdit.sources.labels import LABELS
from tqdit.sources.origin import made_from
from tqdit.sources.resolve import resolve, weights_hash
from tqdit.sources.scheduler import SCHEDULER, check_timesteps
from tqdit.sources.source import ModelSource
from tqdit.spec import Solution
from tqdit.system import distributed
from tqdit.system.files import TRANSFORMER, write_json
from tqdit.system.isolation import isolated
from tqdit.system.outputs import replacing


@isolated()
def save(solution: Solution, source: ModelSource, out: Path, overwrite: bool = False) -> None:
    """Write an artifact with the scheduler, class names and VAE of its source, as a whole or not at all.

    The artifact of a pipeline is a pipeline. A model card in `out` that people have edited stays as it is.
    Raises `InputError` for a scheduler of other timesteps than the solution's.
    """
    check_timesteps(solution.time_groups, source, "the solution")
    with replacing(out, overwrite) as folder:
        fill(folder, solution, source, out)


def fill(folder: Path, solution: Solution, source: ModelSource, former: Path) -> None:
    """Fill a new folder that will replace `former`."""
    load = LOAD_MODEL
    if source.scheduler:
        write_json(folder / SCHEDULER, source.scheduler)
    source.copy_components(folder)
    if source.pipeline is None:
        if source.labels:
            write_json(folder / LABELS, {str(i): label for i, label in sorted(source.labels.items())})
        artifact.write(solution, folder)  # last, since it seals the folder
    else:
        load = LOAD_TRANSFORMER if source.vae is None else LOAD_PIPELINE
        index = {**source.pipeline, **source.components, TRANSFORMER: ["diffusers", architecture(source.config).name]}
        write_json(folder / PIPELINE, index)
        (folder / TRANSFORMER).mkdir()
        artifact.write(solution, folder / TRANSFORMER)
        keep_edited(folder / TRANSFORMER, former / TRANSFORMER)
        artifact.seal(folder)
    size = artifact.size_bytes(folder)
    kind = (source.pipeline or {}).get("_class_name")
    kind = kind if isinstance(kind, str) else None  # a list names a class of the pipeline's own code
    prompted = is_prompted(solution.model_config)
    text = model_card(solution, shape_name(solution.model_config), size, source.name, load, kind, prompted=prompted)
    write_card(folder, text, former)


def save_traced(solution: Solution, out: Path, overwrite: bool = False) -> None:
    """Write the artifact of a traced model's solution, its transformer alone, as a whole or not at all."""
    with replacing(out, overwrite) as folder:
        artifact.write(solution, folder)
        write_card(folder, traced_card(solution, artifact.size_bytes(folder)), out)


def least_bytes(source: ModelSource, module: nn.Module, recipe: Recipe) -> int:
    """Return about as many bytes as an artifact takes on the disk, or fewer: weight codes and the decoder."""
    twin = architecture(source.config).twin  # tensors that blocks share are stored once
    counts = {twin(name): parameter.numel() for name, parameter in module.named_parameters()}
    decoder = source.vae.rglob("*.safetensors") if source.vae else ()
    return sum(counts.values()) * recipe.weight_bits // 8 + sum(file.stat().st_size for file in decoder)


def has_left(out: Path, work: Path) -> bool:
    """Say whether there are both an output and work for it. The first of several processes looks for all of them."""
    world = distributed.current()
    return bool(world.add(torch.tensor([int(world.first and work.is_dir() and out.is_dir())])))


def is_made(
    out: Path, source: ModelSource, module: nn.Module, recipe: Recipe, conditions: Conditions | None = None
) -> bool:
    """Say whether the artifact of this very run is already there, left by a run that was killed at its very end.

    The first of several processes looks for all of them. A `RepairWarning` says that the artifact is there and whole.
    """
    world, made = distributed.current(), False
    if world.first:
        expected = made_from(source.name, weights_hash(module), recipe, hash_of(source.config, conditions))
        with contextlib.suppress(InputError):
            found = resolve(out)
            solution = artifact.read(found.folder, found.root)
            calibrated = replace(expected, calibration_sha256=solution.provenance.calibration_sha256)
            same = solution.provenance == calibrated
            same = same and decisive(solution.model_config) == decisive(config_of(module))
            made = same and (found.scheduler, found.labels) == (source.scheduler, source.labels)
    if made := bool(world.add(torch.tensor([int(made)]))):
        warnings.warn(f"{out} was finished by a run that was interrupted afterwards", RepairWarning, stacklevel=3)
    return made
