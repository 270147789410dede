"""Build the models of a benchmark, quantized ones and float baselines, and run them for the first time."""

import itertools
import logging
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures.registry import architecture
from tqdit.architectures.shapes import shape_name
from tqdit.errors import InputError
from tqdit.imaging.generate import sample_latents
from tqdit.runtime import fitting
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Target, checked_dtype, dtype_name
from tqdit.sampling.guidance import Sampling
from tqdit.speed.baselines import DenoiserCall, build, contenders, missing, weights_of
from tqdit.speed.conditions import timed_conditions
from tqdit.speed.operations import Operations, count_operations
from tqdit.speed.quiet import quiet
from tqdit.speed.timing import spread_timesteps
from tqdit.stages import Report, silent

WARM_UP = 2  # calls: the first compiles; the second would compile again if a timestep were a constant
FULL_RUN = Sampling("auto", 50, 1.5)
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchSettings:
    """The settings of a benchmark.

    `batches`: of one denoiser call; `against`: baselines or families of them; `sampling` None: no sampling runs;
    `memory`: measure it, in a process per model and batch; `dtype`: what quantized models are loaded as, None for the
    choice of `default_dtype`; `quick`: on a GPU, families of baselines are compiled without tuning every kernel, and
    the machine's peaks are measured once. Raises `InputError` naming the setting that is not legal.
    """

    backend: str = "auto"
    batches: tuple[int, ...] = (16,)
    against: tuple[str, ...] = ("float32", "bfloat16", "torchao")
    repeats: int = 20
    sampling: Sampling | None = FULL_RUN
    device: str = "auto"
    memory: bool = True
    dtype: str | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or self.repeats < 1:
            raise InputError(f"batch and repeats must be at least 1, got {list(self.batches)} and {self.repeats}")
        contenders(self.against)
        if self.dtype is not None:
            checked_dtype(self.dtype)


@dataclass(frozen=True)
class Subject:
    """An artifact to time. `title`: its name in messages."""

    name: str
    title: str
    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None


@dataclass(frozen=True)
class Facts:
    """The facts about a quantized model that need no timing.

    `operations` by batch; `report`: site -> kernel.
    """

    bits: str
    preset: str | None
    dtype: str  # of the residual stream
    operations: Mapping[int, Operations]
    report: Mapping[str, str]


@dataclass(frozen=True)
class Contender:
    """A model that was built: a baseline of a `family`, or a quantized one with `facts`.

    `title`: its name in messages; `request`: the request for its memory, but for the batch.
    """

    title: str
    model: str
    backend: str
    module: nn.Module
    config: Mapping[str, Any]
    request: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None = None
    family: str | None = None
    facts: Facts | None = None


Entrant = tuple[Contender, DenoiserCall]


def workload(config: Mapping[str, Any], batch: int) -> str:
    """Return the size of one call by image side and batch: "256-b64".

    Latents of a VAE count as the images they make.
    """
    return f"{architecture(config).image_side(config)}-b{batch}"


