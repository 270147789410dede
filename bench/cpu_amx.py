"""Measure the CPU kernels in the tiles of AMX beside those of AVX-512 VNNI, from one thread to all of them.

python bench/cpu_amx.py --json bench/results/cpu-amx.json

1. Exactness: products are compared with exact ones, and whole calls under both sets with each other, bit for bit.
2. Threads: where the time of a call of DiT-XL/2 goes, for each number of threads, beside the machine's int8 peak with
   as many; and, with all of them, the same with the products of oneDNN, which uses AMX too.
3. A race of whole calls with compiled bf16, in interleaved rounds, with all threads; also of the kernels whose threads
   are those of OpenMP.

What is measured is written after each step. It takes about three minutes on 16 cores.
"""

import argparse
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cpu_breakdown import integer_operations, watch
from tqdit.architectures.shapes import shape_config
from tqdit.backends import native, panels
from tqdit.backends.fused import linear
from tqdit.backends.instructions import available
from tqdit.backends.panels import PanelLinear
from tqdit.ops.schema import OperandParams, WeightParams
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.spec import Grid
from tqdit.speed import machine
from tqdit.speed.baselines import DenoiserCall, build
from tqdit.speed.machine import measure_peaks
from tqdit.speed.random_solution import random_solution
from tqdit.speed.timing import Percentiles, interleaved
from tqdit.system.environment import environment
from tqdit.system.files import write_text

SHAPE, BATCH = "DiT-XL/2", 2
SETS = ("amx-int8", "avx512-vnni")
OPENMP = {"TQDIT_CXXFLAGS": "-fopenmp"}
SIZES = {"cpu": (2048,)}  # of the products whose rate is a peak, for fewer threads than all
CPU = torch.device("cpu")
# Rows, depth and columns of products: those of the shape, and those with a last tile that is not whole.
EXACT = [(512, 1152, 3456), (512, 1152, 4608), (512, 4608, 1152), (77, 1152, 1152), (33, 520, 190), (16, 64, 16),
         (47, 68, 112), (15, 192, 64), (1, 4608, 48)]  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--blocks", type=int, help="of the shape; default: all")
    parser.add_argument(
        "--sets", nargs="+", default=SETS, help="of instructions; those that this processor lacks are left out"
    )
    parser.add_argument("--calls", type=int, default=3, help="of each way and number of threads")
    parser.add_argument("--rounds", type=int, default=15, help="of the race; 0: no race")
    arguments = parser.parse_args()
    command = shlex.join(["python", *sys.argv])
    config = dict(shape_config(arguments.shape))
    config["num_layers"] = arguments.blocks or config["num_layers"]
    result: dict[str, Any] = {
        "command": command, "environment": environment() | processor(), "sets": available(),
        "model": f"{config['num_layers']} blocks of {arguments.shape}, batch {BATCH}, plus at W8A8",
    }  # fmt: skip

    def keep(name: str, values: Any) -> None:
        result[name] = values
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
        print(f"{time.perf_counter() - start:.0f} s: {name} {json.dumps(values)[:1500]}", flush=True)

    start, counts = time.perf_counter(), thread_counts()
    names = [name for name in arguments.sets if name in available()]
    ways = {name: {"TQDIT_INSTRUCTIONS": name} for name in names}
    ways[f"{names[0]}, OpenMP"] = {**ways[names[0]], **OPENMP}
    build_together(list(ways.values()))
    every = {name: library(variables) for name, variables in ways.items()}
    libraries = {name: every[name] for name in names}
    keep("exact", {name: exact_products(found) for name, found in libraries.items()})
    solution = random_solution(config, Recipe("plus", "w8a8"))
    call = DenoiserCall(convert(solution, "cpu"), config, BATCH, CPU)
    outputs = [under(found, call)(0) for found in libraries.values()]
    keep("calls_are_equal", all(torch.equal(outputs[0], other) for other in outputs) if len(outputs) > 1 else None)
    rows = []
    for threads in counts:
        torch.set_num_threads(threads)
        peak = int8_peak(threads)
        for name, found in libraries.items():
            rows.append(
                {"threads": threads, "products": name, **spent(under(found, call), call, config, peak, arguments.calls)}
            )
        keep("threads", rows)
    keep(
        "onednn", onednn(next(iter(libraries.values())), solution, config, rows[-1]["int8_peak_gops"], arguments.calls)
    )
    if arguments.rounds:
        keep("race", race(every, call, config, arguments.rounds))


def build_together(ways: list[dict[str, str]]) -> None:
    """Compile libraries at the same time, each in a process of its own, which keeps it for `library`."""
    command = [sys.executable, "-c", "from tqdit.backends import native; native.library()"]
    processes = [subprocess.Popen(command, env={**os.environ, **variables}) for variables in ways]
    assert all(process.wait() == 0 for process in processes)


def library(variables: dict[str, str]) -> Any:
    """Return the kernels that are compiled under environment variables."""
    os.environ.update(variables)
    native._load.cache_clear()
    found = native.library()
    assert native.instructions() == variables["TQDIT_INSTRUCTIONS"]
    for variable in variables:
        del os.environ[variable]
    return found


