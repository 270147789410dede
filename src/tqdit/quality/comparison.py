"""Compare a float model with its quantized versions: one frozen result, which the JSON and the report show."""

import gc
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tqdit.artifact import folder as artifact
from tqdit.calibration import trajectories
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.imaging import images
from tqdit.imaging.images import Images
from tqdit.imaging.request import chosen_classes
from tqdit.quality import fashion, features, fidelity, metrics
from tqdit.quality.artifacts import ComparedArtifact, artifact_paths, load_artifact
from tqdit.quality.details import of_samples
from tqdit.quality.fidelity import EpsilonFidelity
from tqdit.quality.samples import Comparison, ModelRow
from tqdit.quality.trial import Trial, fashion_trial
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Device, Dtype, Target, dtype_name
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.sampling.prompts import read_conditions
from tqdit.sampling.schedules import resolved
from tqdit.sources.conditions import suitable
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.sources.sizes import FloatSizes, float_sizes
from tqdit.sources.source import ModelSource
from tqdit.speed.cost import Cost, memory, timed
from tqdit.stages import Report, silent
from tqdit.system.distributed import current
from tqdit.system.environment import environment
from tqdit.system.isolation import isolated
from tqdit.system.validation import check_counts, check_flags

HELD_OUT_SEED = 20_000  # far from calibration's seeds, so noise and states differ
TOGETHER = 2**30  # bytes of artifacts that are timed in turn with each other
STATE_GROUPS = 10  # ranges of timesteps that held-out states are drawn from


@isolated()
def compare_samples(  # noqa: PLR0913 - one for each option of the command
    reference: str | Path,
    quantized: str | Path | Sequence[str | Path],
    num: int = 16,
    sampling: Sampling = Sampling(),
    samples: int = 8,
    seed: int = 0,
    *,
    report: Report = silent,
    device: Device = "auto",
    dtype: Dtype = "float32",
    cost: bool = True,
    conditions: Conditions | str | Path | None = None,
    equivalence: bool = False,
    sites: bool = False,
    bfloat16: bool = True,
) -> Comparison:
    """Compare artifacts with their float model: epsilon SQNR, PSNR of same-seed images, FD-fashion, size, time, memory.

    `quantized`: a list of artifacts, or one. `num`: the number of images.
    `samples`: the number of held-out states in each of ten equal ranges of the timesteps;
    the states are the same whatever is compared. `conditions`: the prompts of a model of prompts; by default the
    model's own classes. `dtype`: float32, float16 or bfloat16, that the integer models are loaded as. `cost`: also
    time calls next to the float model's in eager float32, and measure memory in a process for each model; not where
    several processes share the machine. `equivalence`: also give every artifact a `Verdict`, for a model of
    Fashion-MNIST; `num` must then be a multiple of 20, at least 40, and images of the float model are drawn twice
    more, in bf16 and with the next seed. `sites`: also measure the error of every site by itself, in a simulation,
    which `Comparison.save` and the report want.
    `bfloat16`: of `equivalence`, whether images in bf16 are drawn, too. A CPU without instructions for it is slow.

    FD-fashion is None where the bundled classifier does not fit. It is biased upwards for few images: compare it only
    within one table. Inside `distributed.joined` the ranks share images and states, and each returns the whole
    comparison.

    Raises `InputError` for an artifact of another model, and before any work for an option that is not legal and where
    the images could not be decoded.
    """
    check_counts(num=num, samples=samples)
    check_flags(cost=cost, equivalence=equivalence, sites=sites, bfloat16=bfloat16)
    target = Target(device=device, dtype=dtype)
    source, conditions = resolve(reference), read_conditions(conditions)
    asked = suitable(source.config, conditions)
    wanted = Images(source, chosen_classes(source, asked), num, sampling, seed, conditions=conditions)
    trial = fashion_trial(wanted, target.device) if equivalence else None
    paths = artifact_paths(quantized)
    model = load_float(source).to(target.device)
    digest = weights_hash(model)
    found = [load_artifact(path, source, digest) for path in paths]
    calls = _Calls(source, sampling, num, target)
    measures = cost and current().size == 1
    groups = min(STATE_GROUPS, source.num_timesteps)
    data = held_out(source, model, groups, samples, (HELD_OUT_SEED + seed) % 2**31, report, asked)
    groups = data.time_groups.num_groups
    first, rows = _measured(model, found, wanted, data, report, target)
    if measures:
        rows = calls.timed(model, found, rows, report)
    if trial:
        rows = _with_verdicts(trial, model, first, rows, report, bfloat16)
    details = of_samples(model, found, wanted, data, digest, report) if sites else None
    del model
    if measures:
        first, rows = calls.with_memory(first, rows, found, report)
    settings: dict[str, Any] = {"num": num, "samples_per_group": samples, "groups": groups, "states": len(data)}
    settings |= {"seed": seed, "dtype": target.dtype_name, **asdict(wanted.drawn_with)}
    if measures:
        settings["call_batch"] = calls.batch
    return Comparison(first, tuple(rows), settings, environment(str(target.device)), details)


