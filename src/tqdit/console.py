"""What the command line shows: progress bars with time left, and the table of a comparison."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdit.comparison import Comparison


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Progress bars with time left on standard error, one per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    bars = Progress(*columns, console=Console(stderr=True), disable=quiet)

    def report(stage: str, fraction: float) -> None:
        bars.start()  # not before: wrong input prints its one line and nothing else
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=1.0)
        bars.update(tasks[stage], completed=fraction)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def print_table(result: "Comparison") -> None:
    """The figures of a comparison, the float model first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "model", "preset", "bits", "MB", "of fp32", "calib. s", "SQNR dB", "PSNR dB",
        f"FD-fashion (n={result.settings['num']})", box=None,
    )  # fmt: skip

    def cell(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    for row in (result.float_model, *result.models):
        table.add_row(
            escape(row.name), row.preset or "–", row.bits, cell(row.size_bytes / 1e6, 2), cell(row.size_ratio, 3),
            cell(row.calibration_seconds, 0), cell(row.eps.overall if row.eps else None, 1), cell(row.psnr_db, 1),
            cell(row.fd_fashion, 1),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)
