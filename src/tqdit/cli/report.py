"""Define the command `tqdit report`."""

from pathlib import Path
from typing import Annotated

import typer

from tqdit.cli.options import Quiet, Verbose, check_outputs


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="files that `tqdit compare --out` saved")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the page")] = Path("report.html"),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make one page of saved comparisons: figures, images, fidelity over time, the most sensitive sites with advice.

    The page is one file that needs no network. Runs of one float model and one protocol share a table; others get
    sections of their own, which say what differs.
    """
    from tqdit.quality import run_file
    from tqdit.report.page import write_report
    from tqdit.system.extras import check_report

    check_report()
    check_outputs(out)
    write_report([run_file.read(path) for path in runs], out)
    typer.echo(f"report: {out}")
