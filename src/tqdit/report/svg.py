"""Draw one matplotlib figure as an inline SVG, with the same as PNG and its numbers as CSV behind links."""

import base64
import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the page's text colour; becomes `currentColor`, so that dark mode works
SIZE = (5.2, 3.3)  # inches of 72 units: text of 12 units has about 11 pixels on a phone
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
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc must not change the report
        mpl.rcParams.update(STYLE | {"svg.hashsalt": key})
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        vector, pixels = StringIO(), BytesIO()
        figure.savefig(vector, format="svg", dpi=DPI, metadata=ANONYMOUS)
        figure.set_layout_engine("none")  # the layout is found, and finding it takes most of the time
        figure.savefig(pixels, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return Chart(key, _inline(vector.getvalue(), alt), data_uri("image/png", pixels.getvalue()), csv_uri(rows))


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
