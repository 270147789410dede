"""What a user asks for, one function each; no mathematics. The command line and the Python API are these functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from tqdit.calibration.store import discard
from tqdit.calibration.work import STAGES
from tqdit.errors import InputError
from tqdit.imaging import images
from tqdit.imaging.images import BATCH, Images
from tqdit.imaging.request import chosen_classes
from tqdit.recipe import Recipe
from tqdit.recorded import quantize_folder, quantize_recorded
from tqdit.runtime import fitting
from tqdit.runtime.convert import convert
from tqdit.runtime.inspection import inspection
from tqdit.runtime.target import Device, Dtype, Target, dtype_name
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.sampling.prompts import read_conditions
from tqdit.sources.any_class import class_here, has_own_samples
from tqdit.sources.conditions import suitable
from tqdit.sources.in_memory import check_transformer, float_copy, pipeline_hint, source_in_memory
from tqdit.sources.resolve import load_float, resolve
from tqdit.sources.sampled import check_sampled
from tqdit.sources.saving import fill, has_left, is_made, least_bytes, save
from tqdit.sources.scheduler import check_timesteps
from tqdit.sources.sizes import float_sizes
from tqdit.sources.source import ModelSource
from tqdit.sources.summary import Summary, summarize
from tqdit.sources.traced_summary import FolderSummary
from tqdit.stages import Prepared, Report, calibrated, check_recipe, silent, solve_prepared
from tqdit.system import jobs
from tqdit.system.deprecation import formerly_positional
from tqdit.system.distributed import chosen_device
from tqdit.system.files import check_space, check_target, filled
from tqdit.system.isolation import isolated
from tqdit.system.validation import check_flags

__all__ = [
    "Prepared", "Report", "images_of", "inspect", "load", "load_source", "load_to_sample", "prepare", "quantize",
    "sample", "sample_folder", "sample_images", "save", "silent", "solve_prepared",
]  # fmt: skip


@formerly_positional("backend", "device", "dtype")
@isolated()
def load(model: str | Path, *, backend: str = "auto", device: Device = "auto", dtype: Dtype = "float32") -> nn.Module:
    """A runnable transformer: an artifact in integers on `backend`, anything else in fp32.

    `device`: "auto" is a GPU where there is one, else the CPU. `dtype`: float32, float16 or bfloat16 (or torch's
    own), of an artifact's residual stream; that of float16 is float32 where fp16 might not hold it.
    """
    return load_source(resolve(model), Target(backend, device, dtype))


@isolated()
def load_source(source: ModelSource, target: Target) -> nn.Module:
    """Load a model that is found already, as `load` does."""
    if source.quantized:
        return convert(fitting.read(source.folder, source.root), target.backend, target.device, target.dtype)
    if target.dtype is not torch.float32:
        raise InputError(
            f"'{source.name}' is a float model and runs in float32; dtype '{dtype_name(target.dtype)}' is for artifacts"
        )
    if target.backend != "auto":
        raise InputError(
            f"'{source.name}' is a float model, which torch runs; backend '{target.backend}' is for artifacts"
        )
    return load_float(source).to(target.device)


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
    source, conditions = resolve(model), read_conditions(conditions)
    suitable(source.config, conditions)
    return calibrated(
        source, load_float(source), recipe, report=report, device=device, work=work, conditions=conditions
    )


@overload
def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe = Recipe(),
    *,
    overwrite: bool = False,
    report: Report = silent,
    device: Device = "auto",
    resumable: bool = False,
    conditions: Conditions | str | Path | None = None,
) -> Summary: ...


@overload
def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe = Recipe(),
    *,
    calls: Any,
    device: Device = "auto",
    dtype: Dtype | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> FolderSummary: ...


@overload
def quantize(
    model: nn.Module,
    recipe: Recipe = Recipe(),
    *,
    calls: Any = None,
    backend: str = "auto",
    device: Device | None = None,
    dtype: Dtype | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    report: Report = silent,
) -> nn.Module: ...


@overload
def quantize(
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
) -> nn.Module: ...


def quantize(model: str | Path | nn.Module, *arguments: Any, **options: Any) -> Any:
    """Quantize a model: one that is found by MODEL into an artifact folder, or a diffusers transformer in memory.

        summary = tqdit.quantize("fashion-dit", "w8a8", tqdit.Recipe())
        summary = tqdit.quantize("z-image", "z-image-w8a8", tqdit.Recipe(), calls="calls.safetensors")
        transformer = tqdit.quantize(pipe.transformer, tqdit.Recipe(), calls=calls)    # of tqdit.record(pipe)
        transformer = tqdit.quantize(pipe.transformer, tqdit.Recipe(), scheduler=pipe.scheduler)

    The first form is `quantize_source`, and the last `quantize_module`, for DiT and PixArt with their attention in
    integers too. Those with recorded calls are for any class: `recorded.quantize_folder` for the transformers of a
    folder, `recorded.quantize_recorded` for one in memory. They say what they take.
    """
    if isinstance(model, nn.Module):
        check_transformer(model)
        if len(arguments) > 1:
            raise InputError("a transformer in memory is followed by the recipe; give the rest by name, as out=...")
        if "scheduler" in options and options.get("calls") is not None:
            raise InputError("a model is calibrated on recorded calls or by its scheduler; give calls or scheduler")
        if "scheduler" not in options:
            return quantize_recorded(model, *arguments, **options)
        return quantize_module(model, *arguments, **options)
    if not isinstance(model, str | Path):
        raise InputError(
            f"a model is a path, a name or a diffusers transformer, got {type(model).__name__}{pipeline_hint(model)}"
        )
    if not isinstance(arguments[0] if arguments else options.get("out"), str | Path):
        raise InputError("a model that is found by its path needs the folder to write before the recipe")
    if "calls" in options or _is_of_any_class(model):
        return quantize_folder(model, *arguments, **options)
    return quantize_source(model, *arguments, **options)


def _is_of_any_class(model: str | Path) -> bool:
    """Say whether a path is the folder of a transformer without an architecture, which has no samples of its own."""
    kind = class_here(model)
    return kind is not None and not has_own_samples(kind)


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


@formerly_positional("report", "backend", "device")
@isolated()
def sample(  # noqa: PLR0913 - one for each option of the command
    model: str | Path,
    classes: Sequence[str | int] = (),
    num: int = 16,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    *,
    report: Report = silent,
    backend: str = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    conditions: Conditions | str | Path | None = None,
) -> torch.Tensor:
    """`num` images (num, C, H, W) in [-1, 1], cycling through `classes`; all classes if none are named.

    `classes`: names or numbers; with `conditions`, which a model of prompts needs, their indices.
    `device`, `dtype`: as in `load`. `to_pil` and `save_grid` take the images.

    Inside `distributed.joined` every rank draws its share and returns all of them.
    """
    target = Target(backend, device, dtype)
    return sample_images(images_of(model, classes, num, sampling, seed, conditions=conditions), target, report)


@isolated()
def images_of(
    model: str | Path,
    classes: Sequence[str | int] = (),
    num: int = 16,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch: int = BATCH,
    conditions: Conditions | str | Path | None = None,
) -> Images:
    """The images that `sample` draws, `batch` at a time; all of it checked but the weights. Raises `InputError`."""
    source, conditions = resolve(model), read_conditions(conditions)
    asked = suitable(source.config, conditions)
    check_sampled(source, "sample")
    return Images(source, chosen_classes(source, asked, classes), num, sampling, seed, batch, conditions)


def load_to_sample(wanted: Images, target: Target) -> nn.Module:
    """Load the model of images. Raises `InputError` for an artifact of other timesteps than its scheduler's."""
    model = load_source(wanted.source, target)
    solution = getattr(model, "solution", None)
    if solution is not None:
        check_timesteps(solution.time_groups, wanted.source, f"'{wanted.source.name}'")
    return model


