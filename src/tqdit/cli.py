"""The command line: `tqdit quantize | sample | compare | bench | convert | inspect | demo`.

Commands import what they need.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tqdit import distributed
from tqdit.cli_bench import bench
from tqdit.cli_convert import convert
from tqdit.cli_options import Backend, Device, JsonFile, ModelArgument, Quiet, check_outputs, write_json, write_text
from tqdit.console import print_table, progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize Diffusion Transformers with TQ-DiT and run them in integers. "
    "MODEL is a bundled name (fashion-dit), a diffusers transformer or pipeline folder, an official DiT checkpoint "
    "(.pt), owner/name of a model on the Hugging Face Hub, or an artifact.",
)

INTERRUPTED = 130  # what typer returns for Ctrl-C inside a command
INTERRUPT_MESSAGE = "interrupted; nothing is half written"
TOGETHER = ("quantize", "sample", "compare")  # commands that several processes share
IN_RECIPE = (
    "bits", "preset", "groups", "samples", "steps", "sampler", "trajectories", "guidance", "rounds", "seed", "ho",
    "mrq", "tgq",
)  # fmt: skip

Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed; the same seed gives the same bytes")]
Guidance = Annotated[float, typer.Option(min=0.0, help="classifier-free guidance; 1 turns it off")]
Sampler = Annotated[str, typer.Option(help="ddim or ddpm")]
Dtype = Annotated[str, typer.Option(help="of an artifact's residual stream: float32, or bfloat16, faster on GPUs")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing artifact")]


def _print_version(wanted: bool) -> None:
    from tqdit.version import VERSION

    if wanted:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    command = context.invoked_subcommand
    if command not in TOGETHER:
        distributed.check_alone(f"tqdit {command}")


@app.command()
def quantize(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="artifact folder to write")],
    bits: Annotated[str, typer.Option(help="w<2-8>a<4-8>, such as w8a8, w6a6, w4a8")] = "w8a8",
    preset: Annotated[
        str, typer.Option(help="paper: as published; plus: better at little or no run-time cost")
    ] = "paper",
    recipe: Annotated[
        Path | None, typer.Option(help="a recipe file (TOML); then no other option of the method")
    ] = None,
    groups: Annotated[int | None, typer.Option(help="time groups G")] = None,
    samples: Annotated[int | None, typer.Option(help="calibration samples per group n")] = None,
    steps: Annotated[int | None, typer.Option(help="sampler steps of the calibration trajectories")] = None,
    sampler: Annotated[str | None, typer.Option(help="sampler of the calibration trajectories")] = None,
    trajectories: Annotated[int | None, typer.Option(help="trajectories to draw the samples from")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance of the calibration trajectories")] = None,
    rounds: Annotated[int | None, typer.Option(help="search rounds; 0 keeps min-max scales")] = None,
    seed: Seed = 0,
    ho: Annotated[bool, typer.Option("--ho/--no-ho", help="Hessian-guided objective, or squared error")] = True,
    mrq: Annotated[bool, typer.Option("--mrq/--no-mrq", help="multi-region grids, or uniform ones")] = True,
    tgq: Annotated[bool, typer.Option("--tgq/--no-tgq", help="time-grouped scales, or one for all t")] = True,
    overwrite: Overwrite = False,
    resumable: Annotated[
        bool, typer.Option("--resumable", help="keep finished work in OUT.work and continue from it; less memory")
    ] = False,
    json_file: JsonFile = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Calibrate on the model's own samples and write an artifact: packed integer weights and every scale.

    Under torchrun the processes share the work; the artifact is the same.
    """
    from tqdit import workflow
    from tqdit.recipe import Recipe

    check_outputs(json_file)
    settings: dict[str, Any] = {
        "groups": groups, "samples": samples, "steps": steps, "sampler": sampler, "trajectories": trajectories,
        "guidance": guidance, "rounds": rounds, "seed": seed, "hessian": ho,
    }  # fmt: skip
    if not mrq:
        settings |= {"softmax_grid": "uniform", "gelu_grid": "uniform"}
    if not tgq:
        settings |= {"time_grouped": "none"}
    _check_recipe_alone(context, recipe)
    chosen = Recipe.from_toml(recipe) if recipe else Recipe.build(preset, bits, **settings)
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:
        result = workflow.quantize(model, out, chosen, overwrite, report, world.device, resumable)
    if not world.first:
        return
    typer.echo(
        f"{out}: {result['name']} {chosen.bits} {chosen.label}, {result['size_bytes'] / 1e6:.2f} MB "
        f"({result['size_ratio']:.3f} of fp32), calibrated in {result['calibration_seconds']:.0f} s, "
        f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    write_json(json_file, result)


@app.command()
def sample(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="a .png for one grid; or a folder for an image each, resumed if begun")
    ],
    classes: Annotated[str, typer.Option(help="comma-separated names or numbers; default: all")] = "",
    num: Annotated[int, typer.Option("-n", "--num", help="number of images")] = 16,
    steps: Annotated[int, typer.Option(help="sampler steps")] = 50,
    sampler: Sampler = "ddim",
    guidance: Guidance = 1.5,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="images drawn at a time; what several processes share are batches")] = 16,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Sample images from a float or quantized model into one PNG grid, or into a folder; under torchrun, together."""
    from tqdit import workflow
    from tqdit.evaluation.generate import save_grid
    from tqdit.models.sampler import Sampling

    grid = _is_grid(out)
    names = [name for name in classes.split(",") if name.strip()]
    wanted = workflow.images_of(model, names, num, Sampling(sampler, steps, guidance), seed, batch)
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:
        if grid:
            pixels = workflow.sample_images(wanted, report, backend, world.device, dtype)
        else:
            new = workflow.sample_folder(wanted, out, report, backend, world.device, dtype)
    if not world.first:
        return
    if grid:
        save_grid(pixels, out)
    done = f"{num} images" if grid else f"{num} images ({new} new)"
    typer.echo(f"{out}: {done} of {model}, {sampler} {steps} steps, guidance {guidance}, seed {seed}")


@app.command()
def compare(
    reference: Annotated[str, typer.Argument(metavar="FLOAT", help="the float model")],
    quantized: Annotated[list[str], typer.Argument(metavar="QUANTIZED...", help="artifacts made from it")],
    num: Annotated[int, typer.Option("-n", "--num", help="images per model (PSNR, FD-fashion)")] = 16,
    samples: Annotated[int, typer.Option(help="held-out states per time group (SQNR)")] = 8,
    steps: Annotated[int, typer.Option(help="sampler steps")] = 50,
    sampler: Sampler = "ddim",
    guidance: Guidance = 1.5,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Measure artifacts against their float model: SQNR of epsilon, PSNR of same-seed images, FD-fashion, size.

    Under torchrun the processes share images and states.
    """
    from tqdit import comparison
    from tqdit.models.sampler import Sampling

    check_outputs(json_file)
    sampling = Sampling(sampler, steps, guidance)
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:
        result = comparison.compare(
            reference, list(quantized), num, sampling, samples, seed, report, world.device, dtype=dtype
        )
    if not world.first:
        return
    print_table(result)
    if json_file:
        write_text(json_file, result.to_json())


