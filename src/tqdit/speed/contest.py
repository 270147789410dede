"""Time quantized models and float baselines of one shape against each other; then measure the memory of each."""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tqdit.runtime.target import Target
from tqdit.speed.baselines import FAMILIES
from tqdit.speed.entrants import BenchSettings, Contender, Entrant, Facts, Maker, Subject, images, sample_once, workload
from tqdit.speed.memory_probe import Footprint, footprint
from tqdit.speed.quiet import quiet
from tqdit.speed.timing import Percentiles, interleaved, spread_timesteps
from tqdit.stages import Report, silent


@dataclass(frozen=True)
class Result:
    """The figures of one contender at one batch size; times in ms of a call.

    A baseline has a `family` and no `facts`.
    """

    model: str
    backend: str
    batch: int
    workload: str
    family: str | None
    facts: Facts | None
    times: Percentiles
    images_per_second: float | None
    request: Mapping[str, Any]  # the request for the model's memory
    footprint: Footprint | None = None


@dataclass(frozen=True)
class Contest:
    """The outcome of every contender.

    `races`: results by batch size; `skipped`, `failed`: as those of `Maker`.
    """

    races: list[list[Result]]
    skipped: dict[str, str]
    failed: dict[str, Exception]


def contest(subjects: Sequence[Subject], settings: BenchSettings, target: Target, report: Report = silent) -> Contest:
    """Time artifacts of one shape and its baselines, once for every batch size.

    Whatever cannot be built, compiled or held here is left out and named. Raises `InputError` for a damaged artifact.
    """
    found = _raced(subjects, settings, target, report)
    if settings.against:
        with quiet():
            torch.compiler.reset()
    gc.collect()  # frees the models, so that memory is measured with the machine to itself
    if target.device.type == "cuda":
        torch.cuda.empty_cache()
    if settings.memory:
        _measure_memory(found, report)
    return found


def best_of(results: Sequence[Result], family: str) -> float:
    """Return the median ms of the fastest contender of a family; NaN if there is none."""
    return min((result.times.p50 for result in results if result.family == family), default=math.nan)


def _raced(subjects: Sequence[Subject], settings: BenchSettings, target: Target, report: Report) -> Contest:
    """Run everything that needs the models, and free them on return.

    Each model is built once, whatever the batch sizes.
    """
    maker = Maker(settings, target, report)
    quantized = maker.quantized(subjects)
    floats: list[Contender] | None = None
    races = []
    for batch in settings.batches:
        entrants = maker.warmed_up(quantized, batch)
        if not entrants:
            continue  # no model is left to compare a baseline with: do not compile one
        if floats is None:
            floats = maker.baselines(subjects[0])
        entrants += maker.warmed_up(floats, batch)
        races.append(_timed(entrants, batch, settings, maker.timesteps, report))
    return Contest(races, maker.skipped, maker.failed)


def _timed(
    entrants: Sequence[Entrant], batch: int, settings: BenchSettings, timesteps: int, report: Report
) -> list[Result]:
    """Time all entrants in the same rounds; then run their samplings, one after another."""
    rounds = spread_timesteps(settings.repeats, timesteps)
    what = workload(entrants[0][0].config, batch)
    calls = {str(number): lambda i, call=call: call(rounds[i]) for number, (_, call) in enumerate(entrants)}
    samples = interleaved(calls, settings.repeats, lambda f: report(f"timing {what}", f))
    models = {key: contender for key, (contender, _) in zip(calls, entrants, strict=True)}
    times = {key: Percentiles.from_sample(values) for key, values in samples.items()}
    rates = _sampling_rates(models, times, batch, settings, report)
    return [
        Result(
            model=c.model,
            backend=c.backend,
            batch=batch,
            workload=what,
            family=c.family,
            facts=c.facts,
            times=times[key],
            images_per_second=rates.get(key),
            request={**c.request, "batch": batch},
        )
        for key, c in models.items()
    ]


def _sampling_rates(
    models: Mapping[str, Contender],
    times: Mapping[str, Percentiles],
    batch: int,
    settings: BenchSettings,
    report: Report,
) -> dict[str, float]:
    """Return images per second of a full sampling run.

    It is run for every quantized model, and for the fastest model of each family.
    """
    if settings.sampling is None:
        return {}
    chosen = [key for key, contender in models.items() if contender.family is None]
    for family in FAMILIES:
        members = [key for key, contender in models.items() if contender.family == family]
        chosen += sorted(members, key=lambda key: times[key].p50)[:1]
    rates = {}
    for key in chosen:
        start = time.perf_counter()
        sample_once(models[key], batch, settings.sampling, report)
        rates[key] = images(batch) / (time.perf_counter() - start)
    return rates


def _measure_memory(found: Contest, report: Report) -> None:
    """Fill in every footprint."""
    total, done = sum(map(len, found.races)), 0
    for race in found.races:
        for number, result in enumerate(race):
            report("memory", done / total)
            done += 1
            try:
                race[number] = replace(result, footprint=footprint(result.request))
            except RuntimeError as error:
                found.skipped[f"memory of {result.model} {result.backend} at {result.workload}"] = str(error)
    report("memory", 1.0)
