"""Draw images with a model: as one tensor, or as a folder of files that a later call completes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tqdit.imaging import images
from tqdit.imaging.images import BATCH, Images
from tqdit.imaging.request import chosen_classes
from tqdit.loading import load_source
from tqdit.runtime.target import Device, Dtype, Target
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.sampling.prompts import read_conditions
from tqdit.sources.conditions import suitable
from tqdit.sources.resolve import resolve
from tqdit.sources.sampled import check_sampled
from tqdit.sources.scheduler import check_timesteps
from tqdit.stages import Report, silent
from tqdit.system.deprecation import formerly_positional
from tqdit.system.isolation import isolated
from tqdit.system.validation import check_report


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
    """Draw `num` images, (num, C, H, W) in [-1, 1], cycling through `classes`; all classes if none are named.

    `classes`: names or numbers; with `conditions`, which a model of prompts needs, their indices.
    `device`, `dtype`: as in `load`. `to_pil` and `save_grid` take the images.

    Inside `distributed.joined` every rank draws its share and returns all of them.
    """
    check_report(report)
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
    """Describe the images that `sample` draws, `batch` at a time, and check all but the weights.

    Raises `InputError` for a model, classes, settings or conditions that do not go together.
    """
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
    """Draw `wanted`, (num, C, H, W) in [-1, 1]; several processes share the work."""
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
