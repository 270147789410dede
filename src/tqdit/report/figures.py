"""Draw the charts of models' fidelity over timesteps."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdit.quality.run import Row
from tqdit.report.sections import Section
from tqdit.report.svg import Chart, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMESTEP = "timestep t"
MAX_VECTOR_POINTS = 3000


def fidelity(section: Section, quantity: str) -> list[Chart]:
    """Return the charts of a section: the SQNR of every state, where it was saved, and of every time group."""
    drawn = [sqnr_by_timestep(section, quantity)] if any(row.by_timestep for row in section.rows) else []
    return [*drawn, sqnr_by_group(section, quantity)] if any(row.sqnr_by_group for row in section.rows) else drawn


def sqnr_by_timestep(section: Section, quantity: str) -> Chart:
    """Draw the SQNR of every held-out state against its timestep, a series per model."""
    rows = section.rows
    # As vectors, very many points would dominate the page's size.
    many = sum(len(row.by_timestep) for row in rows) > MAX_VECTOR_POINTS

    def paint(axes: "Axes") -> None:
        for row, look in zip(rows, section.looks, strict=True):
            if row.by_timestep:
                t, db = zip(*row.by_timestep, strict=True)
                axes.scatter(
                    t, _drawn(db), s=16, marker=look.marker, color=look.colour, alpha=0.8, linewidths=0,
                    rasterized=many, clip_on=False,  # a state at t = 0 lies on the axis
                )  # fmt: skip
        axes.set(xlabel=TIMESTEP, ylabel=f"{quantity} (dB)", xlim=_limits(section), title="Every held-out state")

    table: list[list[object]] = [["model", "t", "sqnr_db"]]
    table += [[look.name, t, db] for row, look in zip(rows, section.looks, strict=True) for t, db in row.by_timestep]
    alt = f"Scatter plot of {quantity} in dB against the {TIMESTEP}. {_spans(section)}"
    return draw(f"s{section.number}-states", alt, paint, table)


def sqnr_by_group(section: Section, quantity: str) -> Chart:
    """Draw the SQNR of every time group as steps over the group's timesteps, a series per model."""
    rows = [(row, look) for row, look in zip(section.rows, section.looks, strict=True) if row.sqnr_by_group]

    def paint(axes: "Axes") -> None:
        for row, look in rows:
            db = _drawn(row.sqnr_by_group)
            centres = [(a + b) / 2 for a, b in zip(row.groups, row.groups[1:], strict=False)]
            axes.stairs(db, row.groups, baseline=None, color=look.colour, linewidth=1.8)
            axes.plot(centres, db, look.marker, color=look.colour, markersize=5)
        axes.set(xlabel=TIMESTEP, ylabel=f"{quantity} (dB)", xlim=_limits(section), title="Per time group")

    table: list[list[object]] = [["model", "from_t", "to_t", "sqnr_db"]]
    for row, look in rows:
        bounds = zip(row.groups, row.groups[1:], row.sqnr_by_group, strict=False)
        table += [[look.name, first, last, db] for first, last, db in bounds]
    alt = f"Step plot of {quantity} in dB per time group. {_spans(section)}"
    return draw(f"s{section.number}-groups", alt, paint, table)


def _limits(section: Section) -> tuple[float, float]:
    return section.part.low, section.part.high


def _drawn(values: Sequence[float | None]) -> list[float]:
    """Return the values with NaN in place of None (no error at all, or no state), which has no place on the axis."""
    return [math.nan if x is None else x for x in values]


def _spans(section: Section) -> str:
    """Describe each model's range of SQNR over the groups, for alt texts."""
    rows = [(look.name, _known(row)) for row, look in zip(section.rows, section.looks, strict=True)]
    return "; ".join(f"{name}: {min(db):.1f} to {max(db):.1f} dB" for name, db in rows if db) + "."


def _known(row: Row) -> list[float]:
    return [x for x in row.sqnr_by_group if x is not None]
