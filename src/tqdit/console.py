"""What the command line shows: progress bars with time left, and the tables of a comparison and of a benchmark."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdit.benchmark import Benchmark
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

    for row in (result.float_model, *result.models):
        table.add_row(
            escape(row.name), row.preset or "–", row.bits, _cell(row.size_bytes / 1e6, 2), _cell(row.size_ratio, 3),
            _cell(row.calibration_seconds, 0), _cell(row.eps.overall if row.eps else None, 1), _cell(row.psnr_db, 1),
            _cell(row.fd_fashion, 1),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_benchmark(result: "Benchmark", every_site: bool = False) -> None:
    """The figures of a benchmark, what was skipped and why, and the kernels: counted, or those of `every_site`."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    families = list(dict.fromkeys(family for row in result.rows for family in row.speedup_over))
    table = Table(
        "model", "bits", "runs in", "workload", "ms p20", "p50", "p80", *(f"x {family}" for family in families),
        "img/s", "peak MB", "loaded MB", "load s", "of peak", box=None,
    )  # fmt: skip
    for row in result.rows:
        table.add_row(
            escape(row.model), " ".join(filter(None, (row.bits, row.preset))) or "float", row.backend,
            row.workload, *(_cell(ms, 1) for ms in (row.p20_ms, row.p50_ms, row.p80_ms)),
            *(_cell(row.speedup_over.get(family), 2) for family in families),
            _cell(row.images_per_second, 3), _cell(_mega(row.peak_bytes), 0), _cell(_mega(row.resident_bytes), 0),
            _cell(row.load_seconds, 1), _cell(row.floor_fraction, 2),
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    where = result.environment
    console.print(
        f"of peak: least time at this machine's {where['int8_peak_gops']:.0f} G int8 operations/s and "
        f"{where['read_gb_per_s']:.0f} GB/s, over p50", highlight=False, soft_wrap=True,
    )  # fmt: skip
    for name, reason in result.skipped.items():
        console.print(escape(f"skipped {name}: {reason}"), highlight=False)
    shown = set()
    for row, (model, sites) in zip([row for row in result.rows if row.integer], result.sites, strict=True):
        if (title := " ".join(filter(None, (model, row.preset, row.bits)))) in shown:
            continue  # the same at another batch size
        shown.add(title)
        console.print(escape(f"kernels of {title}:"), highlight=False)
        lines = sites.items() if every_site else ((f"{count:>6} x", kernel) for kernel, count in row.kernels.items())
        for left, kernel in lines:
            console.print(escape(f"  {left} {kernel}"), highlight=False, soft_wrap=True)


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6
