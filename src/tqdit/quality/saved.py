"""Make runs of comparisons: the figures, images and single sites that a report shows, without any model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from tqdit.quality import run_file
from tqdit.quality.equivalence import Verdict
from tqdit.quality.run import Boxes, Judged, Part, Row, Run, Site, Steps
from tqdit.spec import Role, Solution
from tqdit.timegroups import TimeGroups

if TYPE_CHECKING:
    from tqdit.quality.comparison import Comparison, ModelRow
    from tqdit.quality.traced_artifacts import Compared, FolderComparison

SAVED_IMAGES = 20  # of each model
SAVED_EDGE = 512  # pixels, at most
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_BOXES = 25


@dataclass(frozen=True)
class SiteErrors:
    """The measured sites of one model, the most sensitive first, of `in_all` sites."""

    sites: tuple[Site, ...]
    in_all: int


@dataclass(frozen=True)
class Details:
    """The rest of what a report shows: `sites` of each model, and `boxes` of post-softmax maxima.

    `reference_sha256`: of the float model's weights. `conditions_sha256`: of the prompts, None for classes.
    `time_range`: of the timesteps. `captions`: a word on each image, such as its class, or "".
    """

    reference_sha256: str
    conditions_sha256: str | None
    time_range: tuple[float, float]
    sites: tuple[SiteErrors, ...]
    boxes: tuple[Boxes, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CalledFacts:
    """The rest of what a report shows of one transformer that was compared on recorded calls.

    `file_bytes`, `file_dtype`: of the float weights as they are stored. `solutions`: of each artifact, without tensors
    of weights.
    """

    reference_sha256: str
    calls_sha256: str
    parameters: int
    file_bytes: int
    file_dtype: str
    sites: Mapping[str, SiteErrors]
    solutions: Mapping[str, Solution]


@dataclass(frozen=True)
class Drawn:
    """Images that a pipeline drew for prompts: `images` by model, uint8 (N, C, H, W); "" is the float model."""

    prompts: tuple[str, ...]
    images: dict[str, torch.Tensor] = field(default_factory=dict)

    def keep(self, name: str, images: Sequence[torch.Tensor]) -> None:
        """Keep images (1, H, W, C) or videos (1, F, H, W, C) in [0, 1] if they have one size; of videos a frame."""
        frames = [image[0] if image.ndim == 4 else image[0, image.shape[1] // 2] for image in images[:SAVED_IMAGES]]
        if len({frame.shape for frame in frames}) == 1 and frames[0].shape[-1] in (1, 3):
            self.images[name] = _in_bytes(torch.stack(frames).permute(0, 3, 1, 2) * 2 - 1)


def save_samples(comparison: "Comparison", path: Path, command: str = "") -> None:
    """Write a comparison on samples as a run. Its images are the first `SAVED_IMAGES` of each model, in 8 bits."""
    run, images = run_of_samples(comparison, command)
    run_file.write(path, run, images)


def run_of_samples(comparison: "Comparison", command: str = "") -> tuple[Run, dict[int, torch.Tensor]]:
    """Return the run of a comparison that was made with `sites`, and the images of its rows."""
    details = comparison.details
    assert details is not None, "compare with sites=True"
    rows = (comparison.float_model, *comparison.models)
    images = {number: _in_bytes(row.images) for number, row in enumerate(rows)}
    measured = (SiteErrors((), 0), *details.sites)
    reference, *models = (_sample_row(row, found, i) for i, (row, found) in enumerate(zip(rows, measured, strict=True)))
    protocol = {**comparison.settings, "conditions_sha256": details.conditions_sha256}
    low, high = details.time_range
    part = Part(
        component="transformer", reference_sha256=details.reference_sha256, protocol=_plain(protocol), low=low,
        high=high, reference=reference, models=models, boxes=list(details.boxes),
        captions=list(details.captions[:SAVED_IMAGES]),
    )  # fmt: skip
    return Run(
        kind="samples", command=command, created=_now(), environment=_plain(comparison.environment), parts=[part]
    ), images


def run_of_calls(comparison: "FolderComparison", command: str = "") -> tuple[Run, dict[int, torch.Tensor]]:
    """Return the run of a comparison on recorded calls, and the images that a pipeline drew, which its first part has.

    Where the images are not of one size, there are none.
    """
    drawn = comparison.drawn.images if comparison.drawn else {}
    drawn = drawn if "" in drawn and len({pixels.shape for pixels in drawn.values()}) == 1 else {}
    numbers = {name: number for number, name in enumerate(drawn)}
    parts = [_called_part(comparison, part, {} if i else numbers) for i, part in enumerate(comparison.transformers)]
    run = Run(kind="calls", command=command, created=_now(), environment=_plain(comparison.environment), parts=parts)
    return run, {numbers[name]: pixels for name, pixels in drawn.items()}


def save_calls(comparison: "FolderComparison", path: Path, command: str = "") -> None:
    """Write a comparison on recorded calls as a run."""
    run, images = run_of_calls(comparison, command)
    run_file.write(path, run, images)


def maxima_boxes(maxima: torch.Tensor, t: torch.Tensor, groups: TimeGroups) -> list[Boxes]:
    """Return boxes of the first, middle and last block.

    maxima: (S, blocks, C), largest post-softmax values; t: (S,). The ranges of timesteps are `groups`, merged until
    they are at most `MOST_BOXES`.
    """
    bounds = _bounds(groups)
    bounds = [*bounds[: -1 : max(1, math.ceil(groups.num_groups / MOST_BOXES))], bounds[-1]]
    member = torch.bucketize(t.double(), torch.tensor(bounds[1:-1], dtype=torch.float64), right=True)
    last = maxima.shape[1] - 1
    found = []
    for block in sorted({0, (last + 1) // 2, last}):
        boxes = []
        for index in range(len(bounds) - 1):
            values = maxima[member == index, block].flatten().double()
            levels = torch.tensor(QUANTILES, dtype=torch.float64)
            boxes.append(values.quantile(levels).tolist() if len(values) else None)
        found.append(Boxes(block=block, bounds=bounds, boxes=boxes))
    return found


def _sample_row(row: "ModelRow", found: SiteErrors, number: int) -> Row:
    eps, cost, solution = row.eps, row.cost, row.solution
    return Row(
        name=row.name, preset=row.preset, bits=row.bits, recipe=_recipe(solution), size_bytes=row.disk_bytes,
        float32_bytes=row.size_bytes if solution is None else None, file_dtype=row.file_dtype,
        sqnr_db=_finite(eps.overall) if eps else None, exact=bool(eps and eps.overall == math.inf),
        groups=_bounds(solution.time_groups) if eps and solution else [],
        sqnr_by_group=[_finite(db) for db in eps.by_group] if eps else [],
        by_timestep=[[float(t), _finite(db)] for t, db in eps.by_timestep] if eps else [],
        psnr_db=_finite(row.psnr_db), fd_fashion=_finite(row.fd_fashion),
        ms_per_call=cost.ms_per_call if cost else None, speedup=cost.speedup if cost else None,
        peak_bytes=cost.peak_bytes if cost else None, calibration_seconds=row.calibration_seconds,
        verdict=_judged(row.verdict) if row.verdict else None, images=number, **_of_solution(solution, found),
    )  # fmt: skip


def _called_part(comparison: "FolderComparison", part: "Compared", numbers: Mapping[str, int]) -> Part:
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
            bits=provenance.bits if provenance else row.name, recipe=_recipe(solution),
            size_bytes=round(ratio * 2 * facts.parameters) if ratio else 2 * facts.parameters,
            sqnr_db=row.sqnr_db, worst_db=row.worst_db, groups=bounds, sqnr_by_group=list(row.by_group),
            images=numbers.get(row.name), psnr_db=drawn.mean_db if drawn else None,
            worst_psnr_db=drawn.worst_db if drawn else None,
            **_of_solution(solution, facts.sites.get(row.name, SiteErrors((), 0))),
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


def _of_solution(solution: Solution | None, found: SiteErrors) -> dict[str, Any]:
    """Return the part of a row that is of its solution."""
    if solution is None:
        return {}
    softmax = [p for p in solution.params.values() if p.spec.role is Role.SOFTMAX]
    steps = []
    for params in softmax:
        if params.spec.groups > 1 and not params.spec.grid.per_row:
            finest = params.spec.grid.by_region(params.scale)[0].double().amin(1)
            steps.append(Steps(grid=str(params.spec.grid), log2=finest.log2().tolist()))
    return {
        "sites": list(found.sites), "sites_in_all": found.in_all, "softmax_steps": steps,
        "softmax_rows": bool(softmax) and all(p.spec.grid.per_row for p in softmax), "notes": dict(solution.notes),
    }  # fmt: skip


def _judged(verdict: Verdict) -> Judged:
    return Judged(
        n=verdict.n, blocks=verdict.blocks, difference=verdict.kid.value, lower=verdict.kid.lower,
        upper=verdict.kid.upper, margin=verdict.margin, p=verdict.p_equivalent_adjusted, equivalent=verdict.equivalent,
        p_closer=verdict.p_closer_adjusted, closer_than_bf16=verdict.closer_than_bf16,
    )  # fmt: skip


def _recipe(solution: Solution | None) -> dict[str, Any]:
    return {} if solution is None else _plain(solution.provenance.recipe)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are numbers, words or flags; others become text."""
    return {key: x if isinstance(x, str | int | float | bool | None) else str(x) for key, x in values.items()}


def _bounds(groups: TimeGroups) -> list[float]:
    return [groups.low, *groups.edges, *([] if groups.edges and groups.edges[-1] == groups.high else [groups.high])]


def _in_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Return the first images, uint8, of pixels (N, C, H, W) in [-1, 1]; large ones are made smaller. NaN becomes 0."""
    found = pixels[:SAVED_IMAGES].float().nan_to_num(-1).cpu()
    shrink = math.ceil(max(found.shape[-2:]) / SAVED_EDGE)
    if shrink > 1:
        found = F.interpolate(found, size=[length // shrink for length in found.shape[-2:]], mode="area")
    return ((found + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
