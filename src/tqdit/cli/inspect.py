"""Define the command `tqdit inspect`."""

from typing import Annotated

import typer

from tqdit.cli.console import print_inspection
from tqdit.cli.options import STDOUT, Backend, Device, JsonFile, Quiet, Verbose, check_outputs, write_json


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
    result = workflow.inspect(folder, backend=backend, device=device)
    if json_file != STDOUT:
        print_inspection(result, sites)
    write_json(json_file, result)
