"""Benchmark quantized models' speed and memory, with float baselines of the same shape.

The result is one frozen object, as JSON shows it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdit.architectures import registry
from tqdit.architectures.shapes import shape_config, shape_key
from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.runtime.target import Target, checked_device
from tqdit.sampling.schedules import schedule
from tqdit.sources.resolve import resolve
from tqdit.sources.sampled import check_sampled
from tqdit.speed.baselines import FAMILIES
from tqdit.speed.contest import Contest, Result, best_of, contest
from tqdit.speed.entrants import BenchSettings, Subject, default_dtype, images
from tqdit.speed.machine import Peaks, measure_peaks
from tqdit.speed.quiet import quiet
from tqdit.speed.random_solution import random_solution
from tqdit.stages import Report, silent
from tqdit.system.environment import environment
from tqdit.system.isolation import isolated


@dataclass(frozen=True)
class RandomModel:
    """A model of a published shape such as "DiT-XL/2" with random codes, as `recipe` would quantize it."""

    name: str
    recipe: Recipe

    @property
    def title(self) -> str:
        """Return the name by which tables and messages call the model."""
        return f"{self.name} {self.recipe.label} {self.recipe.bits}"

    @property
    def config(self) -> dict[str, Any]:
        """Return the config of the shape. Raises `InputError` naming what is wrong with `name`."""
        return shape_config(self.name)


@dataclass(frozen=True)
class TimedModel:
    """The figures of one contender.

    Times: percentiles in ms of one denoiser call with `batch` samples. Bytes are above the imports. `workload`: image
    side and batch, "256-b64". `speedup_over`: median ms of the best baseline of each family over ours;
    `speedup_over_each`: of each baseline. `floor_ms`: the least that the model's integer products and the reading of
    its other weights take at the machine's measured peaks; `floor_fraction` of p50. `operations` counts each integer
    product once, `operations_executed` both of a two-region operand. `dtype`: of our residual stream.
    """

    model: str
    backend: str
    workload: str
    batch: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_bytes: int | None
    integer: bool
    speedup_over: Mapping[str, float]
    speedup_over_each: Mapping[str, float]
    bits: str | None
    preset: str | None
    dtype: str | None
    resident_bytes: int | None
    load_seconds: float | None
    images_per_second: float | None
    operations: int | None
    operations_executed: int | None
    floor_ms: float | None
    floor_fraction: float | None
    kernels: Mapping[str, int]  # kernel -> sites


@dataclass(frozen=True)
class Benchmark:
    """The figures of all contenders, and the reason of every one that could not run.

    `failed`: quantized models among those. `sites`: (model, site -> kernel) of every quantized row, in order.
    """

    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    skipped: Mapping[str, str]
    rows: tuple[TimedModel, ...]
    sites: tuple[tuple[str, Mapping[str, str]], ...]
    failed: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """Return the JSON values of `tqdit bench --json`."""
        return {
            "environment": dict(self.environment),
            "settings": dict(self.settings),
            "skipped": dict(self.skipped),
            "rows": [asdict(row) for row in self.rows],
        }


@isolated()
def bench(
    models: Sequence[str | Path],
    random: Sequence[RandomModel] = (),
    settings: BenchSettings = BenchSettings(),
    report: Report = silent,
) -> Benchmark:
    """Time artifacts and random models against the baselines of their shapes.

    Baselines have random weights in the artifact's shape: their speed does not depend on values, and no checkpoint is
    needed. A quantized model that fails is left out and named, but its error is raised if no other is left. Raises
    `InputError` before any model is built: for a simulated backend, a model that is not quantized, an artifact of a
    traced model, a shape, device or step count that does not exist, and for nothing to time.
    """
    with quiet():
        import diffusers.models  # noqa: F401
    device = checked_device(settings.device)
    target = Target(settings.backend, device, settings.dtype or default_dtype(device))
    settings = replace(settings, device=str(device))
    if not target.kernels.INTEGER:
        raise InputError(f"backend '{settings.backend}' computes in float; simulated arithmetic is never timed")
    if not models and not random:
        raise InputError("nothing to time: give an artifact, or a random model of a shape such as DiT-XL/2")
    subjects = [_subject(model) for model in models]
    subjects += [Subject(model.name, model.title, Path(), model.config, None) for model in random]
    if settings.sampling:
        for subject in subjects:
            schedule(subject.scheduler, settings.sampling, registry.sample(subject.config))
    with tempfile.TemporaryDirectory(prefix="tqdit-bench-") as scratch:
        for number, model in enumerate(random):
            report("random codes", number / len(random))
            folder = Path(scratch, str(number))
            folder.mkdir()
            artifact.write(random_solution(model.config, model.recipe), folder)
            subjects[len(models) + number] = replace(subjects[len(models) + number], folder=folder)
        peaks = measure_peaks(device)
        contests = _contests(subjects, settings, target, report)
    failed = {title: error for one in contests for title, error in one.failed.items()}
    if failed and not any(one.races for one in contests):
        raise next(iter(failed.values()))
    if not settings.quick:
        peaks = peaks.best(measure_peaks(device))  # measured again: the machine may have been busy before
    return _benchmark(contests, peaks, settings)


def _subject(model: str | Path) -> Subject:
    source = resolve(model)
    if not source.quantized:
        raise InputError(f"nothing to time: '{model}' is a float model; quantize it first")
    check_sampled(source, "bench")
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    return Subject(source.name, source.name, source.folder, config, source.scheduler)


def _contests(subjects: Sequence[Subject], settings: BenchSettings, target: Target, report: Report) -> list[Contest]:
    """Hold one contest per shape: a baseline is compared with models of its own shape alone."""
    shapes: dict[tuple[int, ...], list[Subject]] = {}
    for subject in subjects:
        shapes.setdefault(shape_key(subject.config), []).append(subject)
    return [contest(members, settings, target, report) for members in shapes.values()]


def _benchmark(contests: Sequence[Contest], peaks: Peaks, settings: BenchSettings) -> Benchmark:
    races = [race for one in contests for race in one.races]
    how = asdict(settings) | {"images": [images(batch) for batch in settings.batches]}
    measured = {"torchao": _version("torchao"), "int8_peak_gops": peaks.int8_gops}
    return Benchmark(
        settings=how,
        environment=environment(settings.device) | measured | {"read_gb_per_s": peaks.read_gb_per_s},
        skipped={title: reason for one in contests for title, reason in one.skipped.items()},
        rows=tuple(_row(result, race, peaks) for race in races for result in race),
        sites=tuple((r.model, r.facts.report) for race in races for r in race if r.facts),
        failed=tuple(title for one in contests for title in one.failed),
    )


def _row(result: Result, race: Sequence[Result], peaks: Peaks) -> TimedModel:
    facts, memory, p50 = result.facts, result.footprint, result.times.p50
    operations = facts.operations[result.batch] if facts else None
    floor = operations.floor_ms(peaks.int8_gops, peaks.read_gb_per_s) if operations else None
    rivals = [rival for rival in race if facts and rival.family]
    raced = {rival.family for rival in rivals}
    return TimedModel(
        model=result.model,
        backend=result.backend,
        workload=result.workload,
        batch=result.batch,
        p20_ms=result.times.p20,
        p50_ms=p50,
        p80_ms=result.times.p80,
        peak_bytes=memory.peak_bytes if memory else None,
        integer=facts is not None,
        speedup_over={name: best_of(rivals, name) / p50 for name in FAMILIES if name in raced},
        speedup_over_each={rival.backend: rival.times.p50 / p50 for rival in rivals},
        bits=facts.bits if facts else None,
        preset=facts.preset if facts else None,
        dtype=facts.dtype if facts else None,
        resident_bytes=memory.resident_bytes if memory else None,
        load_seconds=memory.load_seconds if memory else None,
        images_per_second=result.images_per_second,
        operations=operations.integer if operations else None,
        operations_executed=operations.executed if operations else None,
        floor_ms=floor,
        floor_fraction=floor / p50 if floor is not None else None,
        kernels=kernel_counts(facts.report) if facts else {},
    )


def kernel_counts(report: Mapping[str, str]) -> dict[str, int]:
    """Return the number of sites by kernel, most first.

    `report` is a model's `quantization_report` (site -> kernel).
    """
    counts: dict[str, int] = {}
    for kernel in report.values():
        counts[kernel] = counts.get(kernel, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
