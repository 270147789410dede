"""Choose the blocks and the schedule of each kernel.

For GPUs that we measured the choice is committed; for others a few candidates are timed and the best one is kept.

A configuration changes speed alone, but for the last bits of LayerNorm and of layers on float inputs. Where none is
committed, and none known for a similar batch, the first call of a kernel and shape compiles the candidates that promise
most and times them (seconds), and keeps the best in the user's cache folder (TQDIT_CACHE). `prepare` does that for all
kernels of a model at once.
"""

import contextlib
import functools
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from tqdit.backends.triton import configurations, timing
from tqdit.backends.triton.layouts import NATIVE, Config
from tqdit.backends.triton.timing import Run

LOG = logging.getLogger(__name__)
INTERPRETED = {
    "linear": Config(32, 32, 128), "attention": Config(32, 0, 64), "float": Config(16, 32, 64),
    "norm": Config(2, 0, 0, blocks=2), "quantize": Config(32, 64, 0),
}  # fmt: skip
# Candidates that are timed at once, by the first word of a key. Of the other kernels, which take less time and whose
# first candidate is nearly the best, that one is taken.
TIMED = {"linear": 2, "attention": 2}

SIZES = re.compile(r"(.*) (\d+)x(\d+)x(\d+)(, \d bits.*)")  # a key of a linear kernel
BATCH = re.compile(r"(.*?) (\d+)(x\d.*)")  # a key: its first size, rows or sequences, grows with the batch
FAR = 6.0  # doublings of sizes, all together, over which a configuration is not carried by `choose_near`
NEAR = 2.0  # doublings of the batch over which a configuration is not carried by `choose`


class Job(NamedTuple):
    """A kernel of a call: the key of its configuration, the candidates to compile, and how it is launched.

    `known`: the only candidate is the configuration itself.
    """

    gpu: str
    key: str
    candidates: Sequence[Config]
    run: Run
    known: bool

    @property
    def at_once(self) -> int:
        """The number of candidates that are timed at once."""
        return TIMED.get(self.key.partition(" ")[0], 1)


class Deferred(Exception):  # noqa: N818
    """The launch of a kernel was noted instead of made: see `collecting`."""


class _Notes(threading.local):
    jobs: dict[tuple[str, ...], Job] | None = None


_NOTES = _Notes()


def choose(keys: Sequence[str], device: torch.device, candidates: Callable[[], list[Config]], run: Run) -> Config:
    """Return the configuration of a kernel and shape, timed if nobody has before.

    `keys`: of the kernel, and then of the nearest forms of it, whose configurations do as well. Other batch sizes take
    the configuration of the nearest one, if it is among their candidates. `candidates`: those that promise most first.
    `run` launches the kernel with one. While a CUDA graph is captured nothing can be timed: the first candidate is used
    and not remembered.
    """
    if not NATIVE:
        return INTERPRETED[keys[0].partition(" ")[0].strip(",")]
    gpu = torch.cuda.get_device_name(device)
    found = _known(gpu, keys, candidates)
    if _NOTES.jobs is not None:
        possible = candidates() if found is None else [found]
        _NOTES.jobs.setdefault((gpu, *keys), Job(gpu, keys[0], possible, run, found is not None))
        raise Deferred
    return _found_now(gpu, keys[0], candidates, run) if found is None else found


def known(keys: Sequence[str], device: torch.device, candidates: Callable[[], list[Config]]) -> Config | None:
    """Return the configuration that `choose` has without timing any, or None."""
    return _known(torch.cuda.get_device_name(device), keys, candidates) if NATIVE else None


def noted(key: str, device: torch.device, config: Config, run: Run) -> bool:
    """Note a kernel that has no other configuration, and say whether it was: else `run` is to be called now."""
    if _NOTES.jobs is None:
        return False
    gpu = torch.cuda.get_device_name(device)
    _NOTES.jobs.setdefault((gpu, key), Job(gpu, key, [config], run, known=True))
    return True


def choose_near(keys: Sequence[str], device: torch.device, candidates: Callable[[], list[Config]], run: Run) -> Config:
    """Return a configuration as `choose` does for the first key, or that of the nearest size which is known.

    `keys`: of the kernel, and then of the nearest forms of it. So few sizes are timed.
    """
    if not NATIVE:
        return INTERPRETED[keys[0].partition(" ")[0].strip(",")]
    gpu = torch.cuda.get_device_name(device)
    for key in keys:
        if (found := _nearest(gpu, key, len(configurations.table(gpu)))) is not None:
            return found
    return _found_now(gpu, keys[0], candidates, run)


