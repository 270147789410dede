"""Write the figures of a section as text: headline, summary, the table of results, and the tables of sites."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdit.grids.registry import Grid
from tqdit.quality.run import Row, Site
from tqdit.report.sections import Section
from tqdit.spec import Granularity, Role

NOTHING = "–"
ROLES = {
    Role.WEIGHT: "Weights",
    Role.WEIGHT_ONLY: "Weights of layers with float inputs",
    Role.INPUT: "Inputs of linear layers",
    Role.QUERY: "Queries",
    Role.KEY: "Keys",
    Role.VALUE: "Values",
    Role.SOFTMAX: "Post-softmax probabilities",
    Role.GELU: "Post-GELU activations",
}
SINGULAR = {
    Role.WEIGHT: "weight", Role.WEIGHT_ONLY: "weight, float input", Role.INPUT: "input", Role.QUERY: "query",
    Role.KEY: "key", Role.VALUE: "value", Role.SOFTMAX: "after softmax", Role.GELU: "after GELU",
}  # fmt: skip
SHARED = {
    Granularity.PER_TENSOR: "per tensor",
    Granularity.PER_CHANNEL: "per channel",
    Granularity.PER_HEAD: "per head",
}
FACTS = {
    "num": "images",
    "samples_per_group": "held-out states per range of timesteps",
    "groups": "ranges",
    "states": "held-out states",
    "call_batch": "samples of a timed call",
    "calls": "recorded calls",
    "held_out": "calls that no calibration used",
}
QUANTITY = {"samples": "ε SQNR", "calls": "SQNR"}  # of each kind of run


@dataclass(frozen=True)
class Column:
    """A column of the table of results: its head in two lines, and the text of a row (row, float model)."""

    head: str
    unit: str
    text: Callable[[Row, Row], str]
    word: bool = False


COLUMNS = (
    Column("Preset", "", lambda row, _: row.preset or NOTHING, word=True),
    Column("Bits", "", lambda row, _: _form(row), word=True),
    Column("Size", "(MB)", lambda row, _: _megabytes(row.size_bytes)),
    Column("of file", "(%)", lambda row, of: _percent(row.size_bytes, of.size_bytes)),
    Column("of bf16", "(%)", lambda row, of: _percent(row.size_bytes, of.float32_bytes, 2)),
    Column("SQNR ↑", "(dB)", lambda row, _: "∞" if row.exact else number(row.sqnr_db, 1)),
    Column("Worst ↑", "(dB)", lambda row, _: number(row.worst_db, 1)),
    Column("PSNR ↑", "(dB)", lambda row, _: number(row.psnr_db, 1)),
    Column("FD-fashion ↓", "", lambda row, _: number(row.fd_fashion, 2)),
    Column("Call", "(ms)", lambda row, _: number(row.ms_per_call, 1)),
    Column("× eager", "float32", lambda row, _: number(row.speedup, 2)),
    Column("Peak", "(MB)", lambda row, _: number(row.peak_bytes / 1e6 if row.peak_bytes else None, 0)),
    Column("Calibration", "(s)", lambda row, _: number(row.calibration_seconds, 0)),
)


def number(value: float | None, digits: int) -> str:
    """Return a number with a fixed number of decimals; an en dash where there is no value."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞"


def results(section: Section) -> tuple[list[Column], list[tuple[str, list[str]]], list[list[str]]]:
    """Return the columns that have a figure, the rows of float models (one for each run), and those of the others.

    A float model whose cells are the same in all runs is there once.
    """
    references = {shown.run: shown.reference for shown in section.models} or {0: section.reference}
    rows = [*references.values(), *section.rows]
    columns = [c for c in COLUMNS if any(c.text(row, section.reference) != NOTHING for row in rows)]
    heads: dict[tuple[str, ...], str] = {}
    for run, reference in references.items():
        cells = tuple(column.text(reference, reference) for column in columns)
        name = reference.name if not heads else f"{reference.name} (run {run + 1})"
        heads.setdefault(cells, name)
    first = [(name, list(cells)) for cells, name in heads.items()]
    return columns, first, [[c.text(shown.row, shown.reference) for c in columns] for shown in section.models]


