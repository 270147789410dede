"""Define the command `tqdit compare`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tqdit.cli.bars import progress
from tqdit.cli.console import print_comparison
from tqdit.cli.options import (
    STDOUT,
    Device,
    Dtype,
    Guidance,
    JsonFile,
    Negative,
    Num,
    Prompts,
    Quiet,
    Sampler,
    Seed,
    Size,
    Steps,
    Verbose,
    check_outputs,
    command,
    pixels,
    read_prompts,
    say,
    text_lines,
    write_json,
    write_text,
)
from tqdit.cli.settings import flag, typed
from tqdit.errors import InputError
from tqdit.system import distributed, torchrun

if TYPE_CHECKING:
    from tqdit.quality.called import FolderComparison
    from tqdit.quality.samples import Comparison

OF_SAMPLES = ("num", "sampler", "cost", "equivalence")  # options that recorded calls have no use for
# Options of the images of a pipeline, and what its call names them.
OF_IMAGES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt", "size": ""}
OF_PIPELINES = ("negative", "size")


def compare(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="FLOAT", help="the float model")],
    quantized: Annotated[list[str], typer.Argument(metavar="QUANTIZED...", help="artifacts made from it")],
    calls: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="calls that `tqdit record` wrote, for artifacts made from recorded calls"),
    ] = None,
    prompts: Prompts = None,
    num: Num = 16,
    samples: Annotated[int, typer.Option(help="states (or calls) in each of ten ranges of timesteps")] = 8,
    steps: Steps = 50,
    sampler: Sampler = "auto",
    guidance: Guidance = 1.5,
    size: Size = None,
    negative: Negative = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="also time calls and measure memory")] = True,
    equivalence: Annotated[
        bool,
        typer.Option(
            "--equivalence",
            help="also test whether images can be told from float ones, for fashion-dit (-n 40, 60, ...)",
        ),
    ] = False,
    json_file: JsonFile = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="RUN", help="save the run (.safetensors) for `tqdit report`"),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure artifacts against their float model: SQNR of epsilon, PSNR of same-seed images, FD-fashion, size, cost.

    With --calls the outputs of transformers of any class are compared on recorded calls, by time group; then --prompts
    is a text file with a prompt a line, by which a pipeline also draws an image each to compare. --size, --negative,
    --steps and --guidance are then arguments of the pipeline, which has its own values by default; --num, --sampler,
    --cost and --equivalence are not for recorded calls. Under torchrun the processes share images and states. --out
    also measures what each site costs, and saves all that a report shows.
    """
    if out is not None:
        from tqdit.quality.run_file import check_path

        check_path(out)
    if calls is not None:
        _compare_calls(context, reference, quantized, calls, json_file, quiet, out)
        return
    for name in OF_PIPELINES:
        if typed(context, name):
            raise InputError(f"{flag(context, name)} is for images of a pipeline: give --calls and --prompts, too")
    from tqdit.quality import comparison
    from tqdit.sampling.guidance import Sampling

    check_outputs(json_file)
    sampling, conditions = Sampling(sampler, steps, guidance), read_prompts(prompts)
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:
        result = comparison.compare_samples(
            reference, list(quantized), num, sampling, samples, seed,
            report=report, device=world.device, dtype=dtype, cost=cost, conditions=conditions, equivalence=equivalence,
            sites=out is not None,
        )  # fmt: skip
    if not world.first:
        return
    _save(result, out, json_file)
    if json_file != STDOUT:
        print_comparison(result)
    if json_file:
        write_text(json_file, result.to_json())


def _compare_calls(
    context: typer.Context, reference: str, quantized: list[str], calls: Path, json_file: Path | None, quiet: bool,
    out: Path | None,
) -> None:  # fmt: skip
    """Compare transformers of any class on recorded calls."""
    from tqdit.cli.traced_tables import print_call_comparison
    from tqdit.quality.traced_artifacts import compare_folders

    for name in OF_SAMPLES:
        if typed(context, name):
            raise InputError(f"{flag(context, name)} and --calls exclude each other")
    torchrun.check_alone("tqdit compare --calls")
    check_outputs(json_file)
    given = context.params
    asked = [name for name in OF_IMAGES if typed(context, name)]
    if asked and given["prompts"] is None:
        raise InputError(f"{flag(context, asked[0])} is for images: give --prompts, too")
    prompts = [] if given["prompts"] is None else text_lines(given["prompts"])
    options = {OF_IMAGES[name]: given[name] for name in asked if name != "size"} | pixels(given["size"])
    with progress(quiet) as report:
        result = compare_folders(
            reference, quantized, calls, samples=given["samples"], seed=given["seed"], device=given["device"],
            dtype=given["dtype"], prompts=prompts, options=options, report=report,
            sites=out is not None,
        )  # fmt: skip
    _save(result, out, json_file)
    if json_file != STDOUT:
        print_call_comparison(result)
    write_json(json_file, {"command": command(), **result.figures()})


def _save(result: "Comparison | FolderComparison", out: Path | None, json_file: Path | None) -> None:
    """Save a comparison as a run, and say what to do with it."""
    if out is not None:
        result.save(out, command())
        say(f"run: {out}; `tqdit report {shlex.quote(str(out))}` makes a page of it", json_file)
