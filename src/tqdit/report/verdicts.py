"""Put the verdicts of the equivalence test into words, with what a test of so few images can tell."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdit.quality.equivalence import ENOUGH
from tqdit.quality.run import Judged, Row
from tqdit.report.sections import Shown

MARKS = {"yes": "✓", "open": "?", "few": "≈"}
PUBLISHED = 10_000  # images of the project's own test


@dataclass(frozen=True)
class Told:
    """The verdict of one model: a mark for yes, open, or too few images; a headline; the figures that it rests on."""

    shown: Shown
    kind: str  # a key of MARKS
    headline: str
    figures: str

    @property
    def mark(self) -> str:
        """Return the sign before the headline."""
        return MARKS[self.kind]


def told(models: Sequence[Shown]) -> list[Told]:
    """Return the verdicts of the models that were tested."""
    return [_told(shown, shown.row.verdict) for shown in models if shown.row.verdict is not None]


def caution(rows: Sequence[Row]) -> str:
    """Return what so few images can tell, or "" where there are enough, or none were tested."""
    tested = [row.verdict for row in rows if row.verdict is not None]
    if not tested or tested[0].n >= ENOUGH:
        return ""
    n = tested[0].n
    narrower = (PUBLISHED / n) ** 0.5
    return (
        f"{n} images can tell little. The margin is what another choice of seeds does to {n} images of the float model "
        f"itself, which is much; it shrinks with the square root of their number, so {PUBLISHED} images would have one "
        f"about {narrower:.0f} times as narrow. A yes here rules out a coarse loss alone, and a model that passes may "
        f"fail with {PUBLISHED} images; “not shown” does not mean that the images are worse."
    )


def rule(verdict: Judged) -> str:
    """Return how the test decides, for the reader who sees it first."""
    return (
        "The test asks whether a model’s images are as far from real ones as the float model’s of the same seeds, "
        f"within the margin that other seeds make: {verdict.blocks} blocks of {verdict.n // verdict.blocks} images, "
        "kernel distances in a small classifier’s features, two one-sided t tests at 5 %, corrected for the number "
        "of models."
    )


def _told(shown: Shown, verdict: Judged | None) -> Told:
    assert verdict is not None
    passed, kind = "equivalent to the float model’s images", "yes" if verdict.equivalent else "open"
    if verdict.n < ENOUGH:
        kind = "few" if verdict.equivalent else "open"
        passed = f"no difference beyond that of other seeds, as far as {verdict.n} images can tell"
    headline = passed if verdict.equivalent else "equivalence not shown"
    closer = {True: "; closer to them than bf16’s", False: "; not closer to them than bf16’s", None: ""}
    figures = (
        f"difference {verdict.difference:+.2g}, one-sided 95 % bounds {verdict.lower:+.2g} and {verdict.upper:+.2g}, "
        f"margin ±{verdict.margin:.2g}, p = {verdict.p:.2g}{closer[verdict.closer_than_bf16]}"
    )
    return Told(shown, kind, headline, figures)
