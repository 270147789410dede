"""Define the command `tqdit sample`."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tqdit.cli.bars import progress
from tqdit.cli.options import (
    Backend,
    Batch,
    Classes,
    Device,
    Dtype,
    Guidance,
    ModelArgument,
    Num,
    Prompts,
    Quiet,
    Sampler,
    Seed,
    Steps,
    Verbose,
    check_outputs,
    class_names,
    read_prompts,
    with_prompts,
)
from tqdit.system import distributed

if TYPE_CHECKING:
    from tqdit.sources.source import ModelSource


def sample(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="a .png for one grid; or a folder for an image each, resumed if begun")
    ],
    classes: Classes = None,
    prompts: Prompts = None,
    num: Num = 16,
    steps: Steps = 50,
    sampler: Sampler = "auto",
    guidance: Guidance = 1.5,
    seed: Seed = 0,
    batch: Batch = 16,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Sample images from a float or quantized model into one PNG grid, or into a folder; under torchrun, together."""
    from tqdit import workflow
    from tqdit.imaging.generate import save_grid
    from tqdit.runtime.target import Target
    from tqdit.sampling.guidance import Sampling

    grid = _is_grid(out)
    sampling = Sampling(sampler, steps, guidance)
    wanted = workflow.images_of(model, class_names(classes), num, sampling, seed, batch, read_prompts(prompts))
    begun: list[float] = []
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:

        def noted(stage: str, fraction: float) -> None:
            begun[:] = begun or [time.perf_counter()]  # time only counts once the model is loaded
            report(stage, fraction)

        target = Target(backend, world.device, dtype)
        if grid:
            pixels, new = workflow.sample_images(wanted, target, noted), num
        else:
            new = workflow.sample_folder(wanted, out, target, noted)
        seconds = time.perf_counter() - begun[0]
    if not world.first:
        return
    if grid:
        save_grid(pixels, out)
    speed = f" in {seconds:.1f} s ({new / seconds:.2f} images/s)" if new else ""
    done = f"{num} images" if grid else f"{num} images ({new} new)"
    used = wanted.drawn_with.sampler
    typer.echo(f"{out}: {done} of {model}{speed}\n{used} {steps} steps, guidance {guidance:g}, seed {seed}")
    if not quiet:
        typer.echo(f"next: {_next(model, wanted.source, prompts)}")


def _next(model: str, source: "ModelSource", prompts: Path | None) -> str:
    """Return a command that makes sense after images of `model`."""
    if not source.quantized:
        return with_prompts(f"tqdit quantize {shlex.quote(model)} -o w8a8", prompts)
    made_from = _float_model(source)
    if made_from is None:
        return shlex.join(["tqdit", "inspect", model])
    return with_prompts(shlex.join(["tqdit", "compare", made_from, model]), prompts)


def _float_model(source: "ModelSource") -> str | None:
    """Return the MODEL that an artifact was made from, a bundled name or a folder near by; None if it is gone."""
    from tqdit.artifact.provenance import read_provenance
    from tqdit.sources.resolve import BUNDLED

    name = read_provenance(source.folder, source.config["quantization_config"]["format_version"]).source or ""
    if name in BUNDLED:
        return name
    if not name or Path(name).name != name:
        return None
    places = (Path(name), (source.root or source.folder).parent / name)
    return next((str(place) for place in places if place.is_dir()), None)


def _is_grid(out: Path) -> bool:
    """Say whether `out` is for a grid rather than for a folder of images. Raises `InputError` if it can be neither."""
    from tqdit.errors import InputError

    if out.suffix.lower() == ".png":
        check_outputs(out)
        return True
    if out.suffix and not out.is_dir():
        raise InputError(f"output {out} must end in .png for a grid, or be a folder for an image each")
    return False
