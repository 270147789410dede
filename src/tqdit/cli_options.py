"""What the commands share: options that mean the same in each, and the files they write."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="bundled name, diffusers folder, official .pt, owner/name on the Hub, artifact"
    ),
]
Device = Annotated[str, typer.Option(help="torch device: cpu, cuda, cuda:1")]
Backend = Annotated[
    str,
    typer.Option(help="integer backend: auto, cpu, triton, triton-packed, reference; simulated checks, never timed"),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the result here as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]


def listed(text: str) -> list[str]:
    """The different entries of a comma-separated list, in order."""
    return list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))


def check_outputs(*paths: Path | None) -> None:
    """`InputError` for a file that cannot be written, before the work whose result it is for."""
    from tqdit.files import check_file

    for path in paths:
        if path:
            check_file(path)


def write_json(path: Path | None, value: Any) -> None:
    """JSON with a line on standard error that says where; nothing without a path."""
    import json

    if path:
        write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Text, whole or not at all, with the same line."""
    from tqdit import files

    files.write_text(path, text)
    typer.echo(f"figures: {path}", file=sys.stderr)