def int8_peak(threads: int) -> float:
    """Return the machine's peak with the current number of threads, in 10^9 operations per second."""
    if threads == max(thread_counts()):
        return measure_peaks(CPU).int8_gops
    with patch.object(machine, "SIZES", SIZES):
        return measure_peaks(CPU).int8_gops


def use(found: Any) -> None:
    """Let the backend call these kernels."""
    native._load = lambda: found


def under(found: Any, call: Callable[[int], object]) -> Callable[[int], Any]:
    """Return the call under one library; all of them read the same packed weights."""

    def run(step: int) -> object:
        use(found)
        return call(100 * step % 1000)

    return run


def exact_products(found: Any) -> bool:
    """Say whether every product of `EXACT` is exact: random codes and weights, the largest among them."""
    use(found)
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([[[1.0, 1, 0, 0, 1, 1, 0, 0]]])
    source = OperandParams(Grid.UNIFORM, 8, table)  # a code with zero point 0, so that sums are the result
    for rows, depth, columns in EXACT:
        codes = torch.randint(0, 256, (1, rows, depth), generator=generator, dtype=torch.uint8)
        weight = torch.randint(-128, 128, (columns, depth), generator=generator, dtype=torch.int8)
        codes[:, : rows // 2], weight[::3], weight[1::3] = 255, 127, -128
        layer = PanelLinear(WeightParams(weight, torch.ones(1), 8), None)
        expected = ((codes[0].double() - 128) @ weight.double().t()).float()
        if not torch.equal(linear(codes, source, layer.weight)[0], expected):
            return False
    return True


@functools.cache
def thread_counts() -> list[int]:
    """Return 1, 2, 4 and so on, up to the number of threads of this process at first."""
    most = torch.get_num_threads()
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})


def spent(run: Callable[[int], object], call: DenoiserCall, config: Any, peak: float, calls: int) -> dict[str, Any]:
    """Return where the time of a call goes: ms of the call and of each verb, and 10^9 operations per second.

    `floor_fraction`: of the machine's peak, with the same number of threads.
    """
    times: dict[str, list[float]] = {}
    backend: Any = call.module.transformer_blocks[0].backend  # type: ignore[union-attr,index]
    restore = watch(backend, times)
    run(0)
    times.clear()
    totals = []
    for i in range(calls):
        start = time.perf_counter()
        run(i + 1)
        totals.append((time.perf_counter() - start) * 1e3)
    restore()
    work = integer_operations(config, BATCH)
    verbs = {}
    for name, each in times.items():
        verbs[name] = {"ms": sum(each) / calls}
        if name in work:
            gops = work[name] * calls / sum(each) / 1e6
            verbs[name] |= {"gops": gops, "floor_fraction": gops / peak}
    outside = statistics.mean(totals) - sum(verb["ms"] for verb in verbs.values())
    return {
        "p50_ms": statistics.median(totals), "outside_verbs_ms": outside, "int8_peak_gops": peak,
        "floor_fraction": sum(work.values()) / statistics.median(totals) / 1e6 / peak, "verbs": verbs,
    }  # fmt: skip


def onednn(found: Any, solution: Any, config: Any, peak: float, calls: int) -> dict[str, Any]:
    """Return the same of a model whose products are oneDNN's and whose epilogues are the kernels'."""
    use(found)
    supported = panels.supported
    panels.supported = lambda depth: False
    call = DenoiserCall(convert(solution, "cpu"), config, BATCH, CPU)
    panels.supported = supported
    return {"threads": torch.get_num_threads(), **spent(under(found, call), call, config, peak, calls)}


def race(libraries: Mapping[str, Any], call: DenoiserCall, config: Any, rounds: int) -> list[dict[str, Any]]:
    """Return percentiles of whole calls, and speed-ups over compiled bf16."""
    torch.set_num_threads(max(thread_counts()))
    float_call = DenoiserCall(build(["bf16-compiled"], config, CPU)["bf16-compiled"], config, BATCH, CPU)
    calls = {name: under(found, call) for name, found in libraries.items()}
    calls["bf16-compiled"] = lambda step: float_call(100 * step % 1000)
    for run in calls.values():
        run(0), run(1)
    found = {name: Percentiles.from_sample(times) for name, times in interleaved(calls, rounds).items()}
    slowest = found["bf16-compiled"].p50
    return [
        {"name": name, "threads": torch.get_num_threads(), "p20_ms": t.p20, "p50_ms": t.p50, "p80_ms": t.p80,
         "speedup_over_bf16_compiled": slowest / t.p50}
        for name, t in found.items()
    ]  # fmt: skip


def processor() -> dict[str, Any]:
    """Return what Linux says of the processor's threads and cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    names = {"siblings": "threads_of_socket", "cpu cores": "cores_of_socket"}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {names[key.strip()]: int(value) for key, value in pairs if key.strip() in names}


if __name__ == "__main__":
    main()
