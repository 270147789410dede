"""Print the tables of the command line. All of them fit 80 columns, and figures are never cut."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdit.provenance import Provenance

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tqdit.quality.equivalence import Verdict
    from tqdit.quality.samples import Comparison
    from tqdit.speed.benchmark import Benchmark, TimedModel

WIDTH = 80  # columns of an output that is not a terminal
QUICK_NOTE = "compiled: by torch.compile without tuning every kernel (max-autotune); without --quick, they are."
FEW_IMAGES = 100  # with fewer images FD-fashion depends more on their number than on the model


def print_comparison(result: "Comparison") -> None:
    """Print the figures of a comparison, the float model first: quality, then size and cost."""
    console, rows = console_of(), (result.float_model, *result.models)
    seconds = any(row.calibration_seconds is not None for row in rows)
    quality = table_of(("model", "preset"), ("bits", "SQNR dB", "PSNR dB", "FD-fashion", *["calib. s"] * seconds))
    for row in rows:
        figures = [row.bits, cell(row.eps.overall if row.eps else None, 1), cell(row.psnr_db, 1)]
        figures += [cell(row.fd_fashion, 1), *[cell(row.calibration_seconds, 0)] * seconds]
        add_row(quality, (row.name, row.preset or "–"), figures)
    console.print(quality)
    console.print()
    cost = table_of(
        ("model",), ("MB", "of\nfile", "of\nbf16", "of\nfp32", "ms a\ncall", "x eager\nfloat32", "peak\nMB")
    )
    fp32 = result.float_model.size_bytes
    for row in rows:
        ratios = [row.disk_bytes / whole for whole in (result.float_model.disk_bytes, fp32 / 2, fp32)]
        spent = row.cost
        figures = [cell(row.disk_bytes / 1e6, 2), *(cell(ratio, 3) for ratio in ratios)]
        figures += [cell(spent.ms_per_call if spent else None, 1), cell(spent.speedup if spent else None, 2)]
        add_row(cost, (row.name,), [*figures, cell(_mega(spent.peak_bytes if spent else None), 0)])
    console.print(cost)
    console.print()
    for note in _notes(result):
        console.print(note, markup=False)


def _notes(result: "Comparison") -> list[str]:
    """Return sentences that say what the figures of a comparison measure."""
    s, first = result.settings, result.float_model
    notes = [
        f"SQNR of epsilon: {s['states']} held-out states, {s['samples_per_group']} in each of {s['groups']} ranges of "
        f"timesteps; PSNR: {s['num']} images of the same seeds; both against the float model."
    ]
    if first.fd_fashion is not None and s["num"] < FEW_IMAGES:
        notes.append(
            f"FD-fashion of {s['num']} images is biased upwards: read it against the float model's own "
            f"{cell(first.fd_fashion, 1)}, or draw more (-n 2000)."
        )
    notes += [_verdict(row.name, row.verdict) for row in result.models if row.verdict]
    notes.append(f"of file: the {first.file_dtype} weights that were quantized.")
    if "call_batch" in s:
        notes.append(
            f"ms a call: median of warm calls with {s['call_batch']} samples, in one run with the float model in eager "
            "float32; `tqdit bench` has compiled baselines. peak MB: memory during a call, in a process of its own."
        )
    return notes


def _verdict(name: str, verdict: "Verdict") -> str:
    """Return a sentence that says how the equivalence test of a model ended."""
    from tqdit.quality.equivalence import ENOUGH

    kid, error = verdict.kid, verdict.log_error
    passed = "equivalent" if verdict.n >= ENOUGH else f"no difference as far as {verdict.n} images can tell"
    text = (
        f"{name}: {passed if verdict.equivalent else 'equivalence not shown'} (KID {kid.lower:+.2g} to "
        f"{kid.upper:+.2g} of the float model's, margin {verdict.margin:.2g})"
    )
    if error is None:
        return f"{text}, by {verdict.n} images."
    return (
        f"{text}; closer to float32 than bfloat16: {'yes' if verdict.closer_than_bf16 else 'not shown'} (log squared "
        f"error {error.lower:+.2f} to {error.upper:+.2f} of bfloat16's)."
    )


def print_benchmark(result: "Benchmark", every_site: bool = False) -> None:
    """Print the figures of a benchmark, the skipped models with the reasons, and the kernels.

    Kernels are counted, or listed by site with `every_site`.
    """
    console = console_of()
    families = list(dict.fromkeys(family for row in result.rows for family in row.speedup_over))
    for workload in dict.fromkeys(row.workload for row in result.rows):
        members = [row for row in result.rows if row.workload == workload]
        speed = table_of(
            (workload,), ("ms p20", "p50", "p80", *(f"x\n{_short(family)}" for family in families), "img/s")
        )
        memory = table_of(("",), ("peak MB", "loaded MB", "load s", "of peak"))
        for row in members:
            figures = [cell(ms, 1) for ms in (row.p20_ms, row.p50_ms, row.p80_ms)]
            figures += [cell(row.speedup_over.get(family), 2) for family in families]
            add_row(speed, (_contender(row),), [*figures, cell(row.images_per_second, 3)])
            figures = [cell(_mega(row.peak_bytes), 0), cell(_mega(row.resident_bytes), 0)]
            if row.peak_bytes is not None or row.floor_fraction is not None:  # else there is nothing to say
                add_row(memory, (_contender(row),), [*figures, cell(row.load_seconds, 1), cell(row.floor_fraction, 2)])
        for table in (speed, memory):
            console.print(table)
            console.print()
    where = result.environment
    console.print(
        f"of peak: least time at this machine's {where['int8_peak_gops']:.0f} G int8 operations/s and "
        f"{where['read_gb_per_s']:.0f} GB/s, over p50"
    )
    if result.settings.get("quick") and str(result.settings["device"]).startswith("cuda"):
        console.print(QUICK_NOTE)
    for name, reason in result.skipped.items():
        console.print(f"skipped {name}: {reason}", markup=False)
    _print_kernels(console, result, every_site)


def _print_kernels(console: "Console", result: "Benchmark", every_site: bool) -> None:
    shown = set()
    for row, (model, sites) in zip([row for row in result.rows if row.integer], result.sites, strict=True):
        if (title := " ".join(filter(None, (model, row.preset, row.bits)))) in shown:
            continue  # this model has come already, at another batch size
        shown.add(title)
        console.print(f"kernels of {title}:", markup=False)
        if every_site:
            for site, kernel in sites.items():
                console.print(f"  {site}\n      {kernel}", markup=False, soft_wrap=True)
        else:
            for kernel, count in row.kernels.items():
                console.print(f"  {count:>6} x {kernel}", markup=False, soft_wrap=True)


def print_inspection(result: dict[str, Any], every_site: bool = False) -> None:
    """Print what an artifact is, then its sites.

    Sites that are alike are one entry with their number; with `every_site` their names follow.
    """
    console = console_of()
    for label, text in _summary(result):
        console.print(f"{label:<12} {text}", markup=False)
    console.print()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for site in result["sites"]:
        kind = site["role"], _scales(site), site["kernel"]
        groups.setdefault(kind, []).append(site["name"])
    for (role, scales, kernel), names in groups.items():
        console.print(f"{len(names):>4} x {role:<12} {scales}\n{'':7}{kernel}", markup=False, soft_wrap=True)
        for name in names if every_site else ():
            console.print(f"{'':9}{name}", markup=False, soft_wrap=True)


def _scales(site: Mapping[str, Any]) -> str:
    """Return a site's bits and grid, and what its scales are for."""
    from tqdit.spec import Grid

    parts = [f"{site['bits']} bits", site["grid"]]
    parts.append("per_row" if Grid(site["grid"]).per_row else site["granularity"])
    if site["groups"] > 1:
        parts.append(f"{site['groups']} time groups")
    if site.get("channels"):
        parts.append("channel factors")
    return ", ".join(parts)


