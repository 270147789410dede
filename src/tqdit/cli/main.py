"""The command line: `tqdit quantize | sample | compare | bench | convert | inspect | demo`.

Commands import what they need.
"""

import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tqdit.cli.bars import QUANTIZE, progress
from tqdit.cli.bench import bench
from tqdit.cli.console import print_comparison, print_inspection
from tqdit.cli.convert import convert
from tqdit.cli.options import (
    STDOUT,
    Backend,
    Device,
    JsonFile,
    ModelArgument,
    Quiet,
    StoppedError,
    Terminated,
    Verbose,
    check_outputs,
    say,
    write_json,
    write_text,
)
from tqdit.system import distributed

app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize Diffusion Transformers with TQ-DiT and run them in integers. "
    "MODEL is a bundled name (fashion-dit), a diffusers transformer or pipeline folder, an official DiT checkpoint "
    "(.pt), owner/name of a model on the Hugging Face Hub, or an artifact.",
    epilog="Exit codes: 0 done; 1 a benchmark that lacks a model; 2 wrong input; 130 Ctrl-C; 143 SIGTERM.",
)

WRONG, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes; typer returns 130 for Ctrl-C inside a command
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
        typer.echo(f"tqdit {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    command = context.invoked_subcommand
    if command is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG)
    if command not in TOGETHER:
        distributed.check_alone(f"tqdit {command}")


