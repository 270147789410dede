"""The stages in order, one function each; no mathematics. The command line and the Python API are these functions."""

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures.registry import architecture, config_of
from tqdit.architectures.shapes import shape_name
from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import LOAD_MODEL, LOAD_PIPELINE, LOAD_TRANSFORMER, keep_edited, model_card, write_card
from tqdit.artifact.tensors import decisive
from tqdit.calibration import trajectories
from tqdit.calibration.recorder import record
from tqdit.calibration.records import Records
from tqdit.calibration.store import HASH_DIGITS, Store, WorkFolder, discard
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.errors import InputError, RepairWarning
from tqdit.imaging import images
from tqdit.imaging.images import BATCH, Images
from tqdit.ops.dispatch import get_backend, kernel_name
from tqdit.provenance import Provenance
from tqdit.recipe import CALIBRATION_SETTINGS, Recipe
from tqdit.runtime import fitting
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.schedules import schedule
from tqdit.search.solver import solve
from tqdit.sources.resolve import (
    LABELS,
    PIPELINE,
    SCHEDULER,
    ModelSource,
    class_indices,
    load_float,
    resolve,
    weights_hash,
)
from tqdit.sources.sizes import FloatSizes, float_sizes
from tqdit.spec import Solution
from tqdit.system import distributed, jobs
from tqdit.system.environment import environment, peak_memory_bytes, versions
from tqdit.system.files import (
    TRANSFORMER,
    check_space,
    check_target,
    filled,
    replacing,
    write_json,
)
from tqdit.system.isolation import isolated
from tqdit.timegroups import TimeGroups

STAGES = ("calibration", "search")  # whose finished work may be kept
PIECES = 4  # raised where a change makes other pieces of the same settings, so that no former run is continued
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Device = str | torch.device
Dtype = str | torch.dtype
Report = Callable[[str, float], None]  # (stage, finished fraction)


