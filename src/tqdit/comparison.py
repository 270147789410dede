"""A float model and its quantized versions side by side: one frozen result, which the JSON and the report show."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit import artifact
from tqdit.calibration import trajectories
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.convert import convert
from tqdit.environment import environment
from tqdit.errors import InputError
from tqdit.evaluation import features, fidelity, images, metrics
from tqdit.evaluation.fidelity import EpsilonFidelity
from tqdit.evaluation.images import Images
from tqdit.models import fitting
from tqdit.models.sampler import Sampling
from tqdit.models.sources import ModelSource, load_float, resolve, weights_hash
from tqdit.recipe import Recipe
from tqdit.spec import Solution
from tqdit.tensors import decisive
from tqdit.workflow import Report, checked_device, checked_dtype, chosen_classes, float32_bytes, silent

HELD_OUT_SEED = 20_000  # far from calibration's: other noise, other states
FASHION = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class ModelRow:
    """One model's figures. The float model has no `eps`, `psnr_db` or `solution`; its size is its fp32 weights."""

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

    def figures(self) -> dict[str, Any]:
        """The row as JSON values; a figure that is not finite (of equal images, of NaN) is None."""
        return {
            "name": self.name,
            "preset": self.preset,
            "bits": self.bits,
            "size_bytes": self.size_bytes,
            "size_ratio": self.size_ratio,
            "calibration_seconds": self.calibration_seconds,
            "eps_sqnr_db": _finite(self.eps.overall) if self.eps else None,
            "eps_sqnr_db_by_group": [_finite(db) for db in self.eps.by_group] if self.eps else None,
            "psnr_db": _finite(self.psnr_db),
            "fd_fashion": _finite(self.fd_fashion),
        }