def prepare(call: Callable[[], object]) -> None:
    """Compile what a call will launch, all kernels at once, and time the candidates of those that are unknown.

    `call` is made once with its launches left out. Its results are undefined numbers, so it must not look at them.
    Nothing depends on this but the time of the first call: where it fails, for example by too little memory for many
    kernels at once, the call itself does the rest.
    """
    if not NATIVE:
        return
    try:
        with collecting() as jobs:
            call()
        unknown = [job for job in jobs if not job.known]
        for job in unknown:
            _say_once(job.gpu)
        timing.compile_all([(job.run, config) for job in jobs for config in job.candidates[: job.at_once]])
        for job in unknown:
            _settle(job)
    except Exception as error:
        LOG.info("kernels are compiled one after another", exc_info=error)


@contextlib.contextmanager
def collecting() -> Iterator[list[Job]]:
    """Let kernels be noted instead of launched by this thread: `choose` raises `Deferred`; yield the list of jobs.

    The list is filled when the context ends.
    """
    before, _NOTES.jobs = _NOTES.jobs, {}
    jobs: list[Job] = []
    try:
        yield jobs
        jobs.extend(_NOTES.jobs.values())
    finally:
        _NOTES.jobs = before


def _found_now(gpu: str, key: str, candidates: Callable[[], list[Config]], run: Run) -> Config:
    """Return the configuration of a kernel that nobody has timed."""
    possible = candidates()
    if torch.cuda.is_current_stream_capturing():
        return possible[0]
    _say_once(gpu)
    return _settle(Job(gpu, key, possible, run, known=False))


def _settle(job: Job) -> Config:
    """Time the first candidates of a job, or the next ones where none of these runs, and keep the best."""
    table, total = configurations.table(job.gpu), len(job.candidates)
    for start in range(0, total, job.at_once):
        try:
            best = timing.fastest(job.candidates[start : start + job.at_once], job.run)[0][0]
        except timing.NoConfigurationError:
            if start + job.at_once >= total:
                raise
        else:
            break
    table[job.key] = best
    configurations.keep(job.gpu, job.key, best)
    return best


def _known(gpu: str, keys: Sequence[str], candidates: Callable[[], list[Config]]) -> Config | None:
    """Return the configuration of the first key that has one, else that of the nearest batch, or None."""
    table, carried = configurations.table(gpu), _carried(gpu)
    for key in keys:
        if key in table:
            return table[key]
    if keys[0] not in carried:
        near = (_of_other_batch(table, key, candidates) for key in keys)
        if (found := next((config for config in near if config is not None), None)) is None:
            return None
        carried[keys[0]] = found
    return carried[keys[0]]


def _of_other_batch(table: dict[str, Config], key: str, candidates: Callable[[], list[Config]]) -> Config | None:
    """Return the configuration of the nearest batch, `NEAR` doublings away at most, that is a candidate here."""
    asked = BATCH.match(key)
    distances = []
    for name, config in list(table.items()):  # other threads may add to it
        other = BATCH.match(name)
        if asked and other and (other[1], other[3]) == (asked[1], asked[3]):
            distances.append((abs(math.log2(int(other[2]) / int(asked[2]))), config))
    near = [config for distance, config in sorted(distances, key=lambda entry: entry[0]) if distance <= NEAR]
    possible = candidates() if near else []
    return next((config for config in near if config in possible), None)


@functools.cache
def _carried(gpu: str) -> dict[str, Config]:
    """Return the configurations that this process has carried from other batch sizes; they are kept in no file."""
    return {}


@functools.cache
def _nearest(gpu: str, key: str, known: int) -> Config | None:
    """Return the configuration of the nearest size of the same kernel, FAR away at most, or None.

    `known`: the number of configurations of the GPU, since the answer may change with it.
    """
    table, asked = configurations.table(gpu), SIZES.match(key)
    assert asked
    before, *sizes, after = asked.groups()
    best: tuple[float, Config | None] = (FAR, None)
    for name, config in list(table.items()):
        other = SIZES.match(name)
        if other and (other[1], other[5]) == (before, after):
            distance = sum(abs(math.log2(int(a) / int(b))) for a, b in zip(sizes, other.groups()[1:4], strict=True))
            best = min(best, (distance, config), key=lambda item: item[0])
    return best[1]


@functools.cache
def _say_once(gpu: str) -> None:
    LOG.warning(
        "compiling and timing kernels on %s, up to a minute for a model; kept in %s where it can be written",
        gpu,
        configurations.cache_file(gpu),
    )
