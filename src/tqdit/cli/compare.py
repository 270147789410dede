"""Define the command `tqdit compare`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tqdit.cli.bars import progress
from tqdit.cli.console import print_comparison
from tqdit.cli.options import (
    STDOUT,
    Device,
    Dtype,
    Guidance,
    JsonFile,
    Prompts,
    Quiet,
    Sampler,
    Seed,
    Verbose,
    check_outputs,
    read_prompts,
    write_json,
    write_text,
)
from tqdit.cli.settings import flag, typed
from tqdit.errors import InputError
from tqdit.system import distributed

OF_SAMPLES = ("num", "sampler", "cost", "equivalence")  # options that recorded calls have no use for


def compare(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="FLOAT", help="the float model")],
    quantized: Annotated[list[str], typer.Argument(metavar="QUANTIZED...", help="artifacts made from it")],
    calls: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="calls that `tqdit record` wrote, for artifacts made from recorded calls"),
    ] = None,
    prompts: Prompts = None,
    num: Annotated[int, typer.Option("-n", "--num", help="images per model; not with --calls")] = 16,
    samples: Annotated[int, typer.Option(help="states (or calls) in each of ten ranges of timesteps")] = 8,
    steps: Annotated[int, typer.Option(help="sampler steps")] = 50,
    sampler: Sampler = "auto",
    guidance: Guidance = 1.5,
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
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure artifacts against their float model: SQNR of epsilon, PSNR of same-seed images, FD-fashion, size, cost.

    With --calls the outputs of transformers of any class are compared on recorded calls, by time group; then --prompts
    is a text file with a prompt a line, by which a pipeline also draws an image each to compare, in its own size, and
    --steps and --guidance are the pipeline's own by default. Under torchrun the processes share images and states.
    """
    if calls is not None:
        _compare_calls(context, reference, quantized, calls, json_file, quiet)
        return
    from tqdit.quality import comparison
    from tqdit.sampling.guidance import Sampling

    check_outputs(json_file)
    sampling, conditions = Sampling(sampler, steps, guidance), read_prompts(prompts)
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:
        result = comparison.compare(
            reference, list(quantized), num, sampling, samples, seed,
            report=report, device=world.device, dtype=dtype, cost=cost, conditions=conditions, equivalence=equivalence,
        )  # fmt: skip
    if not world.first:
        return
    if json_file != STDOUT:
        print_comparison(result)
    if json_file:
        write_text(json_file, result.to_json())


def _compare_calls(
    context: typer.Context, reference: str, quantized: list[str], calls: Path, json_file: Path | None, quiet: bool
) -> None:
    """Compare transformers of any class on recorded calls."""
    from tqdit.cli.traced_tables import print_call_comparison
    from tqdit.quality.traced_artifacts import compare_folders

    for name in OF_SAMPLES:
        if typed(context, name):
            raise InputError(f"{flag(context, name)} and --calls exclude each other")
    distributed.check_alone("tqdit compare --calls")
    check_outputs(json_file)
    given = context.params
    prompts = _lines(given["prompts"])
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    options = {names[name]: given[name] for name in names if typed(context, name)}
    with progress(quiet) as report:
        result = compare_folders(
            reference, quantized, calls, samples=given["samples"], seed=given["seed"], device=given["device"],
            dtype=given["dtype"], prompts=prompts, options=options, report=report,
        )  # fmt: skip
    if json_file != STDOUT:
        print_call_comparison(result)
    write_json(json_file, {"command": shlex.join(["tqdit", *sys.argv[1:]]), **result.figures()})


def _lines(path: Path | None) -> list[str]:
    """Return the lines of a text file that are not blank; none without a file."""
    if path is None:
        return []
    if not path.is_file():
        raise InputError(f"{path} is no text file of prompts")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    if not any(lines):
        raise InputError(f"{path} has no prompts")
    return [line for line in lines if line]
