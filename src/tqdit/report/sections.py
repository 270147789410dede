"""Sort saved runs into sections: rows of one float model and one protocol share a table, others do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tqdit.quality.run import Part, Row, Run

# Okabe and Ito's colours (blue a little lighter) that stand out on white and on near-black. Each model has a marker
# too, since colour alone is not enough.
COLOURS = ("#1f83c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}  # matplotlib's name, and the same in text

Saved = tuple[Run, Mapping[int, torch.Tensor]]


@dataclass(frozen=True)
class Series:
    """The look of one model in every chart and key."""

    name: str
    colour: str
    marker: str

    @property
    def glyph(self) -> str:
        """Return the marker as a character, for keys in HTML."""
        return MARKERS[self.marker]


@dataclass(frozen=True)
class Shown:
    """One quantized model of a section: its figures and look, images and those of its float model, and its run."""

    row: Row
    look: Series
    reference: Row
    pixels: torch.Tensor | None
    expected: torch.Tensor | None
    run: int


@dataclass
class Section:
    """The models that are compared in one table. `runs`: the numbers of their runs."""

    kind: str
    part: Part
    number: int
    models: list[Shown] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)

    @property
    def reference(self) -> Row:
        """Return the float model."""
        return self.part.reference

    @property
    def rows(self) -> list[Row]:
        """Return the rows of the quantized models."""
        return [shown.row for shown in self.models]

    @property
    def looks(self) -> list[Series]:
        """Return the looks of the quantized models, in the order of their rows."""
        return [shown.look for shown in self.models]

    @property
    def quantized(self) -> list[Shown]:
        """Return the models that are quantized: on recorded calls one row is the float model in bf16."""
        return [shown for shown in self.models if shown.row.recipe or shown.row.sites]


def sections(saved: Sequence[Saved]) -> list[Section]:
    """Return the sections of all runs, in the order in which they begin."""
    found: dict[object, Section] = {}
    for run_number, (run, images) in enumerate(saved):
        for part in run.parts:
            identity = (run.kind, part.component, part.reference_sha256, tuple(sorted(part.protocol.items())))
            section = found.setdefault(identity, Section(run.kind, part, len(found)))
            section.runs.append(run_number)
            expected = _pixels(part.reference, images)
            for row in part.models:
                look = _look(row, section, run_number)
                section.models.append(Shown(row, look, part.reference, _pixels(row, images), expected, run_number))
    return list(found.values())


def differences(first: Section, other: Section) -> list[str]:
    """Return what keeps two sections apart, in words: "steps: 50, not 20"."""
    found = []
    if first.kind != other.kind:
        found.append("one is of samples, one of recorded calls")
    if first.part.component != other.part.component:
        found.append(f"transformer: {other.part.component}, not {first.part.component}")
    if first.part.reference_sha256 != other.part.reference_sha256:
        found.append(f"float model: other weights ({other.reference.name}, {first.reference.name})")
    ours, theirs = first.part.protocol, other.part.protocol
    if first.kind == other.kind:
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        found += [f"{key.replace('_', ' ')}: {theirs.get(key)}, not {ours.get(key)}" for key in keys]
    return found


def _look(row: Row, section: Section, run: int) -> Series:
    """Return a colour and a marker that no model of the section has yet; pairs repeat after 30 models."""
    number = len(section.models)
    taken = {shown.look.name for shown in section.models}
    name = row.name if row.name not in taken else f"{row.name} (run {run + 1})"
    while name in taken:
        name += "'"
    return Series(name, COLOURS[number % len(COLOURS)], tuple(MARKERS)[number % len(MARKERS)])


def _pixels(row: Row, images: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    return None if row.images is None else images.get(row.images)
