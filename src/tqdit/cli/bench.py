"""Define the command `tqdit bench`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tqdit.cli.bars import progress
from tqdit.cli.console import print_benchmark
from tqdit.cli.options import (
    LEAST_STEPS,
    STDOUT,
    Backend,
    Device,
    JsonFile,
    Quiet,
    Sampler,
    Verbose,
    check_outputs,
    listed,
    write_json,
)
from tqdit.cli.settings import Set, flag, parsed, typed
from tqdit.cli.traced_tables import print_races
from tqdit.errors import InputError

if TYPE_CHECKING:
    from tqdit.speed.benchmark import RandomModel
    from tqdit.speed.blocks import Raced

# What --quick takes where nothing else is asked for: no torchao, whose models compile for minutes.
QUICK_REPEATS = 8
QUICK_AGAINST = {"cuda": "bfloat16"}  # by kind of device
ELSEWHERE = "float32,bfloat16"  # bf16 is the slower one on many processors
FAILED = 1  # exit code: the figures are written, but they lack a quantized model


def bench(
    context: typer.Context,
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help="artifacts to time")] = None,
    random: Annotated[
        str | None,
        typer.Option(
            help="also time random codes in a shape: DiT-{S,B,L,XL}/{2,4,8}, with @512 for 512 px; or blocks of "
            "published models, one or more names: flux.1-dev, flux.2-klein-4b, qwen-image, z-image, sd3.5-large, "
            "wan-1.3b, wan-14b, ltx-video, hunyuan-video, pixart"
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--blocks", min=1, help="of a published model: blocks of each kind; default 2")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="of a published model: image tokens at most; default as published")
    ] = None,
    bits: Annotated[str | None, typer.Option(help="of --random, comma-separated; default w8a8")] = None,
    preset: Annotated[str | None, typer.Option(help="of --random, comma-separated: paper, plus; default plus")] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="of --random, instead of both: comma-separated pairs such as plus:w8a8,paper:w6a6"),
    ] = None,
    assignments: Set = None,
    backend: Backend = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="of quantized models: float32, float16, bfloat16; default bfloat16 on a GPU, else float32"),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="baselines, comma-separated: float32, bfloat16, torchao, openvino (CPU), or one of theirs such as "
            "bf16-autotuned (GPU) or bf16-compiled; bf16-blocks, compiled as torchao's are on a GPU; empty for none"
        ),
    ] = "float32,bfloat16,torchao",
    batch: Annotated[
        str, typer.Option(help="samples of one denoiser call, two per image with guidance; comma-separated")
    ] = "16",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="a first answer: few calls, no sampling, no memory, no torchao, and on a GPU bf16 compiled without "
            "tuning every kernel (max-autotune); other options that are given hold",
        ),
    ] = False,
    repeats: Annotated[int, typer.Option(help="timed calls of each model; default 20, or 8 with --quick")] = 20,
    sampling: Annotated[bool, typer.Option(help="also time a full sampling run of each model")] = True,
    steps: Annotated[int, typer.Option(min=LEAST_STEPS, help="sampler steps of that run")] = 50,
    sampler: Sampler = "auto",
    memory: Annotated[bool, typer.Option(help="also measure loading and memory, in a process per model")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="print the kernel of every site")] = False,
    json_file: JsonFile = None,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time artifacts against float32, bfloat16 and torchao models of their shape: calls, sampling, loading, memory.

    On a CPU --against may also name openvino, for artifacts and DiT shapes. Blocks of published models are timed under
    the preset dynamic, eager and with compiled blocks, against bf16 and torchao's int8 and fp8; --against may also name
    bf16-autotuned and fp32-compiled.
    """
    from tqdit.runtime.target import checked_device
    from tqdit.sampling.guidance import Sampling
    from tqdit.speed import benchmark
    from tqdit.speed.entrants import BenchSettings

    check_outputs(json_file)
    if quick:
        repeats = repeats if typed(context, "repeats") else QUICK_REPEATS
        sampling, memory = sampling and typed(context, "sampling"), memory and typed(context, "memory")
    if names := _published(models or [], random):
        _race(context, names, depth, tokens, bits, against, repeats, device, json_file, quiet, quick)
        return
    for option, value in (("--blocks", depth), ("--tokens", tokens)):
        if value is not None:
            raise InputError(f"{option} is for the published models of --random")
    chosen = _random_models(random, bits, preset, variants, parsed(assignments))
    if quick and not typed(context, "against"):
        against = QUICK_AGAINST.get(checked_device(device).type, ELSEWHERE)
    run = Sampling(sampler, steps, 1.5) if sampling else None
    settings = BenchSettings(
        backend, _batches(batch), tuple(listed(against)), repeats, run, device, memory, dtype, quick
    )
    with progress(quiet) as report:
        result = benchmark.bench(models or [], chosen, settings, report)
    if json_file != STDOUT:
        print_benchmark(result, kernels)
    write_json(json_file, {"command": shlex.join(["tqdit", *sys.argv[1:]]), **result.figures()})
    if result.failed:
        typer.echo(f"tqdit: failed: {', '.join(result.failed)}", err=True)
        raise typer.Exit(FAILED)


