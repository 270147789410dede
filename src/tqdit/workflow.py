"""Define the functions behind the command line and the Python API: one for each thing that a user asks for.

`load` is made in `loading.py`, `sample` and what belongs to it in `drawing.py`, and `quantize` chooses between the
functions of `quantizing.py` and `recorded.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from torch import nn

from tqdit.drawing import images_of, load_to_sample, sample, sample_folder, sample_images
from tqdit.errors import InputError
from tqdit.loading import load, load_source
from tqdit.prepared import Prepared, solve_prepared
from tqdit.quantizing import prepare, quantize_module, quantize_source
from tqdit.recipe import Recipe
from tqdit.recorded import quantize_folder, quantize_recorded
from tqdit.runtime.inspection import inspection
from tqdit.runtime.target import Device, Dtype, Target
from tqdit.sampling.guidance import Conditions
from tqdit.sources.any_class import class_here, has_own_samples
from tqdit.sources.in_memory import check_transformer, pipeline_hint
from tqdit.sources.resolve import resolve
from tqdit.sources.saving import save
from tqdit.sources.summary import Summary
from tqdit.sources.traced_summary import FolderSummary
from tqdit.stages import Report, silent
from tqdit.system.deprecation import formerly_positional
from tqdit.system.isolation import isolated

__all__ = [
    "Prepared", "Report", "images_of", "inspect", "load", "load_source", "load_to_sample", "prepare", "quantize",
    "quantize_module", "quantize_source", "sample", "sample_folder", "sample_images", "save", "silent",
    "solve_prepared",
]  # fmt: skip


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


@formerly_positional("backend", "device")
@isolated()
def inspect(folder: str | Path, *, backend: str = "auto", device: Device = "auto") -> dict[str, Any]:
    """Say what an artifact is, and what every site of it has: role, bits, grid, groups, granularity, kernel.

    `channels` of a site says whether its channels have factors of their own.
    `backend` and `device` decide the kernels that will run. `float32_bytes`: what the same tensors take in fp32.
    """
    return inspection(resolve(folder), Target(backend, device))
