"""Define the command line: `tqdit record | quantize | sample | compare | evaluate | bench | convert | inspect | ...`.

Each command imports what it needs when it runs.
"""

import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tqdit.cli.bench import bench
from tqdit.cli.compare import compare
from tqdit.cli.convert import convert
from tqdit.cli.demo import demo
from tqdit.cli.evaluate import evaluate
from tqdit.cli.exits import INTERRUPT_MESSAGE, INTERRUPTED, TERMINATED, WRONG, StoppedError, Terminated
from tqdit.cli.inspect import inspect
from tqdit.cli.quantize import quantize
from tqdit.cli.record import record
from tqdit.cli.report import report
from tqdit.cli.sample import sample
from tqdit.cli.serve import serve
from tqdit.system import torchrun

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

TOGETHER = ("quantize", "sample", "compare", "evaluate")  # commands that several processes share
COMMANDS: Mapping[Callable[..., None], str] = {
    record: "Record the calls of a pipeline's transformer.",
    quantize: "Calibrate a model and write an artifact.",
    sample: "Sample images into a grid or a folder.",
    compare: "Measure artifacts against their float model.",
    report: "Make a page of saved comparisons.",
    evaluate: "Measure FID and other scores of many images.",
    bench: "Time artifacts against float and torchao models.",
    convert: "Turn a checkpoint into a diffusers folder.",
    inspect: "Say what an artifact is.",
    serve: "Draw images with several models on a page.",
    demo: "The whole way on the bundled model, with a report.",
}
NUMBERS = {"integer": "a whole number", "integer range": "a whole number", "float": "a number",
           "float range": "a number"}  # fmt: skip
NO_NUMBER = re.compile(rf"'(.*)' is not a valid ({'|'.join(NUMBERS)})\.", re.DOTALL)


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
    """Handle a call without a command, and refuse several processes for a command of one."""
    command = context.invoked_subcommand
    if command is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG)
    if command not in TOGETHER:
        torchrun.check_alone(f"tqdit {command}")


for _command, _help in COMMANDS.items():
    app.command(short_help=_help)(_command)


def main() -> NoReturn:
    """Run the command line.

    Wrong input or an interrupt prints one line on standard error. The exit code says which of the two it was.
    """
    from tqdit.errors import InputError, PromptsNeededError

    signal.signal(signal.SIGTERM, _terminate)  # so that clean-up runs as for Ctrl-C
    with _notes_in_one_line():
        try:
            code = app(standalone_mode=False)
        except PromptsNeededError as error:
            _fail(f"{error} (--prompts FILE on the command line)")
        except (InputError, OSError) as error:
            _fail(str(error))
        except StoppedError as stopped:
            _fail(str(stopped), stopped.code)
        except Terminated:
            _fail(INTERRUPT_MESSAGE, TERMINATED)
        except (KeyboardInterrupt, typer.Abort):
            _fail(INTERRUPT_MESSAGE, INTERRUPTED)
        except Exception as error:  # typer's usage errors differ in base class between versions
            if not hasattr(error, "format_message"):
                if speaker := torchrun.speaker():
                    error.add_note(f"tqdit: {speaker}this process has failed")
                raise
            _fail(_usage(error))
    if code == INTERRUPTED:
        _fail(INTERRUPT_MESSAGE, INTERRUPTED)
    sys.exit(code or 0)  # the code 1 means a benchmark with models that failed


def _usage(error: Any) -> str:
    """Return the message of the parser's usage error; for a wrong number, in the words of every other error.

    Typer checks numbers by pydantic. Before version 0.29 it used click, whose only messages are strings.
    """
    text, names = str(getattr(error, "message", "")), getattr(getattr(error, "param", None), "opts", None)
    if names and hasattr(error.__cause__, "errors"):
        from tqdit.system.validation import legal

        first = error.__cause__.errors()[0]
        if expected := legal(first):
            return f"{names[-1]} must be {expected}, got '{first['input']}'"
    if names and (found := NO_NUMBER.fullmatch(text)):
        return f"{names[-1]} must be {NUMBERS[found[2]]}, got '{found[1]}'"
    return str(error.format_message())


def _terminate(*_: Any) -> NoReturn:
    raise Terminated


def _fail(message: str, code: int = WRONG) -> NoReturn:
    line = f"tqdit: {torchrun.speaker()}{message}"
    if message and torchrun.tells(message):  # there is no message where `tqdit` alone has printed its help
        print(line, file=sys.stderr)
    torchrun.leave_reason(line)
    sys.stdout.flush()
    sys.exit(code)


@contextmanager
def _notes_in_one_line() -> Iterator[None]:
    """Print tqdit's own warnings as one line each, by one process. Other warnings look as usual."""
    here = Path(__file__).parent.parent

    with warnings.catch_warnings():
        shown_before = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any
        ) -> None:
            if here not in Path(filename).parents and category.__module__ != "tqdit.errors":
                shown_before(message, category, filename, lineno, *rest, **more)
            elif torchrun.launched()[0] == 0:
                print(f"tqdit: note: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield
