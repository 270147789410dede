"""Read hardware counters of the kernels of DiT-XL/2 on this GPU by Nsight Compute, and write them to one JSON file.

python bench/gpu_counters.py bench/results/counters-h200.json

`ncu` has to be on the PATH, and its counters readable. It runs each kernel again and again, at the clocks that the GPU
chooses, so `clock_ghz` is that of a GPU that does nothing else. Times are for comparison within the file alone.
`issue`: the share of cycles in which a scheduler issues. `busiest`: the pipeline that is used most, and its share.
"""

import argparse
import csv
import functools
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import dit_kernels
import gpu_attention
from tqdit.backends.triton import candidates, launch
from tqdit.backends.triton.layouts import Config
from tqdit.system.environment import environment
from tqdit.system.files import write_text

BATCH, TOKENS = 64, 256
LINEARS = ("qkv, rows", "out, rows", "fc1, channels, rows", "fc2, rows")
ATTENTION = {  # samples, heads, tokens, head_dim; None: in one pass
    "attention, 256 tokens": ((64, 16, 256, 72), Config(64, 0, 128, stages=4, hopper=1)),
    "attention, 1024 tokens": ((16, 16, 1024, 72), Config(256, 0, 64, stages=16, hopper=1)),
    "attention in one pass, 1024 tokens": ((16, 16, 1024, 72), None),
    "attention in one pass, 4096 tokens": ((4, 16, 4096, 72), None),
}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis")
METRICS = {  # of the page of details -> ours
    "Duration": "us", "SM Frequency": "clock_ghz", "Elapsed Cycles": "cycles", "One or More Eligible": "issue",
    "Mem Busy": "memory_busy", "Active Warps Per Scheduler": "warps", "Eligible Warps Per Scheduler": "eligible",
    "Warp Cycles Per Issued Instruction": "cycles_of_an_instruction",
}  # fmt: skip
UNITS = {"us": 1.0, "ms": 1e3, "ns": 1e-3, "usecond": 1.0, "msecond": 1e3, "nsecond": 1e-3}  # of Duration
BUSIEST = re.compile(r"(\w+) is the highest-utilized pipeline \(([\d.]+)%\)")
SECONDS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json", nargs="?")
    parser.add_argument("--ncu", default="ncu", help="the program")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    if arguments.out is None:
        parser.error("name the file to write")
    with tempfile.TemporaryDirectory() as folder:
        page = profiled(arguments.ncu, Path(folder, "report"))
    rows = [{"kernel": name, **row} for name, row in zip(names(), read(page), strict=True)]
    result = {
        "command": shlex.join(["python", "bench/gpu_counters.py", *sys.argv[1:]]),
        "environment": environment("cuda"),
        "rows": rows,
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


def names() -> list[str]:
    """Return the kernels' names, in the order in which `work` launches them."""
    return [*ATTENTION, *LINEARS]


def work() -> None:
    """Launch each kernel, compiled and warm, once while a profiler looks."""
    launches = list(prepared())
    for run in launches:
        run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for run in launches:
        run()
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def prepared() -> Iterator[Callable[[], object]]:
    """Yield a launch of each kernel on random operands."""
    for (batch, heads, tokens, head_dim), config in ATTENTION.values():
        inputs = gpu_attention.drawn(batch, heads, tokens, head_dim)
        chosen = config or candidates.flash_config()
        yield functools.partial(launch.attend, inputs.projected, None, None, heads, inputs.operands, chosen)
    dit_kernels.copies_beyond = lambda *_: 1  # weights once, so that a run is one launch
    jobs = {job.name: job for job in dit_kernels.jobs(dit_kernels.Shape.named("XL"), BATCH, TOKENS)}
    for name in LINEARS:
        yield functools.partial(dit_kernels.maker(jobs[name]).run, jobs[name].candidates[0])


def profiled(ncu: str, report: Path) -> str:
    """Return the page of details, CSV, of what a process of `work` launches."""
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--force-overwrite", "-o", str(report)]
    for section in SECTIONS:
        command += ["--section", section]
    subprocess.run([*command, sys.executable, __file__, "--worker"], check=True, timeout=SECONDS)
    shown = [ncu, "--import", f"{report}.ncu-rep", "--page", "details", "--csv"]
    return subprocess.run(shown, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def read(page: str) -> list[dict[str, Any]]:
    """Return a row for each launch of a page of details."""
    start = page.index('"ID"')
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in csv.DictReader(io.StringIO(page[start:])):
        row = found[int(line["ID"])]
        if (name := METRICS.get(line["Metric Name"])) is not None:
            number = float(line["Metric Value"].replace(",", ""))
            row[name] = number * UNITS[line["Metric Unit"]] if name == "us" else number
        if busiest := BUSIEST.search(line.get("Rule Description") or ""):
            row["busiest"] = [busiest[1], float(busiest[2])]
    return [found[number] for number in sorted(found)]


if __name__ == "__main__":
    main()