def title(section: Section) -> str:
    """Return the headline: what the model nearest to float saves, and how near its images or outputs are."""
    best = closest(section.rows)
    if best is None:
        return f"{section.reference.name}, quantized"
    parts = [_smaller(section.reference, best)]
    if best.speedup:
        parts.append(f"{best.speedup:.1f}× as fast as eager float32")
    parts.append(
        f"{QUANTITY[section.kind]} {_decibels(best)} dB"
        if best.psnr_db is None else f"images {number(best.psnr_db, 1)} dB PSNR from the float model’s"
    )  # fmt: skip
    return f"{section.reference.name} in {best.bits.upper()}: " + ", ".join(parts)


def summary(section: Section) -> str:
    """Return one paragraph: the closest model and the smallest."""
    reference, rows = section.reference, section.rows
    text = f"{reference.name} takes {_megabytes(reference.size_bytes)} MB in {reference.file_dtype or reference.bits}. "
    best = closest(rows)
    if best is None:
        return text + "No quantized model was measured against it."
    what = "noise ε of held-out states" if section.kind == "samples" else "outputs of recorded calls"
    error = 0.0 if best.sqnr_db is None else 10 ** (2 - best.sqnr_db / 10)
    text += (
        f"{_described(best)} predicts the {what} with a signal-to-noise ratio (SQNR) of {_decibels(best)} dB: its "
        f"error has {error:.2g} % of the signal’s power. It takes {_megabytes(best.size_bytes)} MB."
    )
    smallest = min(rows, key=lambda row: row.size_bytes or math.inf)
    if smallest is not best:
        text += (
            f" The smallest, {_described(smallest)}, takes {_megabytes(smallest.size_bytes)} MB "
            f"({_smaller(reference, smallest)}) at {_decibels(smallest)} dB."
        )
    return text


def closest(rows: Sequence[Row]) -> Row | None:
    """Return the quantized model with the highest SQNR; the first of equals."""
    measured = [row for row in rows if (row.sqnr_db is not None or row.exact) and row.recipe]
    return max(measured, key=lambda row: math.inf if row.exact else row.sqnr_db or 0.0, default=None)


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings or environment as (label, value), without hashes, which say nothing to a reader."""
    shown = {key: value for key, value in values.items() if not key.endswith("sha256") and value is not None}
    return [(FACTS.get(key, key.replace("_", " ")), str(value)) for key, value in shown.items()]


def site_table(section: Section) -> list[tuple[str, list[list[tuple[str, str]]]]]:
    """Return, for each role that occurs, its label and a cell for each model.

    A cell is (number and grid, what shares a scale). Only sites that were measured are known.
    """
    rows = []
    for role, label in ROLES.items():
        columns = [_phrases(shown.row.sites, role) for shown in section.quantized]
        if any(columns):
            rows.append((label, columns))
    return rows


def site_form(site: Site) -> str:
    """Return how a site is quantized: bits, grid, and what shares a scale."""
    return f"{site.bits}-bit {Grid(site.grid).label}, {_shared(site)}"


def _phrases(sites: Sequence[Site], role: Role) -> list[tuple[str, str]]:
    counts = Counter((f"{s.bits}-bit {Grid(s.grid).label}", _shared(s)) for s in sites if s.role == role.value)
    return [(f"{count} × {codes}", shared) for (codes, shared), count in counts.items()]


def _shared(site: Site) -> str:
    """Return what shares one scale of a site."""
    shared = "per row" if Grid(site.grid).per_row else SHARED[Granularity(site.granularity)]
    shared += f", {site.groups} time groups" if site.groups > 1 else ""
    shared += f", rotated by {site.rotation}" if site.rotation else ""
    return f"{shared}, a factor for each channel" if site.channels else shared


def _form(row: Row) -> str:
    """Return the bits of a row. A float model may run in another dtype than that of its file, and then has both."""
    return row.bits if row.file_dtype in (None, row.bits) else f"{row.bits} (file: {row.file_dtype})"


def _megabytes(size: int | None) -> str:
    return number(None if size is None else size / 1e6, 2)


def _percent(size: int | None, whole: int | None, divisor: int = 1) -> str:
    return number(100 * divisor * size / whole if size and whole else None, 1)


def _smaller(reference: Row, row: Row) -> str:
    """Return how much smaller a model is than the file it was made from."""
    if not reference.size_bytes or not row.size_bytes:
        return "of unknown size"
    return f"{reference.size_bytes / row.size_bytes:.1f}× smaller than in {reference.file_dtype or reference.bits}"


def _decibels(row: Row) -> str:
    return "∞" if row.exact else number(row.sqnr_db, 1)


def _described(row: Row) -> str:
    return f"{row.name} ({row.preset}, {row.bits})" if row.preset else f"{row.name} ({row.bits})"
