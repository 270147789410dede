"""A float model and its quantized versions side by side: one frozen result, which the JSON and the report show."""

import json
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
from tqdit.evaluation import features, fidelity, generate, metrics
from tqdit.evaluation.fidelity import EpsilonFidelity
from tqdit.models.sampler import Sampling
from tqdit.models.sources import ModelSource, load_float, resolve
from tqdit.recipe import Recipe
from tqdit.spec import Solution
from tqdit.workflow import Report, checked_device, cycle_classes, float32_bytes, silent

HELD_OUT_SEED = 20_000  # far from calibration's: other noise, other states


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
        """The row as JSON values."""
        return {
            "name": self.name,
            "preset": self.preset,
            "bits": self.bits,
            "size_bytes": self.size_bytes,
            "size_ratio": self.size_ratio,
            "calibration_seconds": self.calibration_seconds,
            "eps_sqnr_db": self.eps and self.eps.overall,
            "eps_sqnr_db_by_group": self.eps and self.eps.by_group,
            "psnr_db": self.psnr_db,
            "fd_fashion": self.fd_fashion,
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


def compare(
    reference: str | Path,
    quantized: list[str | Path],
    num: int = 16,
    sampling: Sampling = Sampling(),
    samples: int = 8,
    seed: int = 0,
    report: Report = silent,
    device: str = "cpu",
) -> Comparison:
    """Compare artifacts with their float model: epsilon SQNR, PSNR of same-seed images, FD-fashion, size.

    `num` images, `samples` held-out states per time group. FD-fashion is None where the bundled classifier does not
    fit, and biased upwards for few images: compare it only within one table.
    """
    if num < 1 or samples < 1:
        raise InputError(f"num and samples must be at least 1, got {num} and {samples}")
    source = resolve(reference)
    model = load_float(source).to(checked_device(device))
    found = [_load_artifact(path, source) for path in quantized]
    groups = max((solution.time_groups.num_groups for _, _, solution in found), default=10)
    data = held_out(source, model, groups, samples, HELD_OUT_SEED + seed, report)
    labels = cycle_classes(source, [], num)

    def images(module: nn.Module, name: str) -> torch.Tensor:
        def tell(fraction: float) -> None:
            report(f"images of {name}", fraction)

        latents = generate.sample_latents(module, source.scheduler, labels, sampling, seed, tell)
        return generate.to_pixels(latents, source.vae)

    expected = fidelity.predict_epsilon(model, data)
    pixels = images(model, source.name)
    fp32 = float32_bytes(model)
    reference_row = ModelRow(source.name, None, "float32", fp32, 1.0, pixels, fd_fashion(source, pixels))
    rows = []
    for folder, name, solution in found:
        module = convert(solution).to(device)
        pixels = images(module, name)
        size = artifact.size_bytes(folder)
        recipe = solution.provenance.get("recipe", {})
        rows.append(
            ModelRow(
                name=name,
                preset=recipe.get("preset"),
                bits=f"w{recipe.get('weight_bits')}a{recipe.get('activation_bits')}",
                size_bytes=size,
                size_ratio=size / fp32,
                images=pixels,
                fd_fashion=fd_fashion(source, pixels),
                eps=fidelity.compare_epsilon(expected, fidelity.predict_epsilon(module, data), data),
                psnr_db=metrics.psnr_db(reference_row.images, pixels),
                solution=solution,
            )
        )
    settings = {"num": num, "samples_per_group": samples, "groups": groups, "seed": seed, **asdict(sampling)}
    return Comparison(reference_row, tuple(rows), settings, environment(device))


def held_out(
    source: ModelSource, model: nn.Module, groups: int, samples: int, seed: int, report: Report = silent
) -> CalibrationSet:
    """States of the float model's own DDIM trajectories: another seed and sampler than calibration's."""
    total = int((source.scheduler or {}).get("num_train_timesteps", 1000))
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
    """FD-fashion of the images where the bundled classifier fits the model, else None."""
    fits = tuple(pixels.shape[1:]) == (1, 32, 32) and int(source.config["num_embeds_ada_norm"]) == 10
    return features.fd_fashion(pixels) if fits and len(pixels) > 1 else None


def _load_artifact(path: str | Path, source: ModelSource) -> tuple[Path, str, Solution]:
    other = resolve(path)
    if not other.quantized:
        raise InputError(f"'{path}' is not quantized; compare takes a float model, then artifacts")
    solution = artifact.read(other.folder)
    for key in ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "in_channels"):
        if solution.model_config[key] != source.config[key]:
            raise InputError(f"'{path}' was not made from '{source.name}': {key} differs")
    return other.folder, other.name, solution
