"""Write a comparison as one self-contained HTML page: no network, no scripts, images inline."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from tqdit.quality.comparison import Comparison, ModelRow
from tqdit.report import figures, softmax, tables
from tqdit.report.images import sheets
from tqdit.system.files import write_text
from tqdit.timegroups import TimeGroups


@dataclass(frozen=True)
class Picture:
    """The images of one model, and the caption under them."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class ScaleChart:
    """A chart of a model's post-softmax scales, or None where no scale changes over time."""

    name: str
    note: str
    chart: Markup | None


def write_report(comparison: Comparison, maxima: torch.Tensor, t: torch.Tensor, out: Path) -> None:
    """Write the page to the file `out`; on any error a page that was there before is left as it was.

    maxima: (S, blocks, C) largest post-softmax values and t: (S,) their timesteps, from `calibration.Records`. The same
    input gives the same bytes.
    """
    write_text(out, render(comparison, maxima, t))


def render(comparison: Comparison, maxima: torch.Tensor, t: torch.Tensor) -> str:
    """Return the page as text; see `write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("tqdit", "report")
    # Names come from users' folders, so everything is escaped but our own charts.
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(_context(comparison, maxima, t))


def _context(comparison: Comparison, maxima: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    models = comparison.models
    groups = _time_groups(models)
    boxes = softmax.box_groups(t, groups)
    measured = any(row.eps for row in models)
    looks = figures.series_of(models)
    return {
        "title": tables.title(comparison),
        "summary": tables.summary(comparison),
        "settings": tables.facts(comparison.settings),
        "environment": tables.facts(comparison.environment),
        "pictures": _pictures(comparison),
        "reference": (comparison.float_model.name, tables.cells(comparison.float_model, comparison.float_model)),
        "rows": [(look, tables.cells(row, comparison.float_model)) for look, row in zip(looks, models, strict=True)],
        "file_dtype": comparison.float_model.file_dtype or comparison.float_model.bits,
        "call_batch": comparison.settings.get("call_batch"),
        "num": len(comparison.float_model.images),
        "has_fd": any(row.fd_fashion is not None for row in (comparison.float_model, *models)),
        "looks": looks,
        "fidelity": [draw(models, groups) for draw in (figures.sqnr_by_timestep, figures.sqnr_by_group) if measured],
        "boxes": _boxes(maxima, t, boxes),
        "box_count": boxes.num_groups,
        "scales": list(_scale_charts(models)),
        "site_rows": tables.site_table(models),
    }


def _time_groups(models: tuple[ModelRow, ...]) -> TimeGroups:
    """Return the finest time groups of any model."""
    found = [row.solution.time_groups for row in models if row.solution]
    return max(found, key=lambda groups: groups.num_groups, default=TimeGroups.uniform(0, 1000, 10))


def _boxes(maxima: torch.Tensor, t: torch.Tensor, groups: TimeGroups) -> list[tuple[int, float, Markup]]:
    """Return (block, how much its median changes, chart) of the first, middle and last block."""
    last = maxima.shape[1] - 1
    chosen = [(block, maxima[:, block]) for block in sorted({0, (last + 1) // 2, last})]
    return [
        (block, softmax.median_change(x, t, groups), softmax.maxima_boxes(x, t, groups, block)) for block, x in chosen
    ]


def _pictures(comparison: Comparison) -> list[Picture]:
    rows = (comparison.float_model, *comparison.models)
    found = []
    for row, sheet in zip(rows, sheets([row.images for row in rows]), strict=True):
        caption = " · ".join(part for part in (row.preset, row.bits) if part)
        if row.psnr_db is not None:
            caption += f" · PSNR {tables.number(row.psnr_db, 1)} dB"
        alt = f"{sheet.shown} images sampled from {row.name} ({caption}), in rows of {sheet.columns}"
        found.append(Picture(sheet.uri, alt, caption))
    return found


def _scale_charts(models: tuple[ModelRow, ...]) -> Iterator[ScaleChart]:
    """Return one chart per solved model, all on one colour scale."""
    solved = [(row.name, row.solution, softmax.grouped_sites(row.solution)) for row in models if row.solution]
    grouped = [sites for _, _, sites in solved if sites]
    steps = torch.cat([softmax.finest_steps(sites).flatten() for sites in grouped]) if grouped else torch.zeros(1)
    limits = (float(steps.min()), float(steps.max()))
    for i, (name, solution, sites) in enumerate(solved):
        if not sites:
            yield ScaleChart(name, softmax.fixed_note(solution), None)
            continue
        chart = softmax.scale_heatmap(f"scales{i}", sites, solution.time_groups, limits)
        yield ScaleChart(name, softmax.grid_note(sites), chart)
