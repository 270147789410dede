"""Write saved comparisons as one self-contained HTML page: no network, images, charts and their numbers inline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdit.quality.run import Boxes, Run, Site
from tqdit.report import figures, histograms, softmax, tables, verdicts
from tqdit.report.advice import Advice, advice
from tqdit.report.images import Sheet, sheets
from tqdit.report.sections import Saved, Section, Shown, differences, sections
from tqdit.report.svg import Chart, csv_uri
from tqdit.spec import Role
from tqdit.system.files import write_text

TOP = 10  # most sensitive sites of each model
OPEN = 1  # models of a section whose sites are unfolded at first
AMPLIFIED = (1, 4, 16)


@dataclass(frozen=True)
class Pictures:
    """The images of one model beside those of its float model."""

    shown: Shown
    key: str
    float_key: str
    sheet: Sheet
    caption: str


@dataclass(frozen=True)
class RankedSite:
    """One of the most sensitive sites: its facts, advice, and the chart of its values, if they were kept."""

    site: Site
    role: str
    form: str
    advice: Advice
    chart: Chart | None
    note: str


@dataclass(frozen=True)
class Ranking:
    """The most sensitive sites of one model. `measured` of `in_all` sites were measured."""

    shown: Shown
    sites: list[RankedSite]
    measured: int
    in_all: int
    csv: str
    open: bool


def write_report(saved: Sequence[Saved], out: Path) -> None:
    """Write the page to the file `out`; on any error a page that was there before is left as it was.

    The same input gives the same bytes.
    """
    write_text(out, render(saved))


def render(saved: Sequence[Saved]) -> str:
    """Return the page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Names come from users' folders, so everything is escaped but our own charts.
    environment = Environment(
        loader=PackageLoader("tqdit", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(_context(saved))


def _context(saved: Sequence[Saved]) -> dict[str, Any]:
    found = sections(saved)
    first = found[0]
    return {
        "title": tables.title(first),
        "sections": [_section(section, first) for section in found],
        "runs": [_run(number, run) for number, (run, _) in enumerate(saved)],
        "amplified": AMPLIFIED,
    }


def _run(number: int, run: Run) -> dict[str, Any]:
    return {
        "number": number + 1,
        "command": run.command,
        "created": run.created,
        "environment": tables.facts(run.environment),
    }


def _section(section: Section, first: Section) -> dict[str, Any]:
    """Return all that the page says of one section."""
    return {
        "number": section.number,
        "kind": section.kind,
        "title": tables.title(section),
        "summary": tables.summary(section),
        "differs": differences(first, section) if section is not first else [],
        "settings": tables.facts(section.part.protocol),
        "looks": section.looks,
        "quantized": [shown.look for shown in section.quantized],
        "fidelity": figures.fidelity(section, tables.QUANTITY[section.kind]),
        "rankings": list(_rankings(section)),
        "boxes": list(_boxes(section)),
        "scales": list(_scales(section)),
        "site_rows": tables.site_table(section),
        **_verdicts(section),
        **_results(section),
        **_images(section),
    }


def _verdicts(section: Section) -> dict[str, Any]:
    return {
        "told": verdicts.told(section.models),
        "rule": next((verdicts.rule(row.verdict) for row in section.rows if row.verdict), ""),
        "caution": verdicts.caution(section.rows),
    }


def _results(section: Section) -> dict[str, Any]:
    columns, references, rows = tables.results(section)
    heads = ["model", *(f"{column.head} {column.unit}".strip() for column in columns)]
    body = [[name, *cells] for name, cells in references]
    body += [[look.name, *cells] for look, cells in zip(section.looks, rows, strict=True)]
    return {
        "columns": columns,
        "references": references,
        "rows": list(zip(section.looks, rows, strict=True)),
        "results_csv": csv_uri([heads, *body]),
        "several_runs": len(set(section.runs)) > 1,
        "num": section.part.protocol.get("num"),
        "call_batch": section.part.protocol.get("call_batch"),
        "has_fd": any(row.fd_fashion is not None for row in (section.reference, *section.rows)),
    }


def _images(section: Section) -> dict[str, Any]:
    pictures, definitions = _pictures(section)
    shown = max((sheet.shown for sheet in definitions.values()), default=0)
    captions = section.part.captions[:shown]
    return {"pictures": pictures, "definitions": definitions, "captions": captions if all(captions) else []}


def _boxes(section: Section) -> Iterator[tuple[Boxes, float, Chart]]:
    for found in section.part.boxes:
        if any(box is not None for box in found.boxes):
            yield found, softmax.median_change(found), softmax.maxima_boxes(section, found)


def _scales(section: Section) -> Iterator[tuple[Shown, str, Chart | None]]:
    """Return one chart per model whose post-softmax scales change over time, all on one colour scale."""
    limits = softmax.extent(section.rows)
    for shown in section.quantized if section.kind == "samples" else ():
        chart = softmax.scale_heatmap(section, shown, limits) if shown.row.softmax_steps else None
        yield shown, softmax.scale_note(shown.row), chart


def _pictures(section: Section) -> tuple[list[Pictures], dict[str, Sheet]]:
    """Return the pictures of every model, and the sheets by the keys under which the page has each once."""
    stacks: dict[str, Any] = {}
    found = []
    for number, shown in enumerate(section.models):
        if shown.pixels is None or shown.expected is None:
            continue
        keys = f"s{section.number}-model-{number}", f"s{section.number}-float-{shown.run}"
        stacks |= {keys[0]: shown.pixels, keys[1]: shown.expected}
        found.append((shown, keys))
    definitions = dict(zip(stacks, sheets(list(stacks.values())), strict=True))
    pictures = [Pictures(shown, *keys, definitions[keys[0]], _caption(shown)) for shown, keys in found]
    return pictures, definitions


def _caption(shown: Shown) -> str:
    row = shown.row
    caption = " · ".join(part for part in (row.preset, row.bits) if part)
    return caption if row.psnr_db is None else f"{caption} · PSNR {tables.number(row.psnr_db, 1)} dB"


def _rankings(section: Section) -> Iterator[Ranking]:
    for number, shown in enumerate(section.quantized):
        row = shown.row
        if not row.sites:
            continue
        sites = []
        for rank, site in enumerate(row.sites[:TOP]):
            found, key = site.histogram, f"s{section.number}-site-{number}-{rank}"
            chart = None if found is None else histograms.site_histogram(key, site, found)
            note = "" if found is None else histograms.described(found)
            told = advice(site, row.recipe, section.kind == "calls")
            sites.append(RankedSite(site, tables.SINGULAR[Role(site.role)], tables.site_form(site), told, chart, note))
        yield Ranking(shown, sites, len(row.sites), row.sites_in_all, _sites_csv(row.sites), number < OPEN)


def _sites_csv(sites: Sequence[Site]) -> str:
    heads = ["name", "role", "bits", "grid", "granularity", "groups", "sqnr_db", "share"]
    return csv_uri([heads, *([getattr(site, head) for head in heads] for site in sites)])