@isolated()
def sample_images(wanted: Images, target: Target | None = None, report: Report = silent) -> torch.Tensor:
    """The pixels of `wanted`, (num, C, H, W) in [-1, 1]; several processes share the work."""
    model = load_to_sample(wanted, target or Target())
    report("sampling", 0.0)
    return images.gathered(wanted, model, lambda f: report("sampling", f))


@isolated()
def sample_folder(wanted: Images, folder: str | Path, target: Target | None = None, report: Report = silent) -> int:
    """Write `wanted` into `folder`, one PNG each, but for those that are there; returns how many were new.

    Several processes share the work. What is finished stays if one fails, and the same call goes on from there. Raises
    `InputError`, before any image is drawn, for a folder that has something else, or images of other settings: model,
    classes, seed, sampling, batch, kernels, kind of device or dtype.
    """
    folder, target = Path(folder), target or Target()
    model = load_to_sample(wanted, target)
    kernels = getattr(model, "site_kernels", {"": "float"}).values()
    run = {
        **wanted.run,
        "backend": next((kernel for kernel in kernels if ".scores[" in kernel), "float"),
        "device": target.device.type,
        "dtype": target.dtype_name,
    }
    return images.into_folder(wanted, run, model, folder, lambda f: report("sampling", f))


@formerly_positional("backend", "device")
@isolated()
def inspect(folder: str | Path, *, backend: str = "auto", device: Device = "auto") -> dict[str, Any]:
    """What an artifact is, and every site of it: role, bits, grid, groups, granularity, the kernel that will run it.

    `channels` of a site says whether its channels have factors of their own.
    `backend` and `device` decide the kernels. `float32_bytes`: what the same tensors take in fp32.
    """
    return inspection(resolve(folder), Target(backend, device))
