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
from tqdit.errors import InputError
from tqdit.system import distributed, torchrun

if TYPE_CHECKING:
    from tqdit.recipe import Recipe
    from tqdit.sources.traced_summary import FolderSummary, TransformerSummary

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
        str,
        typer.Option(
            help="plus: better at little or no run-time cost; paper: as published; dynamic: without calibration"
        ),
    ] = "plus",
    calls: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="calls that `tqdit record` wrote, for a transformer of any class"),
    ] = None,
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
    dtype: Annotated[
        str | None,
        typer.Option(help="of the float model, with --calls or --preset dynamic: bfloat16, ...; default as stored"),
    ] = None,
    resumable: Annotated[
        bool, typer.Option("--resumable", help="keep finished work in OUT.work and continue from it; less memory")
    ] = False,
    json_file: JsonFile = None,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate a model and write an artifact: packed integer weights and every scale.

    DiT and PixArt are calibrated on their own samples. With --calls, recorded by `tqdit record`, a pipeline or a
    transformer of any class is calibrated on these; --preset dynamic needs neither. The defaults of --groups to
    --rounds are those of both presets; --set and a recipe file have every setting. Under torchrun the processes share
    the work for DiT and PixArt; the artifact is the same.
    """
    check_outputs(json_file)
    chosen = _recipe(context, recipe, parsed(assignments))
    from tqdit import workflow  # seconds, which a wrong setting need not wait for

    if calls is not None or _is_traced(model, chosen):
        _check_traced(context)
        _quantize_traced(model, out, chosen, calls, dtype, overwrite, json_file, device, quiet)
        return
    if dtype is not None:
        raise InputError("--dtype is for a model that is quantized with --calls or --preset dynamic")
    conditions = read_prompts(prompts)
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


# Options of the models that are calibrated on their own samples.
OF_SAMPLING = ("steps", "sampler", "trajectories", "guidance", "prompts", "resumable")


def _is_traced(model: str, recipe: "Recipe") -> bool:
    """Say whether a model is quantized without samples of its own, though no calls are given.

    Raises `InputError` that says how to record calls, for a class whose own samples are not known.
    """
    from tqdit.plan import needs_records
    from tqdit.sources.any_class import class_here, has_own_samples

    kind = class_here(model)
    if not needs_records(recipe):
        return True
    if kind is None or has_own_samples(kind):
        return False
    raise InputError(
        f"a {kind} is calibrated on recorded calls: run `tqdit record PIPELINE -o calls.safetensors`, then give "
        "--calls calls.safetensors; or take --preset dynamic, which needs none"
    )


def _check_traced(context: typer.Context) -> None:
    for name in OF_SAMPLING:
        if typed(context, name):
            raise InputError(f"{flag(context, name)} is for models that are calibrated on their own samples, not calls")
    torchrun.check_alone("tqdit quantize with calls")


def _quantize_traced(
    model: str, out: Path, recipe: "Recipe", calls: Path | None, dtype: str | None, overwrite: bool,
    json_file: Path | None, device: str, quiet: bool,
) -> None:  # fmt: skip
    from tqdit import recorded

    with progress(quiet) as report:
        result = recorded.quantize_folder(
            model, out, recipe, calls=calls, device=device, dtype=dtype, overwrite=overwrite, report=report
        )
    for line in _traced_lines(result, out):
        say(line, json_file)
    if not quiet:
        say(f"next: {shlex.join(['tqdit', 'inspect', str(out)])}", json_file)
        if calls is not None:
            command = ["tqdit", "compare", model, str(out), "--calls", str(calls)]
            say(f"      {shlex.join(command)}", json_file)
    write_json(json_file, result.figures())


def _traced_lines(result: "FolderSummary", out: Path) -> Iterator[str]:
    """Yield the report of a quantization: time and memory, then each transformer."""
    gpu = f", GPU peak {result.peak_gpu_bytes / 2**30:.2f} GiB" if result.peak_gpu_bytes else ""
    yield (
        f"{out}: {result.name} {result.bits} {result.preset}, in {result.seconds:.0f} s, process peak "
        f"{result.peak_memory_bytes / 2**30:.2f} GiB{gpu}"
    )
    for part in result.transformers:
        yield from _transformer_lines(part)


def _transformer_lines(part: "TransformerSummary") -> Iterator[str]:
    calibrated = f", calibrated on {part.calls} calls" if part.calls else ""
    unit, name = (1e9, "B") if part.parameters >= 1e9 else (1e6, "M")
    yield f"{part.component}: {part.kind}, {part.parameters / unit:.3g} {name} parameters{calibrated}"
    yield f"  {part.size_bytes / 1e6:.2f} MB, {part.size_ratio_bfloat16:.3f} of bf16"
    left = sum(part.left.values())
    yield f"  linear layers: {part.integer} in integers, {part.weight_only} with integer weights alone, {left} in float"
    for reason, count in part.left.items():
        yield f"  in float: {count} x {reason}"
    for site, note in part.notes.items():
        yield f"  {site}: {note}"


def _recipe(context: typer.Context, file: Path | None, assigned: dict[str, str]) -> "Recipe":
    """Return the recipe of a file, or of the options; `--set` changes either."""
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
