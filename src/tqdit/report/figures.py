"""The report's charts: SQNR over timesteps, post-softmax maxima (the paper's Fig. 3) and scales over time groups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from markupsafe import Markup

from tqdit.comparison import ModelRow
from tqdit.report.svg import INK, draw
from tqdit.spec import GridParams
from tqdit.timegroups import TimeGroups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours that stand out on white and on near-black; a marker each, since colour alone is not enough.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}  # matplotlib's name, and the same in text
MAX_BOXES = 20
TIMESTEP = "training timestep t"


@dataclass(frozen=True)
class Series:
    """How one model looks in every chart and key."""

    name: str
    colour: str
    marker: str

    @property
    def glyph(self) -> str:
        return MARKERS[self.marker]


def series_of(models: Sequence[ModelRow]) -> list[Series]:
    """A colour and a marker for each model, in their order; pairs repeat after 30 models."""
    return [
        Series(row.name, COLOURS[i % len(COLOURS)], tuple(MARKERS)[i % len(MARKERS)])
        for i, row in enumerate(models)
    ]


def sqnr_by_timestep(models: Sequence[ModelRow], timesteps: int) -> Markup:
    """SQNR of every held-out state against its timestep, a series per model."""

    def paint(axes: "Axes") -> None:
        for row, look in zip(models, series_of(models), strict=True):
            if row.eps:
                t, db = zip(*row.eps.by_timestep, strict=True)
                axes.scatter(
                    t, _finite(db), s=16, marker=look.marker, color=look.colour, alpha=0.6, linewidths=0,
                    rasterized=len(t) > 1000,  # as vectors, that many points would dominate the page's size
                )  # fmt: skip
        axes.set(xlabel=TIMESTEP, ylabel="ε SQNR (dB)", xlim=(0, timesteps), title="Every held-out state")

    return draw("timesteps", f"Scatter plot of ε SQNR in dB against the {TIMESTEP}. {_spans(models)}", paint)


def sqnr_by_group(models: Sequence[ModelRow], timesteps: int) -> Markup:
    """SQNR of every time group as steps over the group's timesteps, a series per model."""

    def paint(axes: "Axes") -> None:
        for row, look in zip(models, series_of(models), strict=True):
            if row.eps:
                db = _finite(row.eps.by_group)
                edges, centres = _edges(TimeGroups(timesteps, len(db)))
                axes.stairs(db, edges, baseline=None, color=look.colour, linewidth=1.8)
                axes.plot(centres, db, look.marker, color=look.colour, markersize=5)
        axes.set(xlabel=TIMESTEP, ylabel="ε SQNR (dB)", xlim=(0, timesteps), title="Per time group")

    return draw("groups", f"Step plot of ε SQNR in dB per time group. {_spans(models)}", paint)


def box_groups(t: torch.Tensor, groups: TimeGroups) -> TimeGroups:
    """The bins of the box plots: the time groups, or ten where there is one, or twenty where there are too many."""
    timesteps = max(groups.num_timesteps, int(t.max()) + 1)
    count = groups.num_groups if groups.num_groups > 1 else min(10, timesteps)
    return TimeGroups(timesteps, min(count, MAX_BOXES))


def maxima_boxes(maxima: torch.Tensor, t: torch.Tensor, groups: TimeGroups, block: int) -> Markup:
    """The paper's Fig. 3 for one block: boxes of per-channel maxima over bins of t. maxima: (S, C); t: (S,)."""
    from matplotlib.cbook import boxplot_stats
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    member = groups.of(t)
    found = [g for g in range(groups.num_groups) if (member == g).any()]
    smallest = torch.finfo(torch.float32).tiny  # a probability that underflowed has no place on a log axis
    values = [maxima[member == g].flatten().clamp(min=smallest).numpy() for g in found]
    stats = boxplot_stats(values, whis=(5, 95))
    edges, centres = _edges(groups)
    line, median = {"color": INK, "linewidth": 0.9}, {"color": COLOURS[1], "linewidth": 2.2}
    fill = {"facecolor": COLOURS[0] + "66", "edgecolor": INK, "linewidth": 0.9}  # 40 % opaque

    def paint(axes: "Axes") -> None:
        axes.bxp(
            stats, positions=[centres[g] for g in found], widths=0.6 * edges[1], showfliers=False,
            manage_ticks=False, patch_artist=True, boxprops=fill, medianprops=median, whiskerprops=line,
            capprops=line,
        )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-8, 1) for m in (1, 2, 5)]))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=TIMESTEP, ylabel="largest probability", xlim=(0, groups.num_timesteps))

    medians = [float(box["med"]) for box in stats]
    alt = (
        f"Box plots of post-softmax maxima of block {block} over the {TIMESTEP}: "
        f"the median runs from {medians[0]:.3g} at the smallest t to {medians[-1]:.3g} at the largest."
    )
    return draw(f"block{block}", alt, paint)


def median_change(maxima: torch.Tensor, t: torch.Tensor, groups: TimeGroups) -> float:
    """Largest over smallest median of the bins' maxima. maxima: (S, C); t: (S,)."""
    member = groups.of(t)
    medians = torch.stack([maxima[member == g].median() for g in member.unique()])
    return float(medians.max() / medians.min().clamp(min=torch.finfo(torch.float32).tiny))


def finest_steps(sites: Sequence[GridParams]) -> torch.Tensor:
    """log2 of each site's finest step, (sites * units, groups): s1 of an MRQ grid, the one scale of a uniform grid."""
    steps = [p.scale[..., 0] if p.spec.grid.two_region else p.scale for p in sites]
    return torch.cat([step.T for step in steps]).log2()


def scale_heatmap(
    key: str, sites: Sequence[GridParams], groups: TimeGroups, limits: tuple[float, float]
) -> Markup:
    """log2 of the finest post-softmax step of each block (`sites`, in order) over the time groups."""
    steps = finest_steps(sites)

    def paint(axes: "Axes") -> None:
        extent = (0, groups.num_timesteps, len(sites) - 0.5, -0.5)
        low, high = limits
        image = axes.imshow(
            steps.numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="none", extent=extent
        )
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, label="log₂ of the step size").outline.set_visible(False)
        axes.grid(False)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=f"{TIMESTEP} ({groups.num_groups} time groups)", ylabel="block")

    alt = f"Heatmap of log2 step sizes, {len(sites)} blocks by {groups.num_groups} time groups: "
    return draw(key, f"{alt}{float(steps.min()):.1f} to {float(steps.max()):.1f}.", paint, _height(len(sites)))


def _height(rows: int) -> float:
    return min(6.0, 1.9 + 0.16 * rows)


def _edges(groups: TimeGroups) -> tuple[list[int], list[float]]:
    """The bounds of all groups, and their centres, in timesteps."""
    bounds = [groups.bounds(g) for g in range(groups.num_groups)]
    return [0, *(last for _, last in bounds)], [(first + last) / 2 for first, last in bounds]


def _finite(values: Sequence[float]) -> list[float]:
    """Infinite SQNR (no error at all) has no place on the axis."""
    return [x if math.isfinite(x) else math.nan for x in values]


def _spans(models: Sequence[ModelRow]) -> str:
    """Each model's range of SQNR over the groups, for alt texts."""
    rows = [(row.name, row.eps.by_group) for row in models if row.eps]
    return "; ".join(f"{name}: {min(db):.1f} to {max(db):.1f} dB" for name, db in rows) + "."