# Options that blocks of published models have no use for.
OF_ARTIFACTS = ("preset", "variants", "assignments", "backend", "dtype", "batch", "sampling", "steps", "sampler",
                "memory", "kernels")  # fmt: skip


def _published(models: list[str], random: str | None) -> list[str]:
    """Return the published models that --random and the names after it ask for; none for other shapes.

    Raises `InputError` for published models beside artifacts.
    """
    from tqdit.speed.published import SHAPES, published

    names = listed(random or "")
    if not any(name in SHAPES for name in names):
        return []
    return [published(name).name for name in dict.fromkeys([*names, *models])]


def _race(
    context: typer.Context, names: list[str], depth: int | None, tokens: int | None, bits: str | None, against: str,
    repeats: int, device: str, json_file: Path | None, quiet: bool, quick: bool,
) -> None:  # fmt: skip
    """Time blocks of published models; the figures are written after each model."""
    from tqdit.speed import blocks
    from tqdit.speed.block_entrants import DEFAULT

    for name in OF_ARTIFACTS:
        if typed(context, name):
            raise InputError(f"{flag(context, name)} is for artifacts and DiT shapes, not blocks of published models")
    rivals = tuple(name for name in DEFAULT if not (quick and name.startswith("torchao")))
    if typed(context, "against"):
        rivals = tuple(listed(against))
    settings = blocks.BlockSettings(depth or 2, tokens, rivals, bits or "w8a8", repeats, device)
    command = {"command": shlex.join(["tqdit", *sys.argv[1:]])}

    def finished(found: Sequence["Raced"]) -> None:
        if json_file != STDOUT:
            write_json(json_file, command | blocks.figures(found, settings))

    with progress(quiet) as report:
        found = blocks.race(names, settings, report, finished)
    if json_file == STDOUT:
        write_json(json_file, command | blocks.figures(found, settings))
    else:
        print_races(found)
    if failed := [one.model for one in found if one.failed]:
        typer.echo(f"tqdit: failed: {', '.join(failed)}", err=True)
        raise typer.Exit(FAILED)


def _random_models(
    shape: str | None, bits: str | None, preset: str | None, variants: str | None, assigned: dict[str, str]
) -> list["RandomModel"]:
    """Return the models of random codes that --random and its options ask for."""
    from tqdit.recipe import Recipe
    from tqdit.speed.benchmark import RandomModel

    for option, value in (("--bits", bits), ("--preset", preset), ("--variants", variants)):
        if value is not None and shape is None:
            raise InputError(f"{option} is for --random; an artifact has its own")
        if variants is not None and value is not None and option != "--variants":
            raise InputError(f"{option} and --variants exclude each other")
    if assigned and shape is None:
        raise InputError("--set is for --random; an artifact has its own settings")
    if shape is None:
        return []
    pairs = [(a_preset, a_width) for a_preset in listed(preset or "plus") for a_width in listed(bits or "w8a8")]
    if variants is not None:
        pairs = [_pair(entry) for entry in listed(variants)]
    return [
        RandomModel(shape, Recipe(**{"preset": a_preset, "bits": a_width, **assigned})) for a_preset, a_width in pairs
    ]


def _pair(entry: str) -> tuple[str, str]:
    preset, colon, bits = entry.partition(":")
    if not colon:
        raise InputError(f"--variants takes pairs such as plus:w8a8, got '{entry}'")
    return preset, bits


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(entry) for entry in listed(text))
    except ValueError:
        raise InputError(f"--batch takes whole numbers such as 64,2, got '{text}'") from None
