"""Draw charts of the post-softmax sites: maxima over timesteps (the paper's Fig. 3), and scales over time groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdit.grids.registry import Grid
from tqdit.quality.run import Boxes, Row
from tqdit.report.figures import TIMESTEP
from tqdit.report.sections import COLOURS, Section, Shown
from tqdit.report.svg import INK, Chart, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = (4.7, 3.4)  # inches: three panels beside each other
TINY = 1e-38  # a probability that underflowed has no place on a log axis
QUANTILES = ("q05", "q25", "q50", "q75", "q95")
STATISTICS = ("whislo", "q1", "med", "q3", "whishi")  # matplotlib's names of the same


def maxima_boxes(section: Section, found: Boxes) -> Chart:
    """Draw the paper's Fig. 3 for one block: boxes of per-channel maxima over ranges of t."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    spans = list(zip(found.bounds, found.bounds[1:], found.boxes, strict=False))
    known = [(first, last, [max(x, TINY) for x in box]) for first, last, box in spans if box is not None]
    line, median = {"color": INK, "linewidth": 0.9}, {"color": COLOURS[1], "linewidth": 2.2}
    fill = {"facecolor": COLOURS[0] + "66", "edgecolor": INK, "linewidth": 0.9}  # 40 % opaque

    def paint(axes: "Axes") -> None:
        axes.bxp(
            [{**dict(zip(STATISTICS, box, strict=True)), "fliers": []} for _, _, box in known],
            positions=[(first + last) / 2 for first, last, _ in known],
            widths=[0.6 * (last - first) for first, last, _ in known], showfliers=False, manage_ticks=False,
            patch_artist=True, boxprops=fill, medianprops=median, whiskerprops=line, capprops=line,
        )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-8, 1) for m in (1, 2, 5)]))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=TIMESTEP, ylabel="largest probability", xlim=(section.part.low, section.part.high))

    medians = [box[2] for _, _, box in known]
    alt = (
        f"Box plots of post-softmax maxima of block {found.block} over the {TIMESTEP}: "
        f"the median runs from {medians[0]:.3g} at the smallest t to {medians[-1]:.3g} at the largest."
    )
    table: list[list[object]] = [["from_t", "to_t", *QUANTILES]]
    table += [[first, last, *box] for first, last, box in known]
    return draw(f"s{section.number}-maxima-block{found.block}", alt, paint, table, SMALL)


def median_change(found: Boxes) -> float:
    """Return the largest over the smallest median of the ranges."""
    medians = [max(box[2], TINY) for box in found.boxes if box is not None]
    return max(medians) / min(medians)


def scale_heatmap(section: Section, shown: Shown, limits: tuple[float, float]) -> Chart:
    """Draw log2 of the finest post-softmax step of each block over the time groups of one model."""
    from matplotlib.ticker import MaxNLocator

    steps = [site.log2 for site in shown.row.softmax_steps]
    groups, low, high = len(steps[0]), section.part.low, section.part.high

    def paint(axes: "Axes") -> None:
        image = axes.imshow(
            steps, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="none",
            extent=(low, high, len(steps) - 0.5, -0.5),
        )  # fmt: skip
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, label="log₂ step").outline.set_visible(False)
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=f"{TIMESTEP} ({groups} time groups)", ylabel="block")

    least, most = extent([shown.row])
    alt = f"Heatmap of log2 step sizes, {len(steps)} blocks by {groups} time groups: {least:.1f} to {most:.1f}."
    table: list[list[object]] = [["block", *(f"group_{group}" for group in range(groups))]]
    table += [[block, *row] for block, row in enumerate(steps)]
    key = f"s{section.number}-scales-{section.models.index(shown)}"
    return draw(key, alt, paint, table, (SMALL[0], min(6.0, 2.3 + 0.13 * len(steps))))


def extent(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the smallest and the largest log2 step of models that have some; one colour scale for all charts."""
    steps = [step for row in rows for site in row.softmax_steps for step in site.log2]
    return min(steps, default=0.0), max(steps, default=0.0)


def scale_note(row: Row) -> str:
    """Return a note that says which scale a heatmap shows, or why there is none."""
    if not row.softmax_steps:
        return "a scale for each row, which needs no time groups" if row.softmax_rows else "one scale for all timesteps"
    uniform = [str(block) for block, site in enumerate(row.softmax_steps) if site.grid == str(Grid.UNIFORM)]
    if not uniform:
        return "s₁, the step of the fine region of the MRQ grid"
    if len(uniform) == len(row.softmax_steps):
        return "the scale of the uniform grid"
    return f"s₁ of the MRQ grid; in block {', '.join(uniform)} the scale of a uniform grid"