def _summary(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the first lines of an inspection, without those that the artifact says nothing about."""
    provenance = Provenance.from_json(result["provenance"])
    recipe = provenance.recipe
    size, fp32 = result["size_bytes"], result["float32_bytes"]
    calibration = ("samples", "sampler", "steps", "guidance", "seed")
    search = ("rounds", "candidates", "hessian", "rounding")
    lines = [
        (result["name"], f"{result['shape']}, {result['preset'] or 'no preset'}, {result['bits']}"),
        ("size", f"{size / 1e6:.2f} MB: {2 * size / fp32:.3f} of bf16, {size / fp32:.3f} of fp32"),
        ("time groups", _time_groups(result)),
        ("stream", _stream(result)),
        ("calibration", _settings(recipe, calibration)),
        ("search", _settings(recipe, search)),
        ("in float", "patch embedding and final layer" if recipe.get("ends") == "float" else ""),
        ("source", f"{provenance.source or ''} sha256 {(provenance.source_sha256 or '')[:12]}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
        ("runs on", f"{result['device']}, backend {result['backend']}"),
    ]
    return [(label, text) for label, text in lines if text]


def _time_groups(result: Mapping[str, Any]) -> str:
    """Return the time groups in the words of `TimeGroups.summary`."""
    total = result["num_timesteps"]
    return f"{result['time_groups']} " + (f"of {total} training timesteps" if total else f"in {result['timesteps']}")


def _stream(result: Mapping[str, Any]) -> str:
    """Return what is known of the residual stream, and its dtype in a model of dtype float16."""
    if "fits_float16" not in result:
        return ""
    largest = result["stream_max"]
    known = "" if largest is None else f", up to {largest:.4g} in calibration"
    return f"{'float16' if result['fits_float16'] else 'float32'} when loaded as float16{known}"


def _settings(recipe: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_word(recipe[name])}" for name in names if name in recipe)


def console_of() -> "Console":
    """Return a console as wide as the terminal; a file gets WIDTH columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def table_of(text: Sequence[str], figures: Sequence[str]) -> "Table":
    """Return a table with columns of text, which may wrap, and columns of figures, which never do."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in text:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_row(table: "Table", text: Sequence[str], figures: Sequence[str]) -> None:
    """Add a row to a table of `table_of`; brackets in it are no markup."""
    from rich.markup import escape

    table.add_row(*(escape(part) for part in (*text, *figures)))


def _contender(row: "TimedModel") -> str:
    """Name a quantized model by name, preset and bits, and a baseline by name and backend."""
    return f"{row.model} {row.preset or ''} {row.bits}" if row.integer else f"{row.model} {row.backend}"


def _short(family: str) -> str:
    """Return a family's name in a form that fits over its column."""
    return {"float32": "fp32", "bfloat16": "bf16", "bfloat16-blocks": "bf16\nblocks"}.get(family, family)


def _word(value: Any) -> str:
    """Return a setting's value; `hessian` was true or false in earlier versions, which `Recipe` still reads."""
    return ("published" if value else "none") if isinstance(value, bool) else str(value)


def cell(value: float | None, digits: int) -> str:
    """Return a figure with so many digits, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6
