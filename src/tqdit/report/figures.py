"""Draw the charts of models' fidelity over timesteps, and choose how models look in every chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from tqdit.quality.comparison import ModelRow
from tqdit.report.svg import draw
from tqdit.timegroups import TimeGroups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (blue a little lighter) that stand out on white and on near-black. Each model has a marker
# too, since colour alone is not enough.
COLOURS = ("#1f83c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}  # matplotlib's name, and the same in text
TIMESTEP = "training timestep t"
MAX_VECTOR_POINTS = 3000


@dataclass(frozen=True)
class Series:
    """The look of one model in every chart and key."""

    name: str
    colour: str
    marker: str

    @property
    def glyph(self) -> str:
        """Return the marker as a character, for keys in HTML."""
        return MARKERS[self.marker]


def series_of(models: Sequence[ModelRow]) -> list[Series]:
    """Return a colour and a marker for each model, in their order; pairs repeat after 30 models."""
    return [
        Series(row.name, COLOURS[i % len(COLOURS)], tuple(MARKERS)[i % len(MARKERS)]) for i, row in enumerate(models)
    ]


def sqnr_by_timestep(models: Sequence[ModelRow], groups: TimeGroups) -> Markup:
    """Draw the SQNR of every held-out state against its timestep, a series per model.

    `groups`: time groups whose range is the axis.
    """
    # As vectors, very many points would dominate the page's size.
    many = sum(len(row.eps.by_timestep) for row in models if row.eps) > MAX_VECTOR_POINTS

    def paint(axes: "Axes") -> None:
        for row, look in zip(models, series_of(models), strict=True):
            if row.eps:
                t, db = zip(*row.eps.by_timestep, strict=True)
                axes.scatter(
                    t, _finite(db), s=16, marker=look.marker, color=look.colour, alpha=0.8, linewidths=0,
                    rasterized=many,
                )  # fmt: skip
        axes.set(xlabel=TIMESTEP, ylabel="ε SQNR (dB)", xlim=(groups.low, groups.high), title="Every held-out state")

    return draw("timesteps", f"Scatter plot of ε SQNR in dB against the {TIMESTEP}. {_spans(models)}", paint)


def sqnr_by_group(models: Sequence[ModelRow], groups: TimeGroups) -> Markup:
    """Draw the SQNR of every time group as steps over the group's timesteps, a series per model.

    `groups`: time groups whose range is the axis.
    """

    def paint(axes: "Axes") -> None:
        for row, look in zip(models, series_of(models), strict=True):
            if row.eps:
                db = _finite(row.eps.by_group)
                bounds, centres = edges(_groups_of(row, len(db), groups))
                axes.stairs(db, bounds, baseline=None, color=look.colour, linewidth=1.8)
                axes.plot(centres, db, look.marker, color=look.colour, markersize=5)
        axes.set(xlabel=TIMESTEP, ylabel="ε SQNR (dB)", xlim=(groups.low, groups.high), title="Per time group")

    return draw("groups", f"Step plot of ε SQNR in dB per time group. {_spans(models)}", paint)


def _groups_of(row: ModelRow, count: int, shown: TimeGroups) -> TimeGroups:
    """Return the time groups of a row's figures: its solution's, or equal ranges of the range shown."""
    own = row.solution.time_groups if row.solution else None
    return own if own and own.num_groups == count else TimeGroups.uniform(shown.low, shown.high, count, shown.closed)


def edges(groups: TimeGroups) -> tuple[list[float], list[float]]:
    """Return the bounds of all groups, and their centres, in timesteps."""
    bounds = [groups.bounds(g) for g in range(groups.num_groups)]
    return [groups.low, *(last for _, last in bounds)], [(first + last) / 2 for first, last in bounds]


def _finite(values: Sequence[float]) -> list[float]:
    """Return the values with NaN in place of infinite SQNR (no error at all), which has no place on the axis."""
    return [x if math.isfinite(x) else math.nan for x in values]


def _spans(models: Sequence[ModelRow]) -> str:
    """Describe each model's range of SQNR over the groups, for alt texts."""
    rows = [(row.name, [x for x in row.eps.by_group if not math.isnan(x)]) for row in models if row.eps]
    return "; ".join(f"{name}: {min(db):.1f} to {max(db):.1f} dB" for name, db in rows if db) + "."