app.command()(bench)
app.command()(convert)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="an artifact")],
    json_file: JsonFile = None,
    backend: Backend = "auto",
    device: Device = "cpu",
) -> None:
    """List every site of an artifact: role, bits, grid, time groups, granularity, and the kernel that will run it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tqdit import workflow

    check_outputs(json_file)
    result = workflow.inspect(folder, backend, device)
    columns = ("name", "role", "bits", "grid", "groups", "granularity", "kernel")
    table = Table(*columns, box=None)
    for site in result["sites"]:
        table.add_row(*(escape(str(site[column])) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    write_json(json_file, result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for artifacts, report and summary")] = Path(
        "build/demo"
    ),
    quiet: Quiet = False,
) -> None:
    """Quantize the bundled model to W8A8 and W6A6, sample all three with the same seeds, and write a report."""
    from tqdit.demo import BITS, MODEL, run_demo
    from tqdit.files import check_target

    for bits in BITS:
        check_target(out / f"{MODEL}-{bits}", overwrite=True)
    check_outputs(out / "report.html", out / "side-by-side.png", out / "summary.json")
    with progress(quiet) as report:
        result = run_demo(out, report)
    print_table(result)
    typer.echo(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}")


def main() -> NoReturn:
    """Run the command line. Wrong input or an interrupt: one line on standard error and exit code 2."""
    from tqdit.errors import InputError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as Ctrl-C does
    try:
        code = app(standalone_mode=False)
    except (InputError, OSError) as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail(INTERRUPT_MESSAGE)
    except Exception as error:  # typer's own usage errors differ in base class between versions
        if not hasattr(error, "format_message"):
            if speaker := distributed.speaker():
                error.add_note(f"tqdit: {speaker}this process has failed")
            raise
        _fail(error.format_message())
    if code == INTERRUPTED:
        _fail(INTERRUPT_MESSAGE)
    sys.exit(code or 0)  # 1: a benchmark with models that failed


def _fail(message: str) -> NoReturn:
    if message and distributed.tells(message):  # a bare `tqdit` has printed its help
        print(f"tqdit: {distributed.speaker()}{message}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(2)


def _is_grid(out: Path) -> bool:
    """Whether `out` is for a grid, or for a folder of images; `InputError` if it can be neither."""
    from tqdit.errors import InputError

    if out.suffix.lower() == ".png":
        check_outputs(out)
        return True
    if out.suffix and not out.is_dir():
        raise InputError(f"output {out} must end in .png for a grid, or be a folder for an image each")
    return False


def _check_recipe_alone(context: typer.Context, recipe: Path | None) -> None:
    """`InputError` naming an option that the recipe file would silently override."""
    from tqdit.errors import InputError

    for name in IN_RECIPE if recipe else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--no-{name}" if context.params[name] is False else f"--{name}"
            raise InputError(f"{option} and --recipe exclude each other; set it in {recipe}")
