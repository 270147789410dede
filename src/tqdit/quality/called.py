"""Hold a comparison on recorded calls, and make a run of it: the figures and images that a report shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.quality import run_file
from tqdit.quality.replayed import CallComparison, ImageRow
from tqdit.quality.run import Part, Row, Run
from tqdit.quality.saved import (
    SAVED_IMAGES,
    CalledFacts,
    Drawn,
    SiteErrors,
    now,
    plain,
    recipe_values,
    solution_values,
)


@dataclass(frozen=True)
class Compared:
    """The comparison of one transformer.

    `sizes`: name -> bytes of the weights over those of bf16. `fresh`: whether the calls are others than those of the
    calibrations. `facts`: of the float model, `sites`: of each artifact; both are for a report.
    """

    component: str
    comparison: CallComparison
    sizes: Mapping[str, float]
    fresh: bool
    dtype: str
    facts: CalledFacts | None = None

    def figures(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "facts"}
        return {**values, "comparison": self.comparison.figures()}


@dataclass(frozen=True)
class FolderComparison:
    """The comparisons of all transformers of a folder, and of the images of its pipeline if prompts were given.

    `drawn`: these images, for a report.
    """

    name: str
    transformers: tuple[Compared, ...]
    images: tuple[ImageRow, ...]
    environment: Mapping[str, Any]
    drawn: Drawn | None = None

    def figures(self) -> dict[str, Any]:
        """Return JSON values."""
        parts = [part.figures() for part in self.transformers]
        values = {name: value for name, value in vars(self).items() if name != "drawn"}
        return {**values, "transformers": parts, "images": [row.figures() for row in self.images]}

    def save(self, path: str | Path, command: str = "") -> None:
        """Write the comparison as a run, a .safetensors file that `tqdit report` makes a page of.

        `command`: what made it, for the page. Raises `InputError` for a comparison that was not made with `sites`.
        """
        if any(part.facts is None for part in self.transformers):
            raise InputError("a comparison is saved with its sites; call compare with sites=True")
        run_file.write(Path(path), *run_of_calls(self, command))


def run_of_calls(comparison: FolderComparison, command: str = "") -> tuple[Run, dict[int, torch.Tensor]]:
    """Return the run of a comparison on recorded calls, and the images that a pipeline drew, which its first part has.

    Where the images are not of one size, there are none.
    """
    drawn = comparison.drawn.images if comparison.drawn else {}
    drawn = drawn if "" in drawn and len({pixels.shape for pixels in drawn.values()}) == 1 else {}
    numbers = {name: number for number, name in enumerate(drawn)}
    parts = [_called_part(comparison, part, {} if i else numbers) for i, part in enumerate(comparison.transformers)]
    run = Run(kind="calls", command=command, created=now(), environment=plain(comparison.environment), parts=parts)
    return run, {numbers[name]: pixels for name, pixels in drawn.items()}


def _called_part(comparison: FolderComparison, part: Compared, numbers: Mapping[str, int]) -> Part:
    found, facts = part.comparison, part.facts
    assert facts is not None, "compare with sites=True"
    bounds = [found.groups[0][0], *(high for _, high, _ in found.groups)]
    images = {row.name: row for row in comparison.images}
    models = []
    for row in found.rows:
        solution, drawn = facts.solutions.get(row.name), images.get(row.name)
        provenance = solution.provenance if solution else None
        ratio = part.sizes.get(row.name)
        models.append(Row(
            name=row.name, preset=provenance.preset_name if provenance else None,
            bits=provenance.bits if provenance else row.name, recipe=recipe_values(solution),
            size_bytes=round(ratio * 2 * facts.parameters) if ratio else 2 * facts.parameters,
            sqnr_db=row.sqnr_db, worst_db=row.worst_db, groups=bounds, sqnr_by_group=list(row.by_group),
            images=numbers.get(row.name), psnr_db=drawn.mean_db if drawn else None,
            worst_psnr_db=drawn.worst_db if drawn else None,
            **solution_values(solution, facts.sites.get(row.name, SiteErrors((), 0))),
        ))  # fmt: skip
    reference = Row(
        name=comparison.name, bits=part.dtype, size_bytes=facts.file_bytes, float32_bytes=4 * facts.parameters,
        file_dtype=facts.file_dtype, images=numbers.get(""),
    )  # fmt: skip
    protocol: dict[str, str | int | float | bool | None] = {
        "class": found.kind, "calls": found.calls, "calls_sha256": facts.calls_sha256, "dtype": part.dtype,
        "held_out": part.fresh, "groups": len(found.groups), "timestep": found.timestep,
    }  # fmt: skip
    return Part(
        component=part.component, reference_sha256=facts.reference_sha256, protocol=protocol, low=bounds[0],
        high=bounds[-1], reference=reference, models=models,
        captions=list(comparison.drawn.prompts[:SAVED_IMAGES]) if numbers and comparison.drawn else [],
    )  # fmt: skip