def silent(stage: str, fraction: float) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Prepared:
    """A float model with its calibration records: what several bit-widths can be solved from.

    `work`: the folder that keeps finished pieces for another run, if there is one. Of several processes each has the
    records of its share of the blocks.
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


@isolated()
def load(model: str | Path, backend: str = "auto", device: Device = "auto", dtype: Dtype = "float32") -> nn.Module:
    """A runnable transformer: an artifact in integers on `backend`, anything else in fp32.

    `device`: "auto" is a GPU where there is one, else the CPU. `dtype`: float32 or bfloat16 (or torch's own), of an
    artifact's residual stream.
    """
    return load_source(resolve(model), backend, device, dtype)


@isolated()
def load_source(
    source: ModelSource, backend: str = "auto", device: Device = "auto", dtype: Dtype = "float32"
) -> nn.Module:
    """`load` of a model that is found already."""
    target, stream = checked_device(device), checked_dtype(dtype)
    if source.quantized:
        return convert(fitting.read(source.folder, source.root), backend, target, stream)
    if stream is not torch.float32:
        raise InputError(
            f"'{source.name}' is a float model and runs in float32; dtype '{dtype_name(stream)}' is for artifacts"
        )
    if backend != "auto":
        get_backend(backend, target)  # a name that is unknown is unknown for any model
        raise InputError(f"'{source.name}' is a float model, which torch runs; backend '{backend}' is for artifacts")
    return load_float(source).to(target)


@isolated()
def prepare(
    model: str | Path, recipe: Recipe, report: Report = silent, device: Device = "auto", work: Path | None = None
) -> Prepared:
    """Calibration: trajectories of the float model, then its activations and Fisher weights.

    With a `work` folder every finished piece goes there, and is not computed again if the same calibration of the same
    model put it there before; the records then take memory only while they are in use. Inside `distributed.joined`
    the ranks share the work; they must see the same `work` folder, or an `InputError` says so.
    """
    source = resolve(model)
    return _calibrated(source, load_float(source), recipe, report, device, work)


def _calibrated(
    source: ModelSource, module: nn.Module, recipe: Recipe, report: Report, device: Device, work: Path | None
) -> Prepared:
    """`prepare` of a model that is loaded already."""
    source.check_components()
    sampling = trajectories.calibration_sampling(recipe, source.scheduler)
    groups = trajectories.time_groups(schedule(source.scheduler, sampling, source.config), recipe)
    target = checked_device(device)
    module = module.to(target)
    if work:
        jobs.check_shared(work)
    start = time.perf_counter()
    source_hash = weights_hash(module)
    settings = {"scheduler": source.scheduler, **_calibration_settings(recipe)}
    shape = decisive(config_of(module))
    states_in_bf16 = trajectories.draws_in_bf16(target)
    store = _store(work, STAGES[0], source_hash, shape, environment(str(target))["device"], states_in_bf16, settings)
    data = trajectories.collect(module, source.scheduler, recipe, lambda f: report("trajectories", f), store=store)
    report("statistics", 0.0)
    records = record(module, data, recipe, lambda f: report("statistics", f), store=store)
    seconds = time.perf_counter() - start
    return Prepared(source, module, recipe, groups, records, _data_hash(data), source_hash, seconds, work)


@isolated()
def solve_prepared(prepared: Prepared, recipe: Recipe, report: Report = silent) -> tuple[Solution, float]:
    """Search every scale under `recipe`, whose calibration settings are those of `prepared`; also the seconds.

    Inside `distributed.joined` the ranks share the blocks, and each returns the whole solution.
    """
    if not recipe.records_match(prepared.recipe):
        raise InputError("the recipe's calibration settings are not those the records were made with")
    start = time.perf_counter()
    made_from = _made_from(prepared.source, prepared.source_hash, recipe)
    provenance = replace(made_from, calibration_sha256=prepared.data_hash)
    # The calibration set's hash and the hardware that made it stand for the records.
    where = next(prepared.model.parameters()).device
    shape = decisive(config_of(prepared.model))
    store = _store(prepared.work, STAGES[1], shape, environment(str(where))["device"], provenance.to_json())
    report("search", 0.0)
    solution = solve(
        prepared.model,
        prepared.records,
        recipe,
        prepared.time_groups,
        provenance,
        lambda f: report("search", f),
        store,
    )
    return solution, time.perf_counter() - start


@isolated()
def save(solution: Solution, source: ModelSource, out: Path, overwrite: bool = False) -> None:
    """Write an artifact with the scheduler, class names and VAE of its source; all or nothing. A pipeline stays one.

    A model card that people have edited in `out` stays as it is.
    """
    with replacing(out, overwrite) as folder:
        _write(solution, source, folder, out)


def _write(solution: Solution, source: ModelSource, folder: Path, former: Path) -> None:
    """Fill a new folder that will replace `former`."""
    load = LOAD_MODEL
    write_json(folder / SCHEDULER, source.scheduler)
    source.copy_components(folder)
    if source.pipeline is None:
        if source.labels:
            write_json(folder / LABELS, {str(i): label for i, label in sorted(source.labels.items())})
        artifact.write(solution, folder)  # last: it seals the folder
    else:
        load = LOAD_TRANSFORMER if source.vae is None else LOAD_PIPELINE
        index = {**source.pipeline, **source.components, TRANSFORMER: ["diffusers", architecture(source.config).name]}
        write_json(folder / PIPELINE, index)
        (folder / TRANSFORMER).mkdir()
        artifact.write(solution, folder / TRANSFORMER)
        keep_edited(folder / TRANSFORMER, former / TRANSFORMER)
        artifact.seal(folder)
    size = artifact.size_bytes(folder)
    write_card(folder, model_card(solution, shape_name(solution.model_config), size, source.name, load), former)


@isolated()
def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    overwrite: bool = False,
    report: Report = silent,
    device: Device = "auto",
    resumable: bool = False,
) -> dict[str, Any]:
    """Quantize MODEL into the artifact folder `out`. Returns seconds (of this run), peak memory and sizes.

    `resumable`: finished work is kept in the folder `out`.work until the artifact is written. The same call continues
    from there after an interruption and gives the same bytes; another model or recipe starts anew. Inside
    `distributed.joined` the ranks share the work, the first one writes, and the bytes are those of one process.
    Raises `InputError`, before any work, if another process is writing `out`, and for an `out` that cannot be written.
    """
    out = Path(out)
    work = jobs.work_folder(out) if resumable else None
    with jobs.reserved(out) as place:
        perhaps_made = work is not None and not overwrite and _has_left(out, work)
        if not perhaps_made:
            check_target(out, overwrite)
        source = resolve(model)
        module = load_float(source)
        sizes = float_sizes(source, module)  # hours later the source may be gone
        seconds = 0.0
        if not (perhaps_made and _is_made(out, source, module, recipe)):
            check_target(out, overwrite)
            if place:
                check_space(out, _least_bytes(source, module, recipe))
            prepared = _calibrated(source, module, recipe, report, device, work)
            solution, search_seconds = solve_prepared(prepared, recipe, report)
            seconds = prepared.seconds + search_seconds
            if place:
                with filled(place, overwrite) as folder:
                    _write(solution, source, folder, out)
        if place and work:
            discard(work, STAGES)
    return _summary(source, recipe, sizes, seconds, out, device)


def _summary(
    source: ModelSource, recipe: Recipe, sizes: FloatSizes, seconds: float, out: Path, device: Device
) -> dict[str, Any]:
    world = distributed.current()
    size = int(world.add(torch.tensor(artifact.size_bytes(out) if world.first else 0)))  # known when it is written
    return {
        "name": source.name,
        "preset": recipe.label,
        "bits": recipe.bits,
        "calibration_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "size_bytes": size,
        **asdict(sizes),
        "size_ratio": size / sizes.float32_bytes,
        "size_ratio_bfloat16": size / sizes.bfloat16_bytes,
        "size_ratio_file": size / sizes.file_bytes,
        "processes": world.size,
        "environment": environment(distributed.chosen_device(device)),
    }


@isolated()
def sample(  # noqa: PLR0913 - one for each option of the command
    model: str | Path,
    classes: Sequence[str | int] = (),
    num: int = 16,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    report: Report = silent,
    backend: str = "auto",
    device: Device = "auto",
    *,
    dtype: Dtype = "float32",
) -> torch.Tensor:
    """`num` images (num, C, H, W) in [-1, 1], cycling through `classes`; all classes if none are named.

    `classes`: names or numbers. `device`, `dtype`: as in `load`. `to_pil` and `save_grid` take the images.

    Inside `distributed.joined` every rank draws its share and returns all of them.
    """
    wanted = images_of(model, classes, num, sampling, seed)
    return sample_images(wanted, report, backend, device, dtype)


@isolated()
def images_of(
    model: str | Path,
    classes: Sequence[str | int] = (),
    num: int = 16,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch: int = BATCH,
) -> Images:
    """The images that `sample` draws, `batch` at a time; all of it checked but the weights. Raises `InputError`."""
    if isinstance(classes, str):
        raise InputError(f"classes must be a list of names or numbers, got the string '{classes}'")
    if isinstance(classes, int):
        raise InputError(f"classes must be a list, got the number {classes}; give [{classes}]")
    source = resolve(model)
    return Images(source, chosen_classes(source, classes), num, sampling, seed, batch)


@isolated()
def sample_images(
    wanted: Images, report: Report = silent, backend: str = "auto", device: Device = "auto", dtype: Dtype = "float32"
) -> torch.Tensor:
    """The pixels of `wanted`, (num, C, H, W) in [-1, 1]; several processes share the work."""
    model = load_source(wanted.source, backend, device, dtype)
    report("sampling", 0.0)
    return images.gathered(wanted, model, lambda f: report("sampling", f))


@isolated()
def sample_folder(
    wanted: Images,
    folder: str | Path,
    report: Report = silent,
    backend: str = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> int:
    """Write `wanted` into `folder`, one PNG each, but for those that are there; returns how many were new.

    Several processes share the work. What is finished stays if one fails, and the same call goes on from there. Raises
    `InputError`, before any image is drawn, for a folder that has something else, or images of other settings: model,
    classes, seed, sampling, batch, kernels, kind of device or dtype.
    """
    folder = Path(folder)
    model = load_source(wanted.source, backend, device, dtype)
    kernels = getattr(model, "quantization_report", {"": "float"}).values()
    run = {
        **wanted.run,
        "backend": next((kernel for kernel in kernels if ".scores[" in kernel), "float"),
        "device": checked_device(device).type,
        "dtype": dtype_name(checked_dtype(dtype)),
    }
    return images.into_folder(wanted, run, model, folder, lambda f: report("sampling", f))


@isolated()
def inspect(folder: str | Path, backend: str = "auto", device: Device = "auto") -> dict[str, Any]:
    """What an artifact is, and every site of it: role, bits, grid, groups, granularity, the kernel that will run it.

    `backend` and `device` decide the kernels. `float32_bytes`: what the same tensors take in fp32.
    """
    source = resolve(folder)
    if not source.quantized:
        raise InputError(f"'{folder}' is not quantized; inspect takes an artifact")
    solution = fitting.read(source.folder, source.root)
    target = checked_device(device)
    chosen = get_backend(backend, target)
    sites = []
    for spec in solution.sites:
        row = {key: asdict(spec)[key] for key in ("name", "role", "bits", "grid", "groups", "granularity")}
        sites.append({**row, "kernel": kernel_name(solution.params[spec.name], chosen)})
    return {
        "name": source.name,
        "shape": shape_name(solution.model_config),
        "preset": solution.provenance.preset_name,
        "bits": solution.provenance.bits,
        "size_bytes": artifact.size_bytes(source.folder),
        "float32_bytes": 4 * sum(tensor.numel() for tensor in (*solution.codes.values(), *solution.floats.values())),
        "time_groups": solution.time_groups.num_groups,
        "num_timesteps": solution.time_groups.num_timesteps,
        "backend": chosen.NAME,
        "device": str(target),
        "provenance": solution.provenance.to_json(),
        "sites": sites,
    }


def checked_device(device: Device = "auto") -> torch.device:
    """A device that exists here, or an `InputError`; "auto" is a GPU where there is one, else the CPU."""
    try:
        chosen = torch.device(distributed.chosen_device(device))
        torch.empty(1, device=chosen).item()  # "meta" exists but cannot compute
    except (RuntimeError, AssertionError):
        raise InputError(f"device '{device}' is not available here; try cpu") from None
    return chosen


def checked_dtype(dtype: Dtype) -> torch.dtype:
    """A dtype for the residual stream of an integer model, by its name or torch's own; or an `InputError`."""
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: Dtype) -> str:
    """ "bfloat16" for that string and for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def chosen_classes(source: ModelSource, classes: Sequence[str | int]) -> Sequence[int]:
    """The numbers of the named or numbered classes, or of all."""
    return class_indices(source, classes) if classes else range(int(source.config["num_embeds_ada_norm"]))


def _has_left(out: Path, work: Path) -> bool:
    """Whether there are both an output and work for it. Of several processes the first one looks."""
    world = distributed.current()
    return bool(world.add(torch.tensor([int(world.first and work.is_dir() and out.is_dir())])))


def _is_made(out: Path, source: ModelSource, module: nn.Module, recipe: Recipe) -> bool:
    """Whether a run that was killed at its very end has left an artifact that is whole and what we would make.

    Of several processes the first one looks.
    """
    world, made = distributed.current(), False
    if world.first:
        made_from = _made_from(source, weights_hash(module), recipe)
        with contextlib.suppress(InputError):
            found = resolve(out)
            solution = artifact.read(found.folder, found.root)
            calibrated = replace(made_from, calibration_sha256=solution.provenance.calibration_sha256)
            same = solution.provenance == calibrated
            same = same and decisive(solution.model_config) == decisive(config_of(module))
            made = same and (found.scheduler, found.labels) == (source.scheduler, source.labels)
    if made := bool(world.add(torch.tensor([int(made)]))):
        warnings.warn(f"{out} was finished by a run that was interrupted afterwards", RepairWarning, stacklevel=3)
    return made


def _made_from(source: ModelSource, source_hash: str, recipe: Recipe) -> Provenance:
    """The part of an artifact's provenance that is known before the calibration."""
    return Provenance(
        preset=recipe.label,
        recipe=recipe.model_dump(mode="json"),
        source=source.name,
        source_sha256=source_hash,
        versions=versions(),
    )


def _least_bytes(source: ModelSource, module: nn.Module, recipe: Recipe) -> int:
    """About what an artifact takes on the disk, and no more: weight codes and the decoder."""
    twin = architecture(source.config).twin  # what blocks share is stored once
    counts = {twin(name): parameter.numel() for name, parameter in module.named_parameters()}
    decoder = source.vae.rglob("*.safetensors") if source.vae else ()
    return sum(counts.values()) * recipe.weight_bits // 8 + sum(file.stat().st_size for file in decoder)


def _calibration_settings(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in (*CALIBRATION_SETTINGS, "hessian")}


def _store(work: Path | None, stage: str, *depends_on: Any) -> Store | None:
    """The pieces of a stage in a work folder, under the hash of all that they depend on."""
    if work is None:
        return None
    text = json.dumps([versions(), PIECES, *depends_on], sort_keys=True)
    return WorkFolder(work / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]}")


def _data_hash(data: CalibrationSet) -> str:
    digest = hashlib.sha256()
    for tensor in (data.x, data.t, data.labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
