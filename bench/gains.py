"""Draw docs/images/gains.svg, the README's picture: time, size and images of float models beside tqdit's.

python bench/gains.py
python bench/gains.py --check    # only compares

Every bar is a figure of a file in bench/results/.
"""

from typing import NamedTuple

from drawing import BLUE, GREY, INK, ORANGE, TEAL, box, line, svg, text, write_or_check
from pages import ROOT, read

PATH = ROOT / "docs" / "images" / "gains.svg"
LABEL, SPAN, ROW = 128.0, 190.0, 30.0  # of a panel: width of its labels, of its longest bar, height of a bar
BITS = ("w8a8", "w6a6", "w4a8")


class Bar(NamedTuple):
    """One bar: its name, its length, and its colour."""

    name: str
    value: float
    colour: str


class Panel(NamedTuple):
    """One group of bars; `form` is the format of their values."""

    title: str
    note: str
    form: str
    bars: list[Bar]


def panels() -> list[Panel]:
    """Return the four panels of the picture."""
    return [_cpu(), _gpu(), _sizes(), _images()]


def _cpu() -> Panel:
    run = read("cpu-dit-xl-2")
    times = {row["backend"]: row["p50_ms"] for row in run["rows"] if not row["integer"]}
    ours = next(row["p50_ms"] for row in run["rows"] if row.get("preset") == "plus")
    bars = [
        Bar("float32", min(times["float32-compiled"], times["float32-eager"]), GREY),
        Bar("bfloat16", min(times["bf16-compiled"], times["bf16-eager"]), BLUE),
        Bar("torchao int8", times["torchao-int8"], ORANGE),
        Bar("tqdit W8A8", ours, TEAL),
    ]
    return Panel(f"Time on {run['environment']['cores']} CPU cores", "ms a call of DiT-XL/2, 2 samples", ".0f", bars)


def _gpu() -> Panel:
    rows = [row for row in read("h200")["rows"] if row["workload"] == "256-b64 torchao"]
    times = {row["backend"]: row["p50_ms"] for row in rows}
    bars = [
        Bar("bfloat16", min(times["bf16-autotuned"], times["bf16-blocks"]), BLUE),
        Bar("torchao int8", times["torchao-int8"], ORANGE),
        Bar("torchao fp8", times["torchao-fp8"], ORANGE),
        Bar("tqdit W8A8", times["triton"], TEAL),
    ]
    return Panel("Time on an H200", "ms a call of DiT-XL/2, 64 samples; all compiled", ".1f", bars)


def _sizes() -> Panel:
    plus = {row["bits"]: row["size_ratio"] for row in read("ablation-quality")["rows"] if row["variant"] == "plus"}
    bars = [Bar("float32", 1.0, GREY), Bar("bfloat16", 0.5, BLUE)]
    return Panel("Size of the file", "of float32's, fashion-dit", ".2f", [*bars, *_of_bits(plus)])


def _images() -> Panel:
    models = read("equivalence-h200")["trials"][0]["models"]
    bars = [Bar("bfloat16", models["bfloat16"]["psnr_db"], BLUE)]
    psnr = {bits: models[bits]["psnr_db"] for bits in BITS}
    return Panel(
        "Likeness of the images",
        "PSNR to float32's in dB, fashion-dit: more is better",
        ".1f",
        [*bars, *_of_bits(psnr)],
    )


def _of_bits(values: dict[str, float]) -> list[Bar]:
    return [Bar(f"tqdit {bits.upper()}", values[bits], TEAL) for bits in BITS]


def picture() -> str:
    """Return the picture, two panels beside each other."""
    shapes: list[str] = []
    for i, panel in enumerate(panels()):
        shapes += _drawn(panel, 30 + 400 * (i % 2), 36 + 225 * (i // 2))
    return svg("Time of a call, size of the file and likeness of the images, float beside tqdit", 820, 480, shapes)


def _drawn(panel: Panel, x: float, y: float) -> list[str]:
    longest = max(bar.value for bar in panel.bars)
    shapes = [text(x, y, panel.title, weight="600", size="17"), text(x, y + 20, panel.note, GREY, size="13")]
    for i, bar in enumerate(panel.bars):
        top, length = y + 34 + ROW * i, SPAN * bar.value / longest
        ours = {"weight": "600"} if bar.colour == TEAL else {}
        shapes.append(text(x + LABEL - 10, top + 16, bar.name, INK, anchor="end", **ours))
        shapes.append(box(x + LABEL, top, (length, ROW - 8), bar.colour, corner=3))
        shapes.append(text(x + LABEL + length + 8, top + 16, format(bar.value, panel.form), INK, **ours))
    bottom = y + 34 + ROW * len(panel.bars)
    return [*shapes, line((x + LABEL, y + 30), (x + LABEL, bottom), GREY, 1)]


def main() -> None:
    """Write the picture, or say that it is out of date."""
    write_or_check(__doc__, {PATH: picture()})


if __name__ == "__main__":
    main()
