"""Draw one matplotlib figure as an inline SVG, with the same as PNG and its numbers as CSV behind links."""

import base64
import csv
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour; becomes `currentColor`, so that dark mode works
SIZE = (5.2, 3.3)  # inches of 72 units: text of 12 units has about 11 pixels on a phone
UNITS = 72  # of an SVG, to the inch
DPI = 200  # resolution of the parts that are rasterized
PNG_DPI = 120
STYLE: Any = {  # matplotlib types every key by name
    "svg.fonttype": "none",  # text stays text: selectable, small, in the page's font
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "font.size": 12,
    "axes.linewidth": 0.8,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK)
ANONYMOUS = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # the same figure gives the same bytes
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Rows = Sequence[Sequence[object]]


@dataclass(frozen=True)
class Chart:
    """One chart of the page: an `<svg>` element, and data URIs of the same as PNG and of its numbers as CSV.

    `name`: of the files that the links offer.
    """

    name: str
    svg: Markup
    png: str
    csv: str


def draw(key: str, alt: str, paint: Callable[["Axes"], None], rows: Rows, size: tuple[float, float] = SIZE) -> Chart:
    """Return the chart of the axes on which `paint` draws, with `alt` as its accessible name.

    `size`: (width, height) in units of 72 pixels. `rows`: what is drawn as a table, the heads first. `key` must be
    unique in the page: it keeps the ids of one figure apart from those of the next.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc must not change the report
        mpl.rcParams.update(STYLE | {"svg.hashsalt": key})
        figure = Figure(figsize=size, dpi=UNITS, layout="constrained")
        FigureCanvasSVG(figure)  # so the layout is found with the widths of text in an SVG
        axes = figure.add_subplot()
        paint(axes)
        _join_minor_ticks(axes)
        vector, pixels = StringIO(), BytesIO()
        _lay_out(figure)
        figure.savefig(pixels, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
        figure.savefig(vector, format="svg", dpi=DPI, metadata=ANONYMOUS)
    return Chart(key, _inline(vector.getvalue(), alt), data_uri("image/png", pixels.getvalue()), csv_uri(rows))


def log_scale(axes: "Axes", name: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with labels such as 10³ in plain text: matplotlib would parse each as a formula."""
    from matplotlib.ticker import FuncFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))


def power_of_ten(value: float) -> str:
    """Return 10³ for 1000."""
    return f"10{str(round(math.log10(value))).translate(RAISED)}"


def _lay_out(figure: "Figure") -> None:
    """Find the layout of a figure and keep it. Otherwise each `savefig` draws once more in vain, to find it again."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)


def _join_minor_ticks(axes: "Axes") -> None:
    """Draw the minor ticks of each axis as one row of markers: as ticks each would be five objects to place and draw.

    Minor ticks with labels, as on an axis of less than a decade, stay.
    """
    from matplotlib import rcParams
    from matplotlib.lines import Line2D
    from matplotlib.markers import TICKDOWN, TICKLEFT
    from matplotlib.ticker import NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        places = [float(place) for place in axis.get_minorticklocs() if low <= place <= high]
        if not places or any(axis.get_minor_formatter().format_ticks(places)):
            continue
        edge, along_x = [0.0] * len(places), axis is axes.xaxis
        marker: Any = TICKDOWN if along_x else TICKLEFT  # matplotlib's stubs know them as bare numbers
        row = Line2D(
            places if along_x else edge, edge if along_x else places, linestyle="none", color=INK,
            marker=marker, markersize=rcParams["xtick.minor.size"],
            markeredgewidth=rcParams["xtick.minor.width"],
            transform=axes.get_xaxis_transform() if along_x else axes.get_yaxis_transform(),
        )  # fmt: skip
        row.set_in_layout(False)
        axes.add_artist(row).set_clip_on(False)
        axis.set_minor_locator(NullLocator())


def csv_uri(rows: Rows) -> str:
    """Return a table as the data URI of a CSV file."""
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return data_uri("text/csv;charset=utf-8", text.getvalue().encode())


def data_uri(kind: str, data: bytes) -> str:
    """Return bytes of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _inline(document: str, alt: str) -> Markup:
    """Return an SVG document as an element of an HTML page: no prolog, style sheet, namespaces or unused ids."""
    text = document[document.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = text.replace(INK, "currentColor")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))
