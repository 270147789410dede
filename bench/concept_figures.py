"""Draw the figures of docs/concepts.md as SVG files. Levels and groups are those of the package's own code.

python bench/concept_figures.py
python bench/concept_figures.py --check    # only compares
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from drawing import BLUE, GREY, INK, ORANGE, PALE, TEAL, arrow, box, line, svg, text, write_or_check
from pages import ROOT
from tqdit.grids import uniform
from tqdit.grids.formats import IntFormat
from tqdit.grids.kind import Grid
from tqdit.timegroups import TimeGroups

FOLDER = ROOT / "docs" / "images"
BITS = 4  # few enough levels to see each
WIDTH, LEFT, SPAN = 520, 24.0, 472.0  # of the pictures, and of their axes
SAMPLES = 20_000
# What a block of DiT does: verb, what it computes, what it writes; codes or floats.
VERBS = (
    ("quantize", "LayerNorm, modulation, codes with row scales", True),
    ("project", "x · [Wq Wk Wv] in int32, then codes for each head", True),
    ("attend", "Q Kᵀ and P V in int32, probabilities as codes", True),
    ("linear", "· Wo in int32, times the gate, added to the stream", False),
    ("quantize", "LayerNorm, modulation, codes with row scales", True),
    ("linear", "· W1 in int32, GELU, codes of the time group", True),
    ("linear", "· W2 in int32, times the gate, added to the stream", False),
)


def figures() -> dict[Path, str]:
    """Path -> text of every figure."""
    return {
        FOLDER / "concept-regions.svg": regions(),
        FOLDER / "concept-time-groups.svg": time_groups(),
        FOLDER / "concept-block.svg": block(),
    }


def regions() -> str:
    """Draw where values after GELU and softmax lie, and the levels of a uniform grid and of two regions."""
    generator = torch.Generator().manual_seed(0)
    activations = F.gelu(torch.randn(SAMPLES, generator=generator, dtype=torch.float64), approximate="tanh")
    scores = 2 * torch.randn(SAMPLES // 16, 16, generator=generator, dtype=torch.float64)
    shapes = _panel(40, "after GELU: x from −0.17 to 4", activations, Grid.MRQ_GELU)
    shapes += _panel(300, "after softmax: x from 0 to 1", torch.softmax(scores, -1).flatten(), Grid.MRQ_SOFTMAX)
    return svg("Levels of a uniform grid and of multi-region quantization", WIDTH, 550, shapes)


def _panel(top: float, title: str, values: Tensor, grid: Grid) -> list[str]:
    """Draw a histogram of values, and below it the levels of two grids of `BITS` bits."""
    low, high = (-0.17, 4.0) if grid is Grid.MRQ_GELU else (0.0, 1.0)

    def place(value: float) -> float:
        return LEFT + SPAN * (value - low) / (high - low)

    counts = torch.histc(values.clamp(low, high), 80, low, high)
    heights = 90 * (counts / counts.max()).sqrt()  # roots, so that the long tail can be seen
    step = SPAN / 80
    shapes = [text(LEFT, top, title, weight="600")]
    for i, height in enumerate(heights.tolist()):
        shapes.append(box(LEFT + i * step, top + 110 - height, (step - 1, height), PALE, "#c8d2d8"))
    shapes.append(line((LEFT, top + 110), (LEFT + SPAN, top + 110), GREY))
    rows = [("uniform: one scale", _uniform_levels(low, high), [INK] * 2), _region_row(grid)]
    for row, (name, levels, colours) in enumerate(rows):
        y = top + 138 + 50 * row
        for level in sorted(set(levels)):
            if low <= level <= high + 1e-6:
                colour = colours[0] if _in_first(grid, level) else colours[1]
                shapes.append(line((place(level), y), (place(level), y + 18), colour, 2))
        shapes.append(text(LEFT + SPAN, y + 32, name, GREY, anchor="end", size="13"))
    return shapes


def _uniform_levels(low: float, high: float) -> list[float]:
    scale, zero = uniform.minmax_asymmetric(torch.tensor(low), torch.tensor(high), BITS, "figure")
    return uniform.dequantize(_codes(), scale, zero).tolist()


def _region_row(grid: Grid) -> tuple[str, list[float], list[str]]:
    low, high = (-0.17, 4.0) if grid is Grid.MRQ_GELU else (0.0, 1.0)
    scale, zero = grid.initial(torch.tensor([[low]]), torch.tensor([[high]]), BITS, "figure")
    levels = grid.dequantize(_codes(), scale[0, 0, 0], scale[0, 0, 1], zero[0, 0]).tolist()
    return "MRQ: two regions (colours) with a scale each", levels, [ORANGE, TEAL]


def _in_first(grid: Grid, level: float) -> bool:
    """Say whether a level belongs to the region of its negative codes."""
    if grid is Grid.MRQ_GELU:
        return level < 0
    scale, _ = grid.initial(torch.zeros(1, 1), torch.ones(1, 1), BITS, "figure")
    return level <= float(scale[0, 0, 0]) * -IntFormat(BITS).qmin


def _codes() -> Tensor:
    fmt = IntFormat(BITS)
    return torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.int8)


def time_groups() -> str:
    """Draw the groups of 1000 training timesteps, and the steps of a sampler that visits some of them."""
    groups, y = TimeGroups.uniform(0, 1000, 10), 62.0
    edges = [groups.low, *groups.edges, groups.high]
    shapes = [text(LEFT, 34, "ten groups of 1000 training timesteps", weight="600")]
    for i, (low, high) in enumerate(pairwise(edges)):
        x, width = LEFT + SPAN * low / 1000, SPAN * (high - low) / 1000
        shapes.append(box(x, y, (width - 2, 46), PALE if i % 2 else "#d5e8e5", "#c8d2d8", 4))
        shapes.append(text(x + width / 2, y + 20, f"{i}", anchor="middle", weight="600"))
        shapes.append(text(x + width / 2, y + 38, f"s{_below(i)}, z{_below(i)}", TEAL, anchor="middle", size="13"))
    for t in range(0, 1000, 40):
        shapes.append(line((LEFT + SPAN * t / 1000, y + 56), (LEFT + SPAN * t / 1000, y + 70), ORANGE, 2))
    shapes += [
        text(LEFT, y + 92, "t = 0, an image", GREY, size="13"),
        text(LEFT + SPAN, y + 92, "t = 999, noise", GREY, anchor="end", size="13"),
        text(LEFT + SPAN / 2, y + 92, "25 steps of a sampler", ORANGE, anchor="middle", size="13"),
    ]
    return svg("Time groups: ranges of timesteps with scales of their own", WIDTH, 176, shapes)


def _below(number: int) -> str:
    return "₀₁₂₃₄₅₆₇₈₉"[number]


def block() -> str:
    """Draw the seven verbs of a block of DiT, and what travels between them."""
    stream, left = LEFT + 14, LEFT + 72
    shapes = [
        text(LEFT, 34, "one block of a DiT: seven verbs", weight="600"),
        line((stream, 54), (stream, 640), BLUE, 5),
        text(LEFT, 664, "residual stream, float", BLUE, size="13"),
    ]
    for i, (verb, what, codes) in enumerate(VERBS):
        y = 58 + 84 * i
        middle = y + 29
        if i in (0, 4):
            shapes.append(arrow((stream + 2, middle), (left, middle), BLUE))
        shapes.append(box(left, y, (400, 58), "#fbf1ec" if codes else "#edf2f8", ORANGE if codes else BLUE, 6))
        shapes += [text(left + 14, y + 24, verb, weight="600"), text(left + 14, y + 45, what)]
        if codes:
            shapes.append(arrow((left + 200, y + 58), (left + 200, y + 84), ORANGE))
            shapes.append(text(left + 212, y + 76, "int8 codes", ORANGE, size="13"))
        else:
            shapes.append(line((left, middle), (stream + 2, middle), BLUE, 2))
            shapes.append(f'<circle cx="{stream:.1f}" cy="{middle:.1f}" r="10" fill="#ffffff" stroke="{BLUE}"/>')
            shapes.append(text(stream, middle + 5, "+", BLUE, anchor="middle", weight="600"))
    return svg("The way of the data through an integer block", WIDTH, 684, shapes)


def main() -> None:
    """Write the figures, or say which are out of date."""
    write_or_check(__doc__, figures())


if __name__ == "__main__":
    main()
