"""Draw charts of the post-softmax sites: maxima over timesteps (the paper's Fig. 3), and scales over time groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from markupsafe import Markup

from tqdit.report.figures import COLOURS, TIMESTEP, edges
from tqdit.report.svg import INK, draw
from tqdit.spec import Grid, GridParams, Role, Solution
from tqdit.timegroups import TimeGroups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BOXES = 25
SMALL = 4.7  # inches: three panels beside each other
TINY = torch.finfo(torch.float32).tiny  # a probability that underflowed has no place on a log axis


def box_groups(t: torch.Tensor, groups: TimeGroups) -> TimeGroups:
    """Return the bins of the box plots: the time groups, or ten where there is one, 25 at most."""
    if groups.num_timesteps is None:
        count = groups.num_groups if groups.num_groups > 1 else 10
        return TimeGroups.uniform(groups.low, groups.high, min(count, MAX_BOXES), groups.closed)
    timesteps = max(groups.num_timesteps, int(t.max()) + 1)
    count = groups.num_groups if groups.num_groups > 1 else min(10, timesteps)
    return TimeGroups.uniform(0, timesteps, min(count, MAX_BOXES))


def maxima_boxes(maxima: torch.Tensor, t: torch.Tensor, groups: TimeGroups, block: int) -> Markup:
    """Draw the paper's Fig. 3 for one block: boxes of per-channel maxima over bins of t.

    maxima: (S, C); t: (S,).
    """
    from matplotlib.cbook import boxplot_stats
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    member = groups.index(t)
    found = [g for g in range(groups.num_groups) if (member == g).any()]
    values = [maxima[member == g].flatten().clamp(min=TINY).numpy() for g in found]
    stats = boxplot_stats(values, whis=(5, 95))
    bounds, centres = edges(groups)
    line, median = {"color": INK, "linewidth": 0.9}, {"color": COLOURS[1], "linewidth": 2.2}
    fill = {"facecolor": COLOURS[0] + "66", "edgecolor": INK, "linewidth": 0.9}  # 40 % opaque

    def paint(axes: "Axes") -> None:
        axes.bxp(
            stats, positions=[centres[g] for g in found], widths=0.6 * (bounds[1] - bounds[0]), showfliers=False,
            manage_ticks=False, patch_artist=True, boxprops=fill, medianprops=median, whiskerprops=line,
            capprops=line,
        )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-8, 1) for m in (1, 2, 5)]))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=TIMESTEP, ylabel="largest probability", xlim=(groups.low, groups.high))

    medians = [float(box["med"]) for box in stats]
    alt = (
        f"Box plots of post-softmax maxima of block {block} over the {TIMESTEP}: "
        f"the median runs from {medians[0]:.3g} at the smallest t to {medians[-1]:.3g} at the largest."
    )
    return draw(f"block{block}", alt, paint, (SMALL, 3.4))


def median_change(maxima: torch.Tensor, t: torch.Tensor, groups: TimeGroups) -> float:
    """Return the largest over the smallest median of the bins' maxima. maxima: (S, C); t: (S,)."""
    member = groups.index(t)
    medians = torch.stack([maxima[member == g].median() for g in member.unique()])
    return float(medians.max() / medians.min().clamp(min=TINY))


def grouped_sites(solution: Solution) -> list[GridParams]:
    """Return the post-softmax sites whose scale changes over time, in the order of the blocks."""
    found = [p for p in solution.params.values() if p.spec.role is Role.SOFTMAX and p.spec.groups > 1]
    return [p for p in found if not p.spec.grid.per_row]


def finest_steps(sites: Sequence[GridParams]) -> torch.Tensor:
    """Return log2 of each site's finest step, (sites * units, groups).

    The step is s1 of an MRQ grid, or the one scale of a uniform grid.
    """
    steps = [p.scale[..., 0] if p.spec.grid.two_region else p.scale for p in sites]
    return torch.cat([step.T for step in steps]).log2()


def scale_heatmap(key: str, sites: Sequence[GridParams], groups: TimeGroups, limits: tuple[float, float]) -> Markup:
    """Draw log2 of the finest post-softmax step of each block (`sites`, in order) over the time groups."""
    from matplotlib.ticker import MaxNLocator

    steps = finest_steps(sites)

    def paint(axes: "Axes") -> None:
        extent = (groups.low, groups.high, len(sites) - 0.5, -0.5)
        low, high = limits
        image = axes.imshow(
            steps.numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="none", extent=extent
        )
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, label="log₂ step").outline.set_visible(False)
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=f"{TIMESTEP} ({groups.num_groups} time groups)", ylabel="block")

    alt = f"Heatmap of log2 step sizes, {len(sites)} blocks by {groups.num_groups} time groups: "
    return draw(key, f"{alt}{float(steps.min()):.1f} to {float(steps.max()):.1f}.", paint, (SMALL, _height(len(sites))))


def fixed_note(solution: Solution) -> str:
    """Return a note for a model whose post-softmax scales do not change over time."""
    rows = [p.spec.grid.per_row for p in solution.params.values() if p.spec.role is Role.SOFTMAX]
    if rows and all(rows):
        return "a scale for each row, which needs no time groups"
    return "a scale for each row, or one scale for all timesteps" if any(rows) else "one scale for all timesteps"


def grid_note(sites: Sequence[GridParams]) -> str:
    """Return a note that says which scale a heatmap of these sites shows."""
    uniform = [str(block) for block, p in enumerate(sites) if p.spec.grid is Grid.UNIFORM]
    if not uniform:
        return "s₁ of the MRQ grid"
    if len(uniform) == len(sites):
        return "the scale of the uniform grid"
    return f"s₁ of the MRQ grid; in block {', '.join(uniform)} the scale of a uniform grid"


def _height(rows: int) -> float:
    return min(6.0, 2.3 + 0.13 * rows)
