"""The stages in order, one function each; no mathematics. The command line and the Python API are these functions."""

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit import artifact, distributed
from tqdit.calibration import trajectories
from tqdit.calibration.recorder import record
from tqdit.calibration.records import Records
from tqdit.calibration.store import HASH_DIGITS, Store, WorkFolder, discard
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.convert import convert
from tqdit.environment import environment, peak_memory_bytes, versions
from tqdit.errors import InputError
from tqdit.evaluation import images
from tqdit.evaluation.images import BATCH, Images
from tqdit.files import TRANSFORMER, check_target, replacing, write_json
from tqdit.models import fitting
from tqdit.models.sampler import Sampling
from tqdit.models.sites import ARCHITECTURE, config_of
from tqdit.models.sources import (
    LABELS,
    PIPELINE,
    SCHEDULER,
    ModelSource,
    class_indices,
    load_float,
    resolve,
    weights_hash,
)
from tqdit.ops.dispatch import get_backend, kernel_name
from tqdit.recipe import CALIBRATION_SETTINGS, Recipe
from tqdit.search.solver import solve
from tqdit.spec import Solution
from tqdit.tensors import decisive
from tqdit.timegroups import TimeGroups

STAGES = ("calibration", "search")  # whose finished work may be kept
PIECES = 3  # raised where a change makes other pieces of the same settings, so that no former run is continued
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Report = Callable[[str, float], None]  # (stage, finished fraction)


def silent(stage: str, fraction: float) -> None:
    """No progress."""


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