def held_out(
    source: ModelSource,
    model: nn.Module,
    groups: int,
    samples: int,
    seed: int,
    report: Report = silent,
    conditions: Conditions | None = None,
) -> CalibrationSet:
    """Collect states of the float model's own noise-free trajectories, with another seed than calibration's.

    The ranges of timesteps are equal, except for flow matching: a shift leaves equal ranges without a step.
    """
    total = source.num_timesteps
    wanted = min(total, max(50, 2 * groups))
    steps = next(n for n in range(wanted, total + 1) if total % n == 0)  # a divisor of T, which visits the last group
    recipe = Recipe(
        groups=groups,
        samples=samples,
        trajectories=samples,
        sampler=resolved(Sampling(), source.scheduler).sampler,
        steps=steps,
        seed=seed,
        time_edges="visited" if source.time_range[2] else "uniform",
        hessian="none",  # states alone: nothing is weighed
    )
    return trajectories.collect(
        model, source.scheduler, recipe, lambda f: report("held-out states", f), conditions=conditions
    )


def fd_fashion(source: ModelSource, pixels: torch.Tensor) -> float | None:
    """Return FD-fashion of the images where the model makes Fashion-MNIST's classes, 1 x 32 x 32, else None."""
    fits = fashion.is_fashion(source.labels, pixels.shape[1:])
    return features.fd_fashion(pixels) if fits and len(pixels) > 1 and bool(torch.isfinite(pixels).all()) else None


def _with_verdicts(
    trial: Trial, model: nn.Module, first: ModelRow, rows: Sequence[ModelRow], report: Report, bfloat16: bool
) -> list[ModelRow]:
    """Return the rows with the verdict of each; two artifacts may have the same name."""
    drawn = {f"{number}: {row.name}": row.images for number, row in enumerate(rows)}
    found = trial.judge(model, first.images, drawn, report, bfloat16)
    return [replace(row, verdict=verdict) for row, verdict in zip(rows, found.values(), strict=True)]


def _pixels(wanted: Images, module: nn.Module, name: str, report: Report) -> torch.Tensor:
    """Return the same-seed images of a model."""
    report(f"images of {name}", 0.0)
    return images.gathered(wanted, module, lambda f: report(f"images of {name}", f))


def _measured(
    model: nn.Module,
    found: Sequence[ComparedArtifact],
    wanted: Images,
    data: CalibrationSet,
    report: Report,
    target: Target,
) -> tuple[ModelRow, list[ModelRow]]:
    """Return the rows of the float model and of the artifacts, one after another; nothing is timed."""
    source = wanted.source
    sizes = float_sizes(source, model)
    first = _float_row(source, sizes, _pixels(wanted, model, source.name, report))
    expected = fidelity.predict_epsilon(model, data)
    rows = []
    for entry in found:
        module = convert(entry.solution, target.backend, target.device, target.dtype)
        actual = fidelity.predict_epsilon(module, data)
        eps = fidelity.compare_epsilon(expected, actual, data, entry.solution.time_groups)
        row = _quantized_row(entry, first, sizes, _pixels(wanted, module, entry.name, report), eps)
        fd = fd_fashion(source, row.images)
        stream = dtype_name(cast(torch.dtype, module.stream_dtype))
        rows.append(replace(row, fd_fashion=fd, stream_dtype=stream))
    return first, rows


