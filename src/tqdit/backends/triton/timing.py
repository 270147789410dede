"""Compile configurations of kernels in threads, and time them."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from triton.errors import TritonError

from tqdit.backends.triton import sources
from tqdit.backends.triton.layouts import Config
from tqdit.system.capture import recording
from tqdit.system.environment import cores

ROUNDS, ROUND_MS = 5, 4
THREADS = 16  # threads that compile; each holds one output of the kernel

Run = Callable[[Config], object]


class NoConfigurationError(RuntimeError):
    """No configuration of a kernel runs on this GPU."""


def fastest(candidates: Sequence[Config], run: Run) -> list[tuple[Config, float]]:
    """Return the candidates that work and their milliseconds, best first.

    Raises `NoConfigurationError` with the last reason if none works.
    """
    compile_all([(run, config) for config in candidates])
    return timed(candidates, run)


def timed(candidates: Sequence[Config], run: Run) -> list[tuple[Config, float]]:
    """Return the same as `fastest`, of candidates that have been compiled."""
    times: dict[Config, float] = {}
    reason: Exception | None = None
    for config in candidates:
        try:
            times[config] = milliseconds(functools.partial(run, config))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # these errors are not the configuration's fault
        except (TritonError, RuntimeError) as error:
            # Perhaps too much shared memory for this GPU. The error's frames hold tensors, and the error, in a cycle.
            reason = error.with_traceback(None)
    if not times:
        raise NoConfigurationError(f"no configuration of the kernel runs here: {reason}") from reason
    return sorted(times.items(), key=lambda item: item[1])


def compile_all(launches: Sequence[tuple[Run, Config]]) -> None:
    """Make each launch once, in threads: a kernel compiles for a second, three quarters of it outside Python.

    What fails here fails again, and is judged, where it is timed or used.
    """
    sources.hash_all()
    stream = torch.cuda.current_stream()  # a thread has its own, and its own device

    def launch(made: tuple[Run, Config]) -> None:
        run, config = made
        with contextlib.suppress(Exception), torch.cuda.stream(stream), torch.no_grad():  # as inside an operator
            run(config)

    with ThreadPoolExecutor(min(THREADS, cores())) as pool:
        pool.map(launch, launches)


def milliseconds(call: Callable[[], object]) -> float:
    """Return the time of one call: the median of a few rounds of a CUDA graph of many calls.

    Launching from Python would hide a small kernel.
    """
    call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    count = min(max(1, int(ROUND_MS / max(start.elapsed_time(end), 1e-3))), 200)
    with recording() as graph:
        for _ in range(count):
            call()
    graph.replay()
    found = []
    for _ in range(ROUNDS):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / count)
    return median(found)
