"""Define the command `tqdit compare`."""

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
    write_text,
)
from tqdit.system import distributed


def compare(
    reference: Annotated[str, typer.Argument(metavar="FLOAT", help="the float model")],
    quantized: Annotated[list[str], typer.Argument(metavar="QUANTIZED...", help="artifacts made from it")],
    prompts: Prompts = None,
    num: Annotated[int, typer.Option("-n", "--num", help="images per model (PSNR, FD-fashion)")] = 16,
    samples: Annotated[int, typer.Option(help="held-out states in each of ten ranges of timesteps (SQNR)")] = 8,
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

    Under torchrun the processes share images and states.
    """
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
