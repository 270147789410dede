"""Define what the commands share: options that mean the same in each, and the files that they write."""

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tqdit.sampling.guidance import Conditions

STDOUT = Path("-")  # the file name that means standard output


class _ToStderr(logging.StreamHandler[Any]):
    """A handler that writes to the standard error of the moment, which progress bars replace by their own."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to the present standard error."""
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr(wanted: bool) -> None:
    logger = logging.getLogger("tqdit")
    if wanted and not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())
        logger.setLevel(logging.INFO)


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="bundled name, diffusers folder, official .pt, owner/name on the Hub, artifact"
    ),
]
Device = Annotated[str, typer.Option(help="torch device: auto (a GPU where there is one), cpu, cuda, cuda:1")]
Backend = Annotated[
    str,
    typer.Option(help="integer backend: auto, cpu, triton, triton-packed, reference; simulated checks, never timed"),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="write the result as JSON; - is standard output, with nothing else on it")
]
LEAST_STEPS = 1  # of a sampling run, in every command; those of a calibration are a setting of the recipe
Steps = Annotated[int, typer.Option(min=LEAST_STEPS, help="sampler steps")]
Num = Annotated[int, typer.Option("-n", "--num", help="number of images; where models are compared, of each")]
Batch = Annotated[int, typer.Option(help="images drawn at a time; what several processes share are batches")]
Classes = Annotated[str | None, typer.Option(help="comma-separated names or numbers; default: all")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed; the same seed gives the same bytes")]
Guidance = Annotated[float, typer.Option(min=0.0, help="classifier-free guidance; 1 turns it off")]
Sampler = Annotated[str, typer.Option(help="auto (ddim, or flow for a flow-matching model), ddim, ddpm or flow")]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="embeddings of prompts (.safetensors), for a model of prompts"),
]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="pixels; default: the pipeline's")]
Negative = Annotated[str | None, typer.Option(help="negative prompt")]
Dtype = Annotated[
    str,
    typer.Option(
        help="of an artifact's residual stream: float32; bfloat16, faster on GPUs; float16 where fp16 can hold it"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no hints")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_log_to_stderr, help="say more on standard error, and all about errors"),
]


def listed(text: str) -> list[str]:
    """Return the different entries of a comma-separated list, in order."""
    return list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))


def class_names(text: str | None) -> list[str]:
    """Return the entries of `--classes`; none without the option, for all classes. Raises `InputError` for no entry."""
    from tqdit.errors import InputError

    names = [name for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:
        raise InputError(f"--classes names no class, got '{text}'; leave it out for all classes")
    return names


def read_prompts(path: Path | None) -> "Conditions | None":
    """Return the prompts of a file; None without a file."""
    from tqdit.sampling.prompts import Prompts as Embeddings

    return None if path is None else Embeddings.read(path)


def text_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Raises `InputError` naming the file."""
    from tqdit.errors import InputError
    from tqdit.system.reading import read_bytes

    try:
        text = read_bytes(path, why="a prompts file has a prompt on each line").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} has no prompt; it needs one on each line")
    return lines


def pixels(size: str | None) -> dict[str, int]:
    """Return the height and width of text such as "512x768", as arguments of a pipeline; nothing without a text."""
    from tqdit.errors import InputError

    if size is None:
        return {}
    height, _, width = size.lower().partition("x")
    if not all(side.isascii() and side.isdigit() and len(side) <= 5 and int(side) > 0 for side in (height, width)):
        raise InputError(f"--size must be HxW in pixels, such as 512x768, got '{size}'")
    return {"height": int(height), "width": int(width)}


def command() -> str:
    """Return the present command, as a shell takes it."""
    return shlex.join(["tqdit", *sys.argv[1:]])


def with_prompts(command: str, path: Path | None) -> str:
    """Return a command with the prompts of the present command, if there are any."""
    return command if path is None else f"{command} --prompts {shlex.quote(str(path))}"


def check_outputs(*paths: Path | None) -> None:
    """Raise `InputError` for a file that cannot be written, before any work for it is done."""
    from tqdit.system.outputs import check_file

    for path in paths:
        if path and path != STDOUT:
            check_file(path)


def say(text: str, json_file: Path | None = None) -> None:
    """Print a line on standard output, unless JSON goes there: then JSON has standard output for itself."""
    if json_file != STDOUT:
        typer.echo(text)


def write_json(path: Path | None, value: Any) -> None:
    """Write a value as JSON, and say on standard error to which file; do nothing without a path."""
    import json

    if path:
        write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text as a whole or not at all, and say on standard error where; or print it on standard output."""
    from tqdit.system import files

    if path == STDOUT:
        typer.echo(text, nl=False)
        return
    files.write_text(path, text)
    typer.echo(f"figures: {path}", file=sys.stderr)
