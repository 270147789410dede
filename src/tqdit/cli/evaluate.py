"""Define the command `tqdit evaluate`."""

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
    Num,
    Prompts,
    Quiet,
    Sampler,
    Seed,
    Steps,
    Verbose,
    class_names,
    read_prompts,
)
from tqdit.errors import InputError
from tqdit.system import distributed, torchrun

if TYPE_CHECKING:
    from tqdit.evaluation.results import Evaluation

PAPER = 10_000  # images: the Fréchet distance of fewer is biased upwards by more than models differ


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="as of sample; or .npz batches; or .json files of results to show"),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the result file (.json), gone on with")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help=".npz of ADM, a folder of images, or fashion-test")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="NETWORK", help="inception-2015-12-05.pt, another TorchScript file, .pt2, or fashion"),
    ] = None,
    num: Num = PAPER,
    classes: Classes = None,
    prompts: Prompts = None,
    steps: Steps = 50,
    sampler: Sampler = "auto",
    guidance: Guidance = 1.5,
    seed: Seed = 0,
    batch: Batch = 16,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="where images are kept; default: OUT with the suffix .images")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="also write ADM .npz batches of the images")
    ] = None,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate models as papers do: FID, sFID, Inception score, precision, recall and KID of many images each.

    The result file has the whole protocol, and takes no results of another one. The same command goes on after an
    interruption; under torchrun the processes share the work. With result files alone, one table of them is printed.
    """
    from tqdit.evaluation.evaluate import evaluate as evaluated
    from tqdit.evaluation.results import joined
    from tqdit.sampling.guidance import Sampling

    if all(Path(name).suffix == ".json" for name in models):
        if out is not None or reference is not None:
            raise InputError("result files are only shown: leave out --out and --reference, or give models")
        torchrun.check_alone("tqdit evaluate RESULTS.json")
        print_evaluation(joined([Path(name) for name in models]))
        return
    if out is None or reference is None:
        raise InputError(f"give {'--out' if out is None else '--reference'}: an evaluation needs --out and --reference")
    names = class_names(classes)
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:
        result = evaluated(
            models, reference, out, network=network, num=num, sampling=Sampling(sampler, steps, guidance),
            classes=names, seed=seed, batch=batch, conditions=read_prompts(prompts), images=images, npz=npz,
            backend=backend, device=world.device, dtype=dtype, report=report,
        )  # fmt: skip
    if world.first:
        print_evaluation(result)
        typer.echo(f"results: {out}")


def print_evaluation(result: "Evaluation") -> None:
    """Print the scores of an evaluation, and what they were measured with."""
    from tqdit.cli.console import add_row, cell, console_of, table_of
    from tqdit.evaluation.table import DIGITS, described, titles

    names = titles(result)
    table = table_of(("model",), tuple(names.values()))
    for row in result.rows:
        add_row(table, (row.name,), [cell(row.scores.get(name), DIGITS[name]) for name in names])
    console = console_of()
    console.print(table)
    for note in described(result):
        console.print(note, markup=False)
