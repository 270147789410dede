"""Draw SVG files from shapes: what the scripts that draw figures of docs/ share.

A file has a white ground, so that it is also readable on a dark page, and names no font of its own. The same shapes
give the same bytes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pages import ROOT

INK, GREY, PALE = "#22303a", "#6b7983", "#e9eef1"
TEAL, ORANGE, BLUE = "#0f8b7d", "#d9622b", "#3a6fb0"


def svg(title: str, width: int, height: int, shapes: Sequence[str]) -> str:
    """Return a file of the shapes; `title` is its accessible name."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" font-size="14">'
    )
    ground = f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *shapes, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, colour: str = INK, **style: str) -> str:
    """Return one line of text, whose baseline is at y; `style`: attributes of SVG, such as anchor="middle"."""
    names = {"anchor": "text-anchor", "size": "font-size", "weight": "font-weight"}
    more = "".join(f' {names[name]}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{more}>{escape(words)}</text>'


def line(start: tuple[float, float], end: tuple[float, float], colour: str = INK, width: float = 1.5) -> str:
    """Return a straight line."""
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def box(x: float, y: float, size: tuple[float, float], fill: str, edge: str = "none", corner: float = 0) -> str:
    """Return a rectangle; `size`: width and height."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}" rx="{corner}" fill="{fill}" '
        f'stroke="{edge}"/>'
    )


def arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> str:
    """Return an arrow that goes straight down or to the right."""
    (x, y), down = end, end[0] == start[0]
    head = [(x, y), (x - 5, y - 9), (x + 5, y - 9)] if down else [(x, y), (x - 9, y - 5), (x - 9, y + 5)]
    stop = (x, y - 8) if down else (x - 8, y)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in head)
    return line(start, stop, colour, 2) + f'<polygon points="{points}" fill="{colour}"/>'


def write_or_check(description: str | None, drawn: Mapping[Path, str]) -> None:
    """Run a script that draws: write the files that are out of date, or with --check exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a picture is out of date")
    check = parser.parse_args().check
    stale = [path for path, made in drawn.items() if not path.is_file() or path.read_text(encoding="utf-8") != made]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            path.write_text(drawn[path], encoding="utf-8")
    sys.exit(1 if check and stale else 0)
