"""Define the command `tqdit inspect`."""

from typing import Annotated

import typer

from tqdit.cli.console import print_inspection
from tqdit.cli.options import STDOUT, Backend, Device, JsonFile, Quiet, Verbose, check_outputs, write_json
from tqdit.cli.traced_tables import print_traced_inspection


def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="an artifact")],
    sites: Annotated[bool, typer.Option("--sites", help="name every site")] = False,
    json_file: JsonFile = None,
    backend: Backend = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what an artifact is, and what its sites have: role, bits, grid, time groups, granularity, kernel.

    Of an artifact made from recorded calls: what feeds the sites, and which layers stay in float and why.
    """
    from tqdit import workflow

    check_outputs(json_file)
    result = workflow.inspect(folder, backend=backend, device=device)
    if json_file != STDOUT:
        shown = print_traced_inspection if "traced" in result else print_inspection
        shown(result, sites)
    write_json(json_file, result)
