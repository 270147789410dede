"""Hold and convert what a run has beside figures: measured sites, images, and facts about models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch.nn import functional as F

from tqdit.quality.equivalence import Verdict
from tqdit.quality.run import Boxes, Judged, Site, Steps
from tqdit.spec import Role, Solution
from tqdit.timegroups import TimeGroups

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
            self.images[name] = in_bytes(torch.stack(frames).permute(0, 3, 1, 2) * 2 - 1)


def maxima_boxes(maxima: torch.Tensor, t: torch.Tensor, groups: TimeGroups) -> list[Boxes]:
    """Return boxes of the first, middle and last block.

    maxima: (S, blocks, C), largest post-softmax values; t: (S,). The ranges of timesteps are `groups`, merged until
    they are at most `MOST_BOXES`.
    """
    bounds = bounds_of(groups)
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


def solution_values(solution: Solution | None, found: SiteErrors) -> dict[str, Any]:
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


def judged(verdict: Verdict) -> Judged:
    """Return a verdict in the format of runs."""
    return Judged(
        n=verdict.n, blocks=verdict.blocks, difference=verdict.kid.value, lower=verdict.kid.lower,
        upper=verdict.kid.upper, margin=verdict.margin, p=verdict.p_equivalent_adjusted, equivalent=verdict.equivalent,
        p_closer=verdict.p_closer_adjusted, closer_than_bf16=verdict.closer_than_bf16,
    )  # fmt: skip


def recipe_values(solution: Solution | None) -> dict[str, Any]:
    """Return the settings of a solution's recipe, none for a float model."""
    return {} if solution is None else plain(solution.provenance.recipe)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are numbers, words or flags; others become text."""
    return {key: x if isinstance(x, str | int | float | bool | None) else str(x) for key, x in values.items()}


def bounds_of(groups: TimeGroups) -> list[float]:
    """Return the lowest timestep, the edges between time groups, and the highest timestep."""
    return [groups.low, *groups.edges, *([] if groups.edges and groups.edges[-1] == groups.high else [groups.high])]


def in_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Return the first images, uint8, of pixels (N, C, H, W) in [-1, 1]; large ones are made smaller. NaN becomes 0."""
    found = pixels[:SAVED_IMAGES].float().nan_to_num(-1).cpu()
    shrink = math.ceil(max(found.shape[-2:]) / SAVED_EDGE)
    if shrink > 1:
        found = F.interpolate(found, size=[length // shrink for length in found.shape[-2:]], mode="area")
    return ((found + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def now() -> str:
    """Return date and time of now, in UTC, for a page."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def finite(value: float | None) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