def images(batch: int) -> int:
    """Return the images of one sampling run: guidance makes two denoiser samples of each."""
    return max(1, batch // 2)


def default_dtype(device: torch.device) -> str:
    """Return bfloat16 on a GPU, as the baselines there compute, else float32: a CPU would only convert."""
    return "bfloat16" if device.type == "cuda" else "float32"


class Maker:
    """A maker of contenders, which builds them and runs them for the first time.

    `timesteps`: training timesteps that all of them have. `skipped`: why a contender is missing, by its title;
    `failed`: the errors of quantized models among them.
    """

    def __init__(self, settings: BenchSettings, target: Target, report: Report) -> None:
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, Exception] = {}
        self.settings = settings
        self.target = target
        self.device = target.device
        self.report = report
        self.timesteps = 0  # no model yet

    def quantized(self, subjects: Sequence[Subject]) -> list[Contender]:
        """Return the artifacts that can be converted here."""
        made = []
        for number, subject in enumerate(subjects):
            self.report("converting", number / len(subjects))
            try:
                made.append(self._quantized(subject))
            except InputError:
                raise
            except Exception as error:
                self._give_up(subject.title, error, ours=True)
        self.report("converting", 1.0)
        return made

    def baselines(self, subject: Subject) -> list[Contender]:
        """Return the baselines that can be built here, in the shape of `subject`."""
        made = []
        families = contenders(self.settings.against, self.device.type, tuned=not self.settings.quick)
        shape = shape_name(subject.config)
        possible = []
        for name in families:
            if reason := missing(name, self.device):
                self.skipped[f"{shape} {name}"] = reason
            else:
                possible.append(name)
        for _, group in itertools.groupby(possible, lambda name: weights_of(name, self.device.type)):
            names = list(group)
            try:
                with quiet():
                    built = build(names, subject.config, self.device)
            except Exception as error:  # for example too little memory, or another version of torchao
                for name in names:
                    self._give_up(f"{shape} {name}", error)
                continue
            for name, module in built.items():
                made.append(self._contender(subject, f"{shape} {name}", shape, name, module, family=families[name]))
        return made

    def warmed_up(self, candidates: Sequence[Contender], batch: int) -> list[Entrant]:
        """Return the contenders that run with that batch, after the calls that compile and allocate."""
        ready = []
        for number, contender in enumerate(candidates):
            self.report("warm-up", number / len(candidates))
            title, start = f"{contender.title} at {workload(contender.config, batch)}", time.perf_counter()
            try:
                with quiet() if contender.family else nullcontext():
                    ready.append((contender, self._warm_up(contender, batch)))
            except Exception as error:  # torch.compile fails in many ways: no C++ compiler, no Triton, no memory
                self._give_up(title, error, ours=contender.family is None)
            else:
                LOG.info("%s: %.0f s to warm up", title, time.perf_counter() - start)
        self.report("warm-up", 1.0)
        return ready

    def _quantized(self, subject: Subject) -> Contender:
        solution = fitting.read(subject.folder)
        module = convert(solution, self.target.backend, self.device, self.target.dtype)
        total = math.ceil(solution.time_groups.high)
        self.timesteps = min(self.timesteps or total, total)
        facts = Facts(
            bits=solution.provenance.bits,
            preset=solution.provenance.preset_name,
            dtype=dtype_name(cast(torch.dtype, module.stream_dtype)),
            operations={batch: count_operations(solution, batch) for batch in self.settings.batches},
            report=cast(Mapping[str, str], module.quantization_report),
        )
        backend = str(module.quantization_backend)
        return self._contender(subject, subject.title, subject.name, backend, module, facts=facts)

    def _contender(
        self, subject: Subject, title: str, model: str, backend: str, module: nn.Module, **rest: Any
    ) -> Contender:
        what = {"baseline": backend}
        if "facts" in rest:
            what = {"artifact": str(subject.folder), "backend": backend, "dtype": self.target.dtype_name}
        common = {"config": dict(subject.config), "device": str(self.device), "threads": torch.get_num_threads()}
        return Contender(title, model, backend, module, subject.config, {**common, **what}, subject.scheduler, **rest)

    def _warm_up(self, contender: Contender, batch: int) -> DenoiserCall:
        call = DenoiserCall(contender.module, contender.config, batch, self.device)
        for t in spread_timesteps(WARM_UP, self.timesteps):
            call(t)
        if self.settings.sampling:  # a sampling run has another batch where `batch` is odd
            sample_once(contender, batch, replace(self.settings.sampling, steps=1), silent)
        return call

    def _give_up(self, title: str, error: Exception, ours: bool = False) -> None:
        LOG.log(logging.ERROR if ours else logging.INFO, "%s failed", title, exc_info=error)
        self.skipped[title] = _reason(error)
        if ours:
            traceback.clear_frames(error.__traceback__)  # the error's frames hold the model
            self.failed[title] = error


def sample_once(contender: Contender, batch: int, sampling: Sampling, report: Report) -> None:
    """Run one sampling of `images(batch)` images, as one batch; it is done when the images are on the CPU."""
    count = images(batch)
    stage = f"sampling {contender.backend}"
    sample_latents(
        contender.module, contender.scheduler, [0] * count, sampling, 0, lambda f: report(stage, f), count,
        timed_conditions(contender.config),
    )  # fmt: skip
    report(stage, 1.0)


def _reason(error: Exception) -> str:
    """Return the first line of an error; two where the first only says who raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