@dataclass(frozen=True)
class Comparison:
    """`float_model` and the quantized `models`; `settings` say how the images and states were drawn."""

    float_model: ModelRow
    models: tuple[ModelRow, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def with_seconds(self, seconds: list[float]) -> "Comparison":
        """The same, with the calibration time of every quantized model."""
        rows = zip(self.models, seconds, strict=True)
        return replace(self, models=tuple(replace(row, calibration_seconds=s) for row, s in rows))

    def to_json(self) -> str:
        """`tqdit compare --json`: `reference` and a list `models` of figures, with settings and environment."""
        value = {
            "environment": self.environment,
            "settings": self.settings,
            "reference": self.float_model.figures(),
            "models": [row.figures() for row in self.models],
        }
        return json.dumps(value, indent=1, allow_nan=False) + "\n"


def compare(  # noqa: PLR0913 - one for each option of the command
    reference: str | Path,
    quantized: list[str | Path],
    num: int = 16,
    sampling: Sampling = Sampling(),
    samples: int = 8,
    seed: int = 0,
    report: Report = silent,
    device: str = "cpu",
    *,
    dtype: str = "float32",
) -> Comparison:
    """Compare artifacts with their float model: epsilon SQNR, PSNR of same-seed images, FD-fashion, size.

    `num` images, `samples` held-out states per time group; `dtype`: float32 or bfloat16, of the residual stream of the
    integer models. FD-fashion is None where the bundled classifier does not
    fit, and biased upwards for few images: compare it only within one table. Raises `InputError` for an artifact of
    another model, and before any sampling where the images could not be decoded. Inside `distributed.joined` the ranks
    share images and states, and each returns the whole comparison.
    """
    if num < 1 or samples < 1:
        raise InputError(f"num and samples must be at least 1, got {num} and {samples}")
    stream = checked_dtype(dtype)
    source = resolve(reference)
    wanted = Images(source, chosen_classes(source, []), num, sampling, seed)
    model = load_float(source).to(checked_device(device))
    digest = weights_hash(model)
    found = [_load_artifact(path, source, digest) for path in quantized]
    groups = max((entry.solution.time_groups.num_groups for entry in found), default=10)
    data = held_out(source, model, groups, samples, (HELD_OUT_SEED + seed) % 2**31, report)
    first = _float_row(source, model, _pixels(wanted, model, source.name, report))
    expected = fidelity.predict_epsilon(model, data)
    rows = []
    for entry in found:
        module = convert(entry.solution, device=device, dtype=stream)
        eps = fidelity.compare_epsilon(expected, fidelity.predict_epsilon(module, data), data)
        rows.append(_quantized_row(entry, first, _pixels(wanted, module, entry.name, report), eps, source))
    settings = {"num": num, "samples_per_group": samples, "groups": groups, "seed": seed, "dtype": dtype}
    settings |= asdict(sampling)
    return Comparison(first, tuple(rows), settings, environment(device))


def held_out(
    source: ModelSource, model: nn.Module, groups: int, samples: int, seed: int, report: Report = silent
) -> CalibrationSet:
    """States of the float model's own DDIM trajectories: another seed and sampler than calibration's."""
    total = _timesteps(source)
    wanted = min(total, max(50, 2 * groups))
    steps = next(n for n in range(wanted, total + 1) if total % n == 0)  # a divisor, so that the last group is visited
    recipe = Recipe.build(
        groups=groups,
        samples=samples,
        trajectories=samples,
        sampler="ddim",
        steps=steps,
        seed=seed,
    )
    return trajectories.collect(model, source.scheduler, recipe, lambda f: report("held-out states", f))


def fd_fashion(source: ModelSource, pixels: torch.Tensor) -> float | None:
    """FD-fashion of the images where the model makes Fashion-MNIST's classes, 1 x 32 x 32, else None."""
    fits = tuple(pixels.shape[1:]) == (1, 32, 32) and dict(source.labels) == dict(enumerate(FASHION))
    return features.fd_fashion(pixels) if fits and len(pixels) > 1 and bool(torch.isfinite(pixels).all()) else None


@dataclass(frozen=True)
class _Artifact:
    folder: Path
    name: str
    solution: Solution


def _pixels(wanted: Images, module: nn.Module, name: str, report: Report) -> torch.Tensor:
    """The same-seed images of one model after another."""
    return images.gathered(wanted, module, lambda f: report(f"images of {name}", f))


def _float_row(source: ModelSource, model: nn.Module, pixels: torch.Tensor) -> ModelRow:
    return ModelRow(source.name, None, "float32", float32_bytes(model), 1.0, pixels, fd_fashion(source, pixels))


def _quantized_row(
    entry: _Artifact, reference: ModelRow, pixels: torch.Tensor, eps: EpsilonFidelity, source: ModelSource
) -> ModelRow:
    size = artifact.size_bytes(entry.folder)
    provenance = entry.solution.provenance
    recipe = provenance.get("recipe", {})
    return ModelRow(
        name=entry.name,
        preset=provenance.get("preset", recipe.get("preset")),
        bits=f"w{recipe.get('weight_bits')}a{recipe.get('activation_bits')}",
        size_bytes=size,
        size_ratio=size / reference.size_bytes,
        images=pixels,
        fd_fashion=fd_fashion(source, pixels),
        eps=eps,
        psnr_db=metrics.psnr_db(reference.images, pixels),
        solution=entry.solution,
    )


def _load_artifact(path: str | Path, source: ModelSource, digest: str) -> _Artifact:
    """An artifact made from the float model whose weights have the hash `digest`, else `InputError`."""
    other = resolve(path)
    if not other.quantized:
        raise InputError(f"'{path}' is not quantized; compare takes a float model, then artifacts")
    solution = fitting.read(other.folder)
    if solution.provenance.get("source_sha256") != digest:
        made_from = solution.provenance.get("source", "an unknown model")
        raise InputError(
            f"'{path}' was not made from '{source.name}' but from other weights ('{made_from}'); compare it with those"
        )
    given, made = decisive(source.config), decisive(solution.model_config)
    for key in given:
        if key in made and given[key] != made[key]:
            raise InputError(f"'{path}' was made of a model with {key} {made[key]}, '{source.name}' has {given[key]}")
    if (found := solution.time_groups.num_timesteps) != (total := _timesteps(source)):
        raise InputError(f"'{path}' has {found} training timesteps, the scheduler of '{source.name}' has {total}")
    return _Artifact(other.folder, other.name, solution)


def _timesteps(source: ModelSource) -> int:
    return int((source.scheduler or {}).get("num_train_timesteps", 1000))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