@app.command(short_help="Calibrate a model and write an artifact.")
def quantize(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="artifact folder to write")],
    bits: Annotated[str, typer.Option(help="w<2-8>a<4-8>, such as w8a8, w6a6, w4a8")] = "w8a8",
    preset: Annotated[
        str, typer.Option(help="plus: better at little or no run-time cost; paper: as published")
    ] = "plus",
    recipe: Annotated[
        Path | None, typer.Option(help="a recipe file (TOML); then no other option of the method")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(help="time groups: equal ranges of timesteps with scales of their own; default 10")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="calibration samples per time group; default 32")] = None,
    steps: Annotated[int | None, typer.Option(help="sampler steps of calibration; default 250")] = None,
    sampler: Annotated[str | None, typer.Option(help="sampler of calibration: ddim or ddpm; default ddpm")] = None,
    trajectories: Annotated[
        int | None, typer.Option(help="sampling runs to draw the samples from; default: as few as give every sample")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance of calibration; default 1.5")] = None,
    rounds: Annotated[int | None, typer.Option(help="search rounds; 0 keeps min-max scales; default 3")] = None,
    seed: Seed = 0,
    ho: Annotated[bool, typer.Option("--ho/--no-ho", help="Hessian-guided objective, or squared error")] = True,
    mrq: Annotated[bool, typer.Option("--mrq/--no-mrq", help="multi-region grids, or uniform ones")] = True,
    tgq: Annotated[bool, typer.Option("--tgq/--no-tgq", help="time-grouped scales, or one for all t")] = True,
    overwrite: Overwrite = False,
    resumable: Annotated[
        bool, typer.Option("--resumable", help="keep finished work in OUT.work and continue from it; less memory")
    ] = False,
    json_file: JsonFile = None,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate on the model's own samples and write an artifact: packed integer weights and every scale.

    The defaults of --groups to --rounds are those of both presets; a recipe file has every setting. Under torchrun the
    processes share the work; the artifact is the same.
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
    with (
        _work_is_mentioned(out, resumable),
        distributed.joined(device) as world,
        progress(quiet or not world.first, QUANTIZE) as report,
    ):
        result = workflow.quantize(model, out, chosen, overwrite, report, world.device, resumable)
    if not world.first:
        return
    say(
        f"{out}: {result['name']} {chosen.bits} {chosen.label}, calibrated in {result['calibration_seconds']:.0f} s, "
        f"process peak {result['peak_memory_bytes'] / 2**30:.2f} GiB\n"
        f"{result['size_bytes'] / 1e6:.2f} MB: {result['size_ratio_file']:.3f} of the {result['file_dtype']} file, "
        f"{result['size_ratio_bfloat16']:.3f} of bf16, {result['size_ratio']:.3f} of fp32",
        json_file,
    )
    if not quiet:
        say(f"next: tqdit sample {shlex.quote(str(out))} -o grid.png", json_file)
    write_json(json_file, result)


@app.command(short_help="Sample images into a grid or a folder.")
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
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Sample images from a float or quantized model into one PNG grid, or into a folder; under torchrun, together."""
    from tqdit import workflow
    from tqdit.imaging.generate import save_grid
    from tqdit.sampling.guidance import Sampling

    grid = _is_grid(out)
    names = [name for name in classes.split(",") if name.strip()]
    wanted = workflow.images_of(model, names, num, Sampling(sampler, steps, guidance), seed, batch)
    begun: list[float] = []
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:

        def noted(stage: str, fraction: float) -> None:
            begun[:] = begun or [time.perf_counter()]  # the model is loaded
            report(stage, fraction)

        if grid:
            pixels, new = workflow.sample_images(wanted, noted, backend, world.device, dtype), num
        else:
            new = workflow.sample_folder(wanted, out, noted, backend, world.device, dtype)
        seconds = time.perf_counter() - begun[0]
    if not world.first:
        return
    if grid:
        save_grid(pixels, out)
    speed = f" in {seconds:.1f} s ({new / seconds:.2f} images/s)" if new else ""
    done = f"{num} images" if grid else f"{num} images ({new} new)"
    typer.echo(f"{out}: {done} of {model}{speed}\n{sampler} {steps} steps, guidance {guidance:g}, seed {seed}")
    if not quiet:
        typer.echo(f"next: {_after_sampling(model, wanted.source)}")


@app.command(short_help="Measure artifacts against their float model.")
def compare(
    reference: Annotated[str, typer.Argument(metavar="FLOAT", help="the float model")],
    quantized: Annotated[list[str], typer.Argument(metavar="QUANTIZED...", help="artifacts made from it")],
    num: Annotated[int, typer.Option("-n", "--num", help="images per model (PSNR, FD-fashion)")] = 16,
    samples: Annotated[int, typer.Option(help="held-out states in each of ten ranges of timesteps (SQNR)")] = 8,
    steps: Annotated[int, typer.Option(help="sampler steps")] = 50,
    sampler: Sampler = "ddim",
    guidance: Guidance = 1.5,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="also time calls and measure memory")] = True,
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
    sampling = Sampling(sampler, steps, guidance)
    with distributed.joined(device) as world, progress(quiet or not world.first) as report:
        result = comparison.compare(
            reference, list(quantized), num, sampling, samples, seed, report, world.device, dtype=dtype, cost=cost
        )
    if not world.first:
        return
    if json_file != STDOUT:
        print_comparison(result)
    if json_file:
        write_text(json_file, result.to_json())


app.command(short_help="Time artifacts against float and torchao models.")(bench)
app.command(short_help="Turn a checkpoint into a diffusers folder.")(convert)


@app.command(short_help="Say what an artifact is.")
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="an artifact")],
    sites: Annotated[bool, typer.Option("--sites", help="name every site")] = False,
    json_file: JsonFile = None,
    backend: Backend = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what an artifact is, and what its sites have: role, bits, grid, time groups, granularity, kernel."""
    from tqdit import workflow

    check_outputs(json_file)
    result = workflow.inspect(folder, backend, device)
    if json_file != STDOUT:
        print_inspection(result, sites)
    write_json(json_file, result)


@app.command(short_help="The whole way on the bundled model, with a report.")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for artifacts, report and summary")] = Path(
        "build/demo"
    ),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize the bundled model to W8A8 and W6A6, sample all three with the same seeds, and write a report."""
    from tqdit.cli.demo import BITS, MODEL, STAGES, run_demo
    from tqdit.system.extras import check_report
    from tqdit.system.files import check_target

    check_report()
    for bits in BITS:
        check_target(out / f"{MODEL}-{bits}", overwrite=True)
    check_outputs(out / "report.html", out / "side-by-side.png", out / "summary.json")
    with progress(quiet, STAGES) as report:
        result = run_demo(out, report)
    print_comparison(result)
    typer.echo(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}")


def main() -> NoReturn:
    """Run the command line. Wrong input or an interrupt: one line on standard error; the exit code says which."""
    from tqdit.errors import InputError

    signal.signal(signal.SIGTERM, _terminate)  # a polite kill cleans up as Ctrl-C does
    with _notes_in_one_line():
        try:
            code = app(standalone_mode=False)
        except (InputError, OSError) as error:
            _fail(str(error))
        except StoppedError as stopped:
            _fail(str(stopped), stopped.code)
        except Terminated:
            _fail(INTERRUPT_MESSAGE, TERMINATED)
        except (KeyboardInterrupt, typer.Abort):
            _fail(INTERRUPT_MESSAGE, INTERRUPTED)
        except Exception as error:  # typer's own usage errors differ in base class between versions
            if not hasattr(error, "format_message"):
                if speaker := distributed.speaker():
                    error.add_note(f"tqdit: {speaker}this process has failed")
                raise
            _fail(error.format_message())
    if code == INTERRUPTED:
        _fail(INTERRUPT_MESSAGE, INTERRUPTED)
    sys.exit(code or 0)  # 1: a benchmark with models that failed


def _terminate(*_: Any) -> NoReturn:
    raise Terminated


def _fail(message: str, code: int = WRONG) -> NoReturn:
    line = f"tqdit: {distributed.speaker()}{message}"
    if message and distributed.tells(message):  # a bare `tqdit` has printed its help
        print(line, file=sys.stderr)
    distributed.leave_reason(line)
    sys.stdout.flush()
    sys.exit(code)


@contextmanager
def _work_is_mentioned(out: Path, resumable: bool) -> Iterator[None]:
    """Who interrupts a long `quantize` is told what is kept, or how it could have been."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        if resumable:
            from tqdit.system.jobs import work_of

            work = work_of(out)
            kept = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) / 1e6
            hint = (
                f"the same command goes on from {work.name} ({kept:.1f} MB kept)"
                if kept
                else "nothing was finished yet"
            )
        else:
            hint = "with --resumable, finished work would be kept for the same command to go on"
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        raise StoppedError(f"{INTERRUPT_MESSAGE}; {hint}", code) from None


@contextmanager
def _notes_in_one_line() -> Iterator[None]:
    """tqdit's own warnings are for the user, one line each, told by one process; others look as ever."""
    here = Path(__file__).parent.parent

    with warnings.catch_warnings():
        shown_before = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any
        ) -> None:
            if here not in Path(filename).parents and category.__module__ != "tqdit.errors":
                shown_before(message, category, filename, lineno, *rest, **more)
            elif distributed.launched()[0] == 0:
                print(f"tqdit: note: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield


def _after_sampling(model: str, source: Any) -> str:
    """A command that makes sense after images of `model`."""
    name = shlex.quote(model)
    return f"tqdit compare FLOAT {name}" if source.quantized else f"tqdit quantize {name} -o w8a8"


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