@dataclass(frozen=True)
class _Calls:
    """The calls that are timed, and whose memory is measured, with as many samples as one batch of the images has."""

    source: ModelSource
    sampling: Sampling
    num: int
    target: Target

    @property
    def batch(self) -> int:
        return min(self.num, images.BATCH) * (1 if self.sampling.guidance == 1 else 2)

    @property
    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self.source.config.items() if key != "quantization_config"}

    def timed(
        self, model: nn.Module, found: Sequence[ComparedArtifact], rows: Sequence[ModelRow], report: Report
    ) -> list[ModelRow]:
        """Return the rows with times. Small artifacts take turns with each other and with the float model.

        Larger ones, which may not fit beside each other, are timed with the float model one after another.
        """
        small = sum(row.size_bytes for row in rows) <= TOGETHER
        groups = [range(len(found))] if small else [range(i, i + 1) for i in range(len(found))]
        target, done = self.target, list(rows)
        for at, group in enumerate(groups):
            report("timing", at / len(groups))
            # Converted anew: none is kept while images are drawn, so that no two large ones are in memory.
            made = {str(i): convert(found[i].solution, target.backend, target.device, target.dtype) for i in group}
            share = partial(_share, report, at, len(groups))
            costs = timed(model, made, self.config, self.batch, self.source.num_timesteps, share)
            for i in group:
                done[i] = replace(done[i], cost=costs[str(i)])
            del made  # before the next one is made
        return done

    def with_memory(
        self, first: ModelRow, rows: Sequence[ModelRow], found: Sequence[ComparedArtifact], report: Report
    ) -> tuple[ModelRow, list[ModelRow]]:
        """Return the rows with memory. The float model's time is the median of its times next to each artifact."""
        gc.collect()  # free the models: each is measured with the machine to itself
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()
        costs = [row.cost for row in rows if row.cost]
        if not costs:
            return first, list(rows)
        ms = statistics.median(cost.float32_ms for cost in costs)
        given: list[tuple[ModelRow, str | None]] = [(replace(first, cost=Cost(ms, ms)), None)]
        given += [(row, str(entry.folder)) for row, entry in zip(rows, found, strict=True)]
        measured = []
        for number, (row, folder) in enumerate(given):
            report("memory", number / len(given))
            seen = memory(self.config, self.batch, self.target.device, folder, self.target.dtype_name)
            peak, resident = (seen.peak_bytes, seen.resident_bytes) if seen else (None, None)
            assert row.cost is not None
            measured.append(replace(row, cost=replace(row.cost, peak_bytes=peak, resident_bytes=resident)))
        report("memory", 1.0)
        return measured[0], measured[1:]


def _share(report: Report, at: int, total: int, fraction: float) -> None:
    """Report a fraction of one of `total` equal parts of the timing."""
    report("timing", (at + fraction) / total)


def _float_row(source: ModelSource, sizes: FloatSizes, pixels: torch.Tensor) -> ModelRow:
    row = ModelRow(source.name, None, "float32", sizes.float32_bytes, 1.0, pixels, fd_fashion(source, pixels))
    return replace(row, file_bytes=sizes.file_bytes, file_dtype=sizes.file_dtype)


def _quantized_row(
    entry: ComparedArtifact, reference: ModelRow, sizes: FloatSizes, pixels: torch.Tensor, eps: EpsilonFidelity
) -> ModelRow:
    size = artifact.size_bytes(entry.folder)
    provenance = entry.solution.provenance
    return ModelRow(
        name=entry.name,
        preset=provenance.preset_name,
        bits=provenance.bits,
        size_bytes=size,
        size_ratio=size / sizes.float32_bytes,
        size_ratio_bfloat16=size / sizes.bfloat16_bytes,
        size_ratio_file=size / sizes.file_bytes,
        images=pixels,
        fd_fashion=None,
        eps=eps,
        psnr_db=metrics.psnr_db(reference.images, pixels),
        solution=entry.solution,
    )