def load(model: str | Path, backend: str = "auto", device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """A runnable transformer: an artifact in integers on `backend`, anything else in fp32.

    `dtype`: float32 or bfloat16, of an artifact's residual stream.
    """
    return load_source(resolve(model), backend, device, dtype)


def load_source(source: ModelSource, backend: str = "auto", device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """`load` of a model that is found already."""
    target, stream = checked_device(device), checked_dtype(dtype)
    if source.quantized:
        return convert(fitting.read(source.folder), backend, target, stream)
    if stream is not torch.float32:
        raise InputError(f"'{source.name}' is a float model and runs in float32; dtype '{dtype}' is for artifacts")
    return load_float(source).to(target)


def prepare(
    model: str | Path, recipe: Recipe, report: Report = silent, device: str = "cpu", work: Path | None = None
) -> Prepared:
    """Calibration: trajectories of the float model, then its activations and Fisher weights.

    With a `work` folder every finished piece goes there, and is not computed again if the same calibration of the same
    model put it there before; the records then take memory only while they are in use. Inside `distributed.joined`
    the ranks share the work; they must see the same `work` folder, or an `InputError` says so.
    """
    source = resolve(model)
    source.check_components()
    groups = TimeGroups(source.num_timesteps, recipe.groups)
    module = load_float(source).to(checked_device(device))
    if work:
        _check_shared(work)
    start = time.perf_counter()
    source_hash = weights_hash(module)
    settings = {"scheduler": source.scheduler, **_calibration_settings(recipe)}
    shape = decisive(config_of(module))
    states_in_bf16 = trajectories.draws_in_bf16(torch.device(device))
    store = _store(work, STAGES[0], source_hash, shape, environment(device)["device"], states_in_bf16, settings)
    data = trajectories.collect(module, source.scheduler, recipe, lambda f: report("trajectories", f), store=store)
    records = record(module, data, recipe, lambda f: report("statistics", f), store=store)
    seconds = time.perf_counter() - start
    return Prepared(source, module, recipe, groups, records, _data_hash(data), source_hash, seconds, work)


def solve_prepared(prepared: Prepared, recipe: Recipe, report: Report = silent) -> tuple[Solution, float]:
    """Search every scale under `recipe`, whose calibration settings are those of `prepared`; also the seconds.

    Inside `distributed.joined` the ranks share the blocks, and each returns the whole solution.
    """
    if not recipe.records_match(prepared.recipe):
        raise InputError("the recipe's calibration settings are not those the records were made with")
    start = time.perf_counter()
    provenance = {
        "preset": recipe.label,
        "recipe": recipe.model_dump(mode="json"),
        "source": prepared.source.name,
        "source_sha256": prepared.source_hash,
        "calibration_sha256": prepared.data_hash,
        "versions": versions(),
    }
    # The calibration set's hash and the hardware that made it stand for the records.
    where = next(prepared.model.parameters()).device
    shape = decisive(config_of(prepared.model))
    store = _store(prepared.work, STAGES[1], shape, environment(str(where))["device"], provenance)
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


def save(solution: Solution, source: ModelSource, out: Path, overwrite: bool = False) -> None:
    """Write an artifact with the scheduler, class names and VAE of its source; all or nothing. A pipeline stays one."""
    with replacing(out, overwrite) as folder:
        write_json(folder / SCHEDULER, source.scheduler)
        source.copy_components(folder)
        if source.pipeline is None:
            if source.labels:
                write_json(folder / LABELS, {str(i): label for i, label in sorted(source.labels.items())})
            artifact.write(solution, folder)  # last: it seals the folder
        else:
            index = {**source.pipeline, TRANSFORMER: ["diffusers", ARCHITECTURE]}
            write_json(folder / PIPELINE, index)
            (folder / TRANSFORMER).mkdir()
            artifact.write(solution, folder / TRANSFORMER)
            artifact.seal(folder)


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    overwrite: bool = False,
    report: Report = silent,
    device: str = "cpu",
    resumable: bool = False,
) -> dict[str, Any]:
    """Quantize MODEL into the artifact folder `out`. Returns seconds (of this run), peak memory and sizes.

    `resumable`: finished work is kept in the folder `out`.work until the artifact is written. The same call continues
    from there after an interruption and gives the same bytes; another model or recipe starts anew. Inside
    `distributed.joined` the ranks share the work, the first one writes, and the bytes are those of one process.
    """
    out, world = Path(out), distributed.current()
    check_target(out, overwrite)
    work = work_folder(out) if resumable else None
    prepared = prepare(model, recipe, report, device, work)
    solution, search_seconds = solve_prepared(prepared, recipe, report)
    if world.first:
        save(solution, prepared.source, out, overwrite)
        if work:
            discard(work, STAGES)
    fp32 = float32_bytes(prepared.model)
    size = int(world.add(torch.tensor(artifact.size_bytes(out) if world.first else 0)))  # known when it is written
    return {
        "name": prepared.source.name,
        "preset": recipe.label,
        "bits": recipe.bits,
        "calibration_seconds": prepared.seconds + search_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "size_bytes": size,
        "float32_bytes": fp32,
        "size_ratio": size / fp32,
        "processes": world.size,
        "environment": environment(device),
    }


def sample(  # noqa: PLR0913 - one for each option of the command
    model: str | Path,
    classes: list[str],
    num: int,
    sampling: Sampling,
    seed: int = 0,
    report: Report = silent,
    backend: str = "auto",
    device: str = "cpu",
    *,
    dtype: str = "float32",
) -> torch.Tensor:
    """`num` images (num, C, H, W) in [-1, 1], cycling through `classes`; all classes if none are named.

    `dtype`: as in `load`.

    Inside `distributed.joined` every rank draws its share and returns all of them.
    """
    wanted = images_of(model, classes, num, sampling, seed)
    return sample_images(wanted, report, backend, device, dtype)


def images_of(
    model: str | Path, classes: list[str], num: int, sampling: Sampling, seed: int = 0, batch: int = BATCH
) -> Images:
    """The images that `sample` draws, `batch` at a time; all of it checked but the weights. Raises `InputError`."""
    if isinstance(classes, str):
        raise InputError(f"classes must be a list of names, got the string '{classes}'")
    source = resolve(model)
    return Images(source, chosen_classes(source, classes), num, sampling, seed, batch)


def sample_images(
    wanted: Images, report: Report = silent, backend: str = "auto", device: str = "cpu", dtype: str = "float32"
) -> torch.Tensor:
    """The pixels of `wanted`, (num, C, H, W) in [-1, 1]; several processes share the work."""
    model = load_source(wanted.source, backend, device, dtype)
    return images.gathered(wanted, model, lambda f: report("sampling", f))


def sample_folder(
    wanted: Images,
    folder: str | Path,
    report: Report = silent,
    backend: str = "auto",
    device: str = "cpu",
    dtype: str = "float32",
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
        "device": torch.device(device).type,
        "dtype": dtype,
    }
    return images.into_folder(wanted, run, model, folder, lambda f: report("sampling", f))


def inspect(folder: str | Path, backend: str = "auto", device: str = "cpu") -> dict[str, Any]:
    """Every site of an artifact: role, bits, grid, groups, granularity, and the kernel that will run it on `device`."""
    source = resolve(folder)
    if not source.quantized:
        raise InputError(f"'{folder}' is not quantized; inspect takes an artifact")
    solution = fitting.read(source.folder)
    chosen = get_backend(backend, checked_device(device))
    sites = []
    for spec in solution.sites:
        row = {key: asdict(spec)[key] for key in ("name", "role", "bits", "grid", "groups", "granularity")}
        sites.append({**row, "kernel": kernel_name(solution.params[spec.name], chosen)})
    return {"backend": chosen.NAME, "provenance": dict(solution.provenance), "sites": sites}


def float32_bytes(model: nn.Module) -> int:
    """Bytes of a float model's parameters in fp32, every tensor counted once per place it is stored."""
    return sum(4 * p.numel() for p in model.parameters())


def checked_device(device: str) -> torch.device:
    """A device that exists here, or an `InputError`."""
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # "meta" exists but cannot compute
    except (RuntimeError, AssertionError):
        raise InputError(f"device '{device}' is not available here; try cpu") from None
    return chosen


def checked_dtype(name: str) -> torch.dtype:
    """A dtype for the residual stream of an integer model, or an `InputError`."""
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def chosen_classes(source: ModelSource, names: Sequence[str | int]) -> Sequence[int]:
    """The numbers of the named classes, or of all."""
    return class_indices(source, names) if names else range(int(source.config["num_embeds_ada_norm"]))


def work_folder(out: Path) -> Path:
    """Where the finished work of an artifact `out` is kept, or an `InputError` if that cannot be a folder."""
    work = out.absolute().with_name(f"{out.absolute().name}.work")
    if work.exists() and not work.is_dir():
        raise InputError(f"{work} is a file; finished work goes into a folder of this name")
    return work


def _check_shared(work: Path) -> None:
    """Raise `InputError` if several processes do not see the same folder `work`."""
    world = distributed.current()
    if world.size == 1:
        return
    work.mkdir(parents=True, exist_ok=True)
    token = int(world.add(torch.tensor(secrets.randbits(60) if world.first else 0)))
    mark = work / f"{token:x}.seen"
    if world.first:
        mark.touch()
    world.wait()
    seen = mark.exists()
    world.wait()
    if world.first:
        mark.unlink()
    if not seen:
        with contextlib.suppress(OSError):
            work.rmdir()  # made just now, on another disk
        raise InputError(f"--resumable: {work} is not on a file system that all processes share; leave it out")


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
