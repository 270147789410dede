"""Hold a comparison on samples, and make a run of it: the figures and images that a report shows, without any model."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.quality import run_file
from tqdit.quality.equivalence import Verdict
from tqdit.quality.fidelity import EpsilonFidelity
from tqdit.quality.run import Part, Row, Run
from tqdit.quality.saved import (
    SAVED_IMAGES,
    Details,
    SiteErrors,
    bounds_of,
    finite,
    in_bytes,
    judged,
    now,
    plain,
    recipe_values,
    solution_values,
)
from tqdit.spec import Solution
from tqdit.speed.cost import Cost


@dataclass(frozen=True)
class ModelRow:
    """The figures of one model in a comparison.

    The float model has no `eps`, `psnr_db` or `solution`; its size is that of its fp32 weights. `size_ratio` is over
    fp32, `size_ratio_bfloat16` over bf16, and `size_ratio_file` over the file that was quantized: the float model's
    `file_bytes`, whose tensors are of `file_dtype`. `stream_dtype`: of an integer model's residual stream.
    """

    name: str
    preset: str | None
    bits: str
    size_bytes: int
    size_ratio: float
    images: torch.Tensor  # (num, C, H, W) in [-1, 1], the same seeds for every model
    fd_fashion: float | None
    eps: EpsilonFidelity | None = None
    psnr_db: float | None = None
    solution: Solution | None = None
    calibration_seconds: float | None = None
    size_ratio_bfloat16: float | None = None
    size_ratio_file: float | None = None
    file_bytes: int | None = None
    file_dtype: str | None = None
    cost: Cost | None = None
    verdict: Verdict | None = None
    stream_dtype: str | None = None

    @property
    def disk_bytes(self) -> int:
        """Return the bytes that the model takes on disk: the artifact's weights, or the float model's file."""
        return self.size_bytes if self.file_bytes is None else self.file_bytes

    def figures(self) -> dict[str, Any]:
        """Return the row as JSON values. A figure that is not finite (for equal images, or NaN) is None."""
        return {
            "name": self.name,
            "preset": self.preset,
            "bits": self.bits,
            "size_bytes": self.size_bytes,
            "size_ratio": self.size_ratio,
            "size_ratio_bfloat16": self.size_ratio_bfloat16,
            "size_ratio_file": self.size_ratio_file,
            "file_bytes": self.file_bytes,
            "file_dtype": self.file_dtype,
            "calibration_seconds": self.calibration_seconds,
            "stream_dtype": self.stream_dtype,
            "eps_sqnr_db": finite(self.eps.overall) if self.eps else None,
            "eps_sqnr_db_by_group": [finite(db) for db in self.eps.by_group] if self.eps else None,
            "psnr_db": finite(self.psnr_db),
            "fd_fashion": finite(self.fd_fashion),
            "ms_per_call": self.cost.ms_per_call if self.cost else None,
            "speedup_over_float32_eager": self.cost.speedup if self.cost else None,
            "peak_bytes": self.cost.peak_bytes if self.cost else None,
            "resident_bytes": self.cost.resident_bytes if self.cost else None,
            "verdict": self.verdict.figures() if self.verdict else None,
        }


@dataclass(frozen=True)
class Comparison:
    """The figures of `float_model` and of the quantized `models`; `settings` say how images and states were drawn.

    `details`: what a report shows besides, of a comparison that was made with `sites`.
    """

    float_model: ModelRow
    models: tuple[ModelRow, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]
    details: Details | None = None

    def save(self, path: str | Path, command: str = "") -> None:
        """Write the comparison as a run, a .safetensors file that `tqdit report` makes a page of.

        `command`: what made it, for the page. Raises `InputError` for a comparison that was not made with `sites`.
        """
        if self.details is None:
            raise InputError("a comparison is saved with its sites; call compare with sites=True")
        run_file.write(Path(path), *run_of_samples(self, command))

    def with_seconds(self, seconds: list[float]) -> "Comparison":
        """Return the same comparison with the calibration time of every quantized model."""
        rows = zip(self.models, seconds, strict=True)
        return replace(self, models=tuple(replace(row, calibration_seconds=s) for row, s in rows))

    def to_json(self) -> str:
        """Return the text that `tqdit compare --json` writes.

        Its figures are `reference` and the list `models`, beside `settings` and `environment`.
        """
        value = {
            "environment": self.environment,
            "settings": self.settings,
            "reference": self.float_model.figures(),
            "models": [row.figures() for row in self.models],
        }
        return json.dumps(value, indent=1, allow_nan=False) + "\n"


def run_of_samples(comparison: Comparison, command: str = "") -> tuple[Run, dict[int, torch.Tensor]]:
    """Return the run of a comparison that was made with `sites`, and the images of its rows."""
    details = comparison.details
    assert details is not None, "compare with sites=True"
    rows = (comparison.float_model, *comparison.models)
    images = {number: in_bytes(row.images) for number, row in enumerate(rows)}
    measured = (SiteErrors((), 0), *details.sites)
    reference, *models = (_sample_row(row, found, i) for i, (row, found) in enumerate(zip(rows, measured, strict=True)))
    protocol = {**comparison.settings, "conditions_sha256": details.conditions_sha256}
    low, high = details.time_range
    part = Part(
        component="transformer", reference_sha256=details.reference_sha256, protocol=plain(protocol), low=low,
        high=high, reference=reference, models=models, boxes=list(details.boxes),
        captions=list(details.captions[:SAVED_IMAGES]),
    )  # fmt: skip
    return Run(
        kind="samples", command=command, created=now(), environment=plain(comparison.environment), parts=[part]
    ), images


def _sample_row(row: ModelRow, found: SiteErrors, number: int) -> Row:
    eps, cost, solution = row.eps, row.cost, row.solution
    return Row(
        name=row.name, preset=row.preset, bits=row.bits, recipe=recipe_values(solution), size_bytes=row.disk_bytes,
        float32_bytes=row.size_bytes if solution is None else None, file_dtype=row.file_dtype,
        sqnr_db=finite(eps.overall) if eps else None, exact=bool(eps and eps.overall == math.inf),
        groups=bounds_of(solution.time_groups) if eps and solution else [],
        sqnr_by_group=[finite(db) for db in eps.by_group] if eps else [],
        by_timestep=[[float(t), finite(db)] for t, db in eps.by_timestep] if eps else [],
        psnr_db=finite(row.psnr_db), fd_fashion=finite(row.fd_fashion),
        ms_per_call=cost.ms_per_call if cost else None, speedup=cost.speedup if cost else None,
        peak_bytes=cost.peak_bytes if cost else None, calibration_seconds=row.calibration_seconds,
        verdict=judged(row.verdict) if row.verdict else None, images=number, **solution_values(solution, found),
    )  # fmt: skip
