"""Draw the histogram of a site's values with the regions of its grid behind it."""

import math
from statistics import median
from typing import TYPE_CHECKING

from tqdit.quality.run import Histogram, Site
from tqdit.report.sections import COLOURS
from tqdit.report.svg import INK, Chart, draw, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.7, 3.0)
TINTS = {"coded as 0": "#888888", "codes": COLOURS[0], "fine region": COLOURS[2], "coarse region": COLOURS[4]}
TINTS |= {"negative region": COLOURS[2], "positive region": COLOURS[4]}
MOST_LINES = 25  # ends of regions that are drawn one by one, for each region


def site_histogram(key: str, site: Site, found: Histogram) -> Chart:
    """Draw the counts on a logarithmic axis; a region is tinted, with a line at each time group's ends of it."""

    def paint(axes: "Axes") -> None:
        _paint_regions(axes, found)
        axes.stairs(found.counts, found.edges, fill=True, color=INK, alpha=0.55)
        log_scale(axes, "y")
        if found.log:
            log_scale(axes, "x")
        axes.set(xlabel=found.unit, ylabel="values", xlim=(found.edges[0], found.edges[-1]), ylim=(0.8, None))
        if found.regions:
            axes.legend(loc="upper right", fontsize=9, framealpha=0.0, labelcolor=INK)

    alt = f"Histogram of {found.values} values of {site.name}. {described(found)}"
    table: list[list[object]] = [["from", "to", "count"]]
    table += [list(row) for row in zip(found.edges, found.edges[1:], found.counts, strict=False)]
    table += [[], ["region", "group", "low", "high"]]
    for region in found.regions:
        table += [[region.label, i, *ends] for i, ends in enumerate(zip(region.low, region.high, strict=True))]
    return draw(key, alt, paint, table, SIZE)


def described(found: Histogram) -> str:
    """Return what the regions do to the values, in words."""
    ranges = [
        f"{region.label} from {_number(median(region.low))} to {_number(median(region.high))}"
        for region in found.regions
    ]
    shares = f"{100 * found.clipped:.2g} % are clipped, {100 * found.zeroed:.2g} % become 0."
    return f"{'; '.join(ranges)}; {shares}" if ranges else shares


def _paint_regions(axes: "Axes", found: Histogram) -> None:
    first, last = found.edges[0], found.edges[-1]
    for region in found.regions:
        tint = TINTS.get(region.label, COLOURS[3])
        low, high = (min(max(median(ends), first), last) for ends in (region.low, region.high))
        axes.axvspan(low, high, color=tint, alpha=0.22, linewidth=0, label=region.label)
        ends = sorted({*region.low, *region.high})
        ends = ends[:: max(1, math.ceil(len(ends) / MOST_LINES))]
        for end in ends:
            if first < end < last:
                axes.axvline(end, color=tint, linewidth=0.9, alpha=0.8)


def _number(value: float) -> str:
    return f"{value:.3g}"
