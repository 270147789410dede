"""Define the command `tqdit quantize`."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqdit.cli.bars import QUANTIZE, progress
from tqdit.cli.exits import INTERRUPT_MESSAGE, INTERRUPTED, TERMINATED, StoppedError, Terminated
from tqdit.cli.options import (
    Device,
    JsonFile,
    ModelArgument,
    Prompts,
    Quiet,
    Seed,
    Verbose,
    check_outputs,
    read_prompts,
    say,
    with_prompts,
    write_json,
)
from tqdit.cli.settings import Set, check_once, flag, parsed, typed
from tqdit.system import distributed

if TYPE_CHECKING:
    from tqdit.recipe import Recipe

IN_RECIPE = (
    "bits", "preset", "groups", "samples", "steps", "sampler", "trajectories", "guidance", "rounds", "seed", "ho",
    "mrq", "tgq",
)  # fmt: skip


def quantize(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="artifact folder to write")],
    bits: Annotated[str, typer.Option(help="w<2-8>a<4-8>, such as w8a8, w6a6, w4a8")] = "w8a8",
    preset: Annotated[
        str, typer.Option(help="plus: better at little or no run-time cost; paper: as published")
    ] = "plus",
    recipe: Annotated[
        Path | None, typer.Option(help="a recipe file (TOML); then no other option of the method but --set")
    ] = None,
    assignments: Set = None,
    groups: Annotated[
        int | None, typer.Option(help="time groups: equal ranges of timesteps with scales of their own; default 10")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="calibration samples per time group; default 32")] = None,
    steps: Annotated[int | None, typer.Option(help="sampler steps of calibration; default 250")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="sampler of calibration: auto (ddpm, or flow), ddim, ddpm, flow; default auto"),
    ] = None,
    trajectories: Annotated[
        int | None, typer.Option(help="sampling runs to draw the samples from; default: as few as give every sample")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance of calibration; default 1.5")] = None,
    rounds: Annotated[int | None, typer.Option(help="search rounds; 0 keeps min-max scales; default 3")] = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    ho: Annotated[bool, typer.Option("--ho/--no-ho", help="Hessian-guided objective, or squared error")] = True,
    mrq: Annotated[
        bool, typer.Option("--mrq/--no-mrq", help="multi-region grids, or uniform ones; grids of rows stay")
    ] = True,
    tgq: Annotated[bool, typer.Option("--tgq/--no-tgq", help="time-grouped scales, or one for all t")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing artifact")] = False,
    resumable: Annotated[
        bool, typer.Option("--resumable", help="keep finished work in OUT.work and continue from it; less memory")
    ] = False,
    json_file: JsonFile = None,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate on the model's own samples and write an artifact: packed integer weights and every scale.

    The defaults of --groups to --rounds are those of both presets; --set and a recipe file have every setting. Under
    torchrun the processes share the work; the artifact is the same.
    """
    from tqdit import workflow

    check_outputs(json_file)
    chosen, conditions = _recipe(context, recipe, parsed(assignments)), read_prompts(prompts)
    with (
        _work_is_mentioned(out, resumable),
        distributed.joined(device) as world,
        progress(quiet or not world.first, QUANTIZE) as report,
    ):
        result = workflow.quantize(
            model, out, chosen, overwrite=overwrite, report=report, device=world.device, resumable=resumable,
            conditions=conditions,
        )  # fmt: skip
    if not world.first:
        return
    say(
        f"{out}: {result.name} {chosen.bits} {chosen.label}, calibrated in {result.calibration_seconds:.0f} s, "
        f"process peak {result.peak_memory_bytes / 2**30:.2f} GiB\n"
        f"{result.size_bytes / 1e6:.2f} MB: {result.size_ratio_file:.3f} of the {result.file_dtype} file, "
        f"{result.size_ratio_bfloat16:.3f} of bf16, {result.size_ratio:.3f} of fp32",
        json_file,
    )
    if not quiet:
        made = shlex.quote(str(out))
        say(f"next: {with_prompts(f'tqdit sample {made} -o grid.png', prompts)}", json_file)
        say(f"      {with_prompts(f'tqdit compare {shlex.quote(model)} {made}', prompts)}", json_file)
    write_json(json_file, result.figures())


def _recipe(context: typer.Context, file: Path | None, assigned: dict[str, str]) -> "Recipe":
    """Return the recipe of a file, or of the options; `--set` changes either."""
    from tqdit.errors import InputError
    from tqdit.recipe import Recipe

    given = context.params
    check_once(context, IN_RECIPE, assigned)
    if file:
        for name in IN_RECIPE:
            if typed(context, name):
                raise InputError(f"{flag(context, name)} and --recipe exclude each other; set it in {file}")
        return Recipe.from_toml(file, **assigned)
    settings: dict[str, Any] = {name: given[name] for name in IN_RECIPE if name not in ("ho", "mrq", "tgq")}
    if not given["ho"]:
        settings["hessian"] = "none"
    if not given["mrq"]:
        preset = Recipe(given["preset"])
        settings |= {name: "uniform" for name in ("softmax_grid", "gelu_grid") if getattr(preset, name) != "row"}
    if not given["tgq"]:
        settings |= {"time_grouped": "none"}
    return Recipe(**settings | assigned)


@contextmanager
def _work_is_mentioned(out: Path, resumable: bool) -> Iterator[None]:
    """Tell a user who interrupts a long `quantize` which work is kept, or how it could have been."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        raise StoppedError(f"{INTERRUPT_MESSAGE}; {_hint(out, resumable)}", code) from None


def _hint(out: Path, resumable: bool) -> str:
    if not resumable:
        return "with --resumable, finished work would be kept for the same command to go on"
    from tqdit.system.jobs import work_of

    work = work_of(out)
    kept = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) / 1e6
    return f"the same command goes on from {work.name} ({kept:.1f} MB kept)" if kept else "nothing was finished yet"
