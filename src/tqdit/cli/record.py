"""Define the command `tqdit record`."""

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqdit.cli.bars import progress
from tqdit.cli.options import LEAST_STEPS, Device, Negative, Quiet, Seed, Size, Verbose, pixels, text_lines

if TYPE_CHECKING:
    from tqdit.calibration.calls import Calls
    from tqdit.calibration.pipeline_calls import Recording

OWN_PROMPTS = Path(__file__).resolve().parents[1] / "data" / "prompts.txt"
INDEX = "model_index.json"  # what a folder of a pipeline has
GIVEN = ("self", "prompt", "class_labels", "kwargs")  # arguments of a pipeline that need no value of the user's


def record(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="folder of a diffusers pipeline")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="file of calls to write; a folder for a pipeline of two transformers")
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="text file (UTF-8) with a prompt a line, or a class a line for a model of classes; "
            "default: 64 prompts that come with tqdit"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=LEAST_STEPS, help="sampler steps; default: the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; default: the pipeline's")] = None,
    size: Size = None,
    negative: Negative = None,
    per_group: Annotated[int, typer.Option(min=1, help="calls to keep of each time group")] = 32,
    groups: Annotated[int, typer.Option(min=1, help="time groups")] = 10,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="of the pipeline: bfloat16, float16 or float32")] = "bfloat16",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace calls that were recorded before")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a pipeline once for each prompt, and record the calls of its transformer, to quantize it by."""
    import torch

    from tqdit.calibration import recording
    from tqdit.calibration.pipeline_calls import check_output
    from tqdit.runtime.target import Target

    check_output(out, overwrite)
    lines, where = text_lines(prompts or OWN_PROMPTS), Target(device=device, dtype=dtype)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative, **pixels(size)}
    pipe = _pipeline(model, where.dtype)
    recording.transformers(pipe)  # before any work: there is one
    calls = [_arguments(pipe, line, options, prompts) for line in lines]
    pipe.to(where.device)
    pipe.set_progress_bar_config(disable=True)
    with progress(quiet) as report, recording.record(pipe, per_group=per_group, groups=groups, seed=seed) as recorded:
        for index, arguments in enumerate(calls):
            report("prompts", index / len(calls))
            _run(pipe, arguments | {"generator": torch.Generator().manual_seed(seed + index)})
        report("prompts", 1.0)
    recorded.save(out, overwrite)
    for text in _summary(out, recorded, len(lines), groups):
        typer.echo(text)


def _pipeline(folder: Path, dtype: Any) -> Any:
    """Return the pipeline of a folder, without the components that the folder leaves out.

    Raises `InputError` naming the folder if it has no pipeline with a transformer, or diffusers refuses it.
    """
    from diffusers import DiffusionPipeline

    from tqdit.errors import InputError
    from tqdit.system.files import read_json

    if not folder.is_dir():
        raise InputError(_no_folder(folder))
    index = read_json(folder / INDEX, "the folder of a pipeline has one")
    parts = {name: entry for name, entry in index.items() if name[:1] != "_" and isinstance(entry, list)}
    if not any("transformer" in name for name in parts):
        raise InputError(f"{folder} has no transformer; its components are {', '.join(parts) or 'none'}")
    absent = {name: None for name, entry in parts.items() if not all(entry)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.39 knows no other name than `torch_dtype`
        try:
            return DiffusionPipeline.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **absent
            )
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise InputError(f"{folder}: diffusers cannot load the pipeline: {error}") from error


def _no_folder(path: Path) -> str:
    """Return what is wrong with a path that is no folder, in the words of the other commands."""
    from tqdit.sources.resolve import BUNDLED

    expected = "give the folder of a diffusers pipeline"
    if path.exists():
        return f"'{path}' is not a folder; {expected}"
    if str(path) in BUNDLED:
        return f"'{path}' is a bundled model, which is quantized without recorded calls; {expected}"
    return f"unknown model '{path}'; {expected}"


def _arguments(pipe: Any, line: str, options: Mapping[str, Any], prompts: Path | None) -> dict[str, Any]:
    """Return what a pipeline is called with for a line of the prompts file.

    Raises `InputError` for an option that the pipeline does not take, and for a pipeline that needs more than a prompt.
    """
    from tqdit.errors import InputError

    kind, taken = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in options.items() if value is not None}
    if refused := sorted(given.keys() - taken.keys()):
        raise InputError(f"a {kind} takes no {refused[0]}; leave the option out")
    needed = [name for name, parameter in taken.items() if parameter.default is parameter.empty and name not in GIVEN]
    if needed:
        raise InputError(f"a {kind} needs {needed[0]} beside a prompt; record it with tqdit.record in Python")
    if "output_type" in taken:
        given["output_type"] = "latent"
    if "prompt" in taken:
        return given | {"prompt": line}
    if "class_labels" not in taken:
        raise InputError(f"a {kind} takes no prompt; record it with tqdit.record in Python")
    if prompts is None:
        raise InputError(f"a {kind} is sampled by class: give a file with a class on each line by --prompts")
    if getattr(pipe, "vae", None) is None:
        raise InputError(f"a {kind} without a vae cannot run; record its transformer with tqdit.record in Python")
    return given | {"class_labels": [int(line) if line.isdigit() else _label(pipe, line)]}


def _label(pipe: Any, name: str) -> int:
    from tqdit.errors import InputError

    try:
        return int(pipe.get_label_ids([name])[0])
    except ValueError:
        raise InputError(f"'{name}' is no class of this pipeline") from None


def _run(pipe: Any, arguments: Mapping[str, Any]) -> None:
    from tqdit.errors import InputError

    try:
        pipe(**arguments)
    except InputError:
        raise
    except ValueError as error:  # so a pipeline says what it is wrongly called with
        raise InputError(f"the pipeline refuses the call: {error}") from error


def _summary(out: Path, recorded: "Recording", prompts: int, groups: int) -> list[str]:
    """Return lines that say how many calls of each time group were kept."""
    kept = " and ".join(f"{len(calls)} calls of {name} ({calls.kind})" for name, calls in recorded.items())
    lines = [f"{out}: {kept}, from {prompts} prompt{'s' if prompts > 1 else ''}"]
    for name, calls in recorded.items():
        lines += [f"{name}: calls per time group", *_counts(calls, groups)]
    return lines


def _counts(calls: "Calls", groups: int) -> list[str]:
    found = calls.time_groups(groups)
    counts = found.index(calls.times).bincount(minlength=found.num_groups).tolist()
    ends = [found.bounds(group) for group in range(found.num_groups)]
    return [f"  {calls.timestep} from {low:g} to {high:g}: {n}" for (low, high), n in zip(ends, counts, strict=True)]
