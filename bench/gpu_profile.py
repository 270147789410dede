"""Shows where a denoiser call of an integer DiT spends its time on this GPU; writes one JSON file.

python bench/gpu_profile.py bench/results/profile-h200.json
python bench/gpu_profile.py profile.json --only 256-b64 --presets plus

A call is a replay of one CUDA graph. `ms` is the median wall time of a call. `kernels` has every kernel of one call:
how often it runs and the sum of its times by torch's profiler. `gaps_us` is the time of a call in which no kernel
runs. `clock_mhz` is the clock of the multiprocessors while calls follow each other, and `watts` the power then: a
kernel that is timed alone may run at higher clocks.

Kernels that start before their predecessors have ended wait at first, and the wait is part of their times. For times
without it set TQDIT_DEPENDENT_LAUNCH=0.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tqdit.architectures.shapes import shape_config
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.speed.baselines import DenoiserCall
from tqdit.speed.random_solution import random_solution
from tqdit.system.environment import environment
from tqdit.system.files import write_text

WORKLOADS = {"256-b64": ("DiT-XL/2", 64), "256-b2": ("DiT-XL/2", 2), "512-b16": ("DiT-XL/2@512", 16)}
CALLS = 5  # that are profiled
SECONDS = 2.0  # of calls, during which clocks are read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--presets", nargs="+", default=["plus", "paper"])
    parser.add_argument("--bits", default="w8a8")
    arguments = parser.parse_args()
    rows = []
    for workload in arguments.only:
        for preset in arguments.presets:
            rows.append({"workload": workload, "preset": preset, **measured(workload, preset, arguments.bits)})
            show(rows[-1])
            result = {
                "command": shlex.join(["python", "bench/gpu_profile.py", *sys.argv[1:]]),
                "environment": environment("cuda"),
                "bits": arguments.bits,
                "dependent_launch": os.environ.get("TQDIT_DEPENDENT_LAUNCH") != "0",
                "rows": rows,
            }
            write_text(arguments.out, json.dumps(result, indent=1) + "\n")


def measured(workload: str, preset: str, bits: str) -> dict[str, Any]:
    """Return the times of one model with random weights."""
    shape, batch = WORKLOADS[workload]
    device = torch.device("cuda")
    solution = random_solution(shape_config(shape), Recipe(preset, bits))
    call = DenoiserCall(convert(solution, "auto", device, torch.bfloat16), solution.model_config, batch, device)
    for t in (500, 400, 300):
        call(t)
    with Monitor() as monitor:
        times, start = [], time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            begin = time.perf_counter()
            call(200)
            times.append((time.perf_counter() - begin) * 1e3)
    return {"ms": median(times), "calls": len(times), **monitor.medians(), **profiled(call)}


def profiled(call: DenoiserCall) -> dict[str, Any]:
    """Return the kernels of a call, the longest first, and the time in which none runs, in microseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(CALLS):
            call(200)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
    sums: dict[str, list[float]] = defaultdict(list)
    for start, end, name in spans:
        sums[short(name)].append(end - start)
    kernels = [
        {"name": name, "calls": len(found) / CALLS, "us": sum(found) / CALLS, "median_us": median(found)}
        for name, found in sums.items()
    ]
    gaps = [max(0.0, start - end) for (_, end, _), (start, _, _) in itertools.pairwise(spans)]
    inside = sorted(gaps)[: len(gaps) - (CALLS - 1)]  # without those between calls
    return {
        "gaps_us": sum(inside) / CALLS,
        "kernels_us": sum(row["us"] for row in kernels),
        "launches": len(spans) / CALLS,
        "kernels": sorted(kernels, key=lambda row: -row["us"]),
    }


def short(name: str) -> str:
    """Return the name of a kernel without its template arguments."""
    return re.sub(r"<.*", "", name.removeprefix("void "))[:80]


class Monitor:
    """Reads clocks (MHz) and power (W) by nvidia-smi while it is open."""

    def __enter__(self) -> "Monitor":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100"]
        self.lines: list[str] = []
        self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.thread.join(5)

    def medians(self) -> dict[str, float | None]:
        """Return the median clock and power of the second half of the readings: the GPU is busy by then."""
        found = [line.split(",") for line in self.lines if line.count(",") == 1]
        late = [[float(value) for value in pair] for pair in found[len(found) // 2 :]]
        if not late:
            return {"clock_mhz": None, "watts": None}
        return {"clock_mhz": median(pair[0] for pair in late), "watts": median(pair[1] for pair in late)}


def show(row: dict[str, Any]) -> None:
    """Print a row with its longest kernels."""
    print(
        f"{row['workload']} {row['preset']}: {row['ms']:.2f} ms, kernels {row['kernels_us'] / 1e3:.2f}, gaps"
        f" {row['gaps_us'] / 1e3:.2f}, {row['launches']:.0f} launches, {row['clock_mhz']} MHz, {row['watts']} W",
        flush=True,
    )
    for kernel in row["kernels"][:16]:
        print(f"  {kernel['us']:9.1f} us {kernel['calls']:6.1f} x {kernel['median_us']:8.2f}  {kernel['name']}")


if __name__ == "__main__":
    main()
