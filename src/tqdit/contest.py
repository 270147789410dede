"""Quantized models and float baselines of one shape, timed against each other; then the memory of each."""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tqdit import artifact
from tqdit.convert import convert
from tqdit.errors import InputError
from tqdit.evaluation.baselines import FAMILIES, DenoiserCall, build, check_families, missing, quiet
from tqdit.evaluation.generate import sample_latents
from tqdit.evaluation.operations import Operations, count_operations
from tqdit.evaluation.timing import Percentiles, interleaved, spread_timesteps
from tqdit.memory_probe import Footprint, footprint
from tqdit.models.sampler import Sampling
from tqdit.models.shapes import shape_name
from tqdit.workflow import Report, silent

WARM_UP = 2  # calls: the first compiles, the second would compile again if a timestep were a constant
FULL_RUN = Sampling("ddim", 50, 1.5)


@dataclass(frozen=True)
class BenchSettings:
    """How to time. `batch`: of one denoiser call; `against`: baseline families; `sampling` None: no sampling runs.

    Raises `InputError` naming the setting that is not legal.
    """

    backend: str = "auto"
    batch: int = 16
    against: tuple[str, ...] = tuple(FAMILIES)
    repeats: int = 20
    sampling: Sampling | None = FULL_RUN
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.repeats < 1:
            raise InputError(f"batch and repeats must be at least 1, got {self.batch} and {self.repeats}")
        check_families(self.against)

    @property
    def images(self) -> int:
        """Images of one sampling run: guidance makes two denoiser samples of each."""
        return max(1, self.batch // 2)


@dataclass(frozen=True)
class Subject:
    """An artifact to time."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None


@dataclass(frozen=True)
class Facts:
    """What is known of a quantized model without timing it. `report`: site -> kernel."""

    bits: str
    preset: str | None
    operations: Operations
    report: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """One contender's figures; times in ms of a denoiser call. A baseline has a `family` and no `facts`."""

    model: str
    backend: str
    family: str | None
    facts: Facts | None
    times: Percentiles
    images_per_second: float | None
    request: Mapping[str, Any]  # for its memory
    footprint: Footprint | None = None


@dataclass(frozen=True)
class _Contender:
    model: str
    backend: str
    module: nn.Module
    call: DenoiserCall
    request: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None = None
    family: str | None = None
    facts: Facts | None = None


def contest(
    subjects: Sequence[Subject], settings: BenchSettings, device: torch.device, report: Report = silent
) -> tuple[list[Result], dict[str, str]]:
    """Time artifacts of one shape and its baselines: results, and why something is missing, by its name.

    A baseline that cannot be built, compiled or held here is skipped; a quantized model that fails is an error.
    """
    results, skipped = _timed(subjects, settings, device, report)
    if settings.against:
        with quiet():
            torch.compiler.reset()
    gc.collect()  # the models are gone: the memory is measured with the machine to itself
    measured = []
    for number, result in enumerate(results):
        report("memory", number / len(results))
        try:
            measured.append(replace(result, footprint=footprint(result.request)))
        except RuntimeError as error:
            skipped[f"memory of {result.model} {result.backend}"] = str(error)
            measured.append(result)
    report("memory", 1.0)
    return measured, skipped


def _timed(
    subjects: Sequence[Subject], settings: BenchSettings, device: torch.device, report: Report
) -> tuple[list[Result], dict[str, str]]:
    """Everything that needs the models; on return they are freed."""
    maker = _Maker(settings, device)
    quantized = [maker.quantized(subject) for subject in subjects]
    for contender in quantized:
        maker.warm_up(contender)
    floats, skipped = _baselines(maker, subjects[0], report)
    contenders = {str(number): contender for number, contender in enumerate([*quantized, *floats])}

    timesteps = spread_timesteps(settings.repeats, maker.timesteps)
    calls = {key: lambda i, call=c.call: call(timesteps[i]) for key, c in contenders.items()}
    shape = shape_name(subjects[0].config)
    samples = interleaved(calls, settings.repeats, lambda f: report(f"timing {shape}", f))
    times = {key: Percentiles.of(values) for key, values in samples.items()}
    rates = _sampling_rates(contenders, times, settings, report)
    results = [
        Result(c.model, c.backend, c.family, c.facts, times[key], rates.get(key), c.request)
        for key, c in contenders.items()
    ]
    return results, skipped


class _Maker:
    """Builds contenders and runs them for the first time. `timesteps`: training timesteps that all of them have."""

    def __init__(self, settings: BenchSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.timesteps = 0  # of no model yet
        self._common = {"batch": settings.batch, "device": str(device), "threads": torch.get_num_threads()}

    def quantized(self, subject: Subject) -> _Contender:
        solution = artifact.read(subject.folder)
        module = convert(solution, self.settings.backend, self.device)
        total = solution.time_groups.num_timesteps
        self.timesteps = min(self.timesteps or total, total)
        recipe = solution.provenance.get("recipe", {})
        facts = Facts(
            bits=f"w{recipe.get('weight_bits')}a{recipe.get('activation_bits')}",
            preset=solution.provenance.get("preset", recipe.get("preset")),
            operations=count_operations(solution, self.settings.batch),
            report=cast(Mapping[str, str], module.quantization_report),
        )
        backend = str(module.quantization_backend)
        request = self._request(subject, artifact=str(subject.folder), backend=backend)
        call = self._call(module, subject)
        return _Contender(subject.name, backend, module, call, request, subject.scheduler, facts=facts)

    def family(self, family: str, subject: Subject) -> list[_Contender]:
        """The baselines of a family in the shape of `subject`."""
        found = []
        for name, module in build(FAMILIES[family], subject.config, self.device).items():
            request = self._request(subject, baseline=name)
            call = self._call(module, subject)
            shape = shape_name(subject.config)
            found.append(_Contender(shape, name, module, call, request, subject.scheduler, family))
        return found

    def warm_up(self, contender: _Contender) -> None:
        """The calls that compile and allocate; a sampling run has another batch where `batch` is odd."""
        for t in spread_timesteps(WARM_UP, self.timesteps):
            contender.call(t)
        if self.settings.sampling:
            _sample(contender, self.settings, replace(self.settings.sampling, steps=1), silent)

    def _request(self, subject: Subject, **what: str) -> dict[str, Any]:
        return {**self._common, "config": dict(subject.config), **what}

    def _call(self, module: nn.Module, subject: Subject) -> DenoiserCall:
        return DenoiserCall(module, subject.config, self.settings.batch, self.device)


def _baselines(maker: _Maker, subject: Subject, report: Report) -> tuple[list[_Contender], dict[str, str]]:
    """The warmed-up baselines, and the reasons of those that cannot run here."""
    found: list[_Contender] = []
    skipped: dict[str, str] = {}
    against = maker.settings.against
    for number, family in enumerate(against):
        report("warm-up", number / len(against))
        if reason := missing(family):
            skipped |= dict.fromkeys(FAMILIES[family], reason)
            continue
        try:
            built = maker.family(family, subject)
        except Exception as error:  # too little memory, or a torchao of another mind
            skipped |= dict.fromkeys(FAMILIES[family], _reason(error))
            continue
        for contender in built:
            try:
                with quiet():
                    maker.warm_up(contender)
            except Exception as error:  # torch.compile fails in many ways: no C++ compiler, no Triton, no memory
                skipped[contender.backend] = _reason(error)
            else:
                found.append(contender)
    report("warm-up", 1.0)
    return found, skipped


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _sampling_rates(
    contenders: Mapping[str, _Contender], times: Mapping[str, Percentiles], settings: BenchSettings, report: Report
) -> dict[str, float]:
    """Images per second of a full sampling run: of every quantized model, and of the fastest of each family."""
    if settings.sampling is None:
        return {}
    chosen = [key for key, contender in contenders.items() if contender.family is None]
    for family in settings.against:
        members = [key for key, contender in contenders.items() if contender.family == family]
        chosen += sorted(members, key=lambda key: times[key].p50)[:1]
    rates = {}
    for key in chosen:
        start = time.perf_counter()
        _sample(contenders[key], settings, settings.sampling, report)
        rates[key] = settings.images / (time.perf_counter() - start)
    return rates


def _sample(contender: _Contender, settings: BenchSettings, sampling: Sampling, report: Report) -> None:
    """One sampling run of `settings.images` images, as one batch; done when the images are on the CPU."""
    classes = [0] * settings.images
    stage = f"sampling {contender.backend}"
    sample_latents(
        contender.module, contender.scheduler, classes, sampling, 0, lambda f: report(stage, f), settings.images
    )
    report(stage, 1.0)


def best_of(results: Sequence[Result], family: str) -> float:
    """The median ms of the fastest contender of a family; NaN if there is none."""
    return min((result.times.p50 for result in results if result.family == family), default=math.nan)
