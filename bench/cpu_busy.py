"""Time the CPU kernels while other processes take cores: with threads of their own, with those of OpenMP, and rivals.

python bench/cpu_busy.py --json bench/results/cpu-busy.json
python bench/cpu_busy.py --json bench/results/cpu-busy-openvino.json --against openvino-int8
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python bench/cpu_busy.py --json bench/results/cpu-busy-openvino-vnni.json \
    --against openvino-int8 --instructions avx512-vnni

One random model of a few blocks of DiT-XL/2. In each round every way is called once. The other processes count without
an end; there are none, one, and one for each core, and the file is written after each of these. `--instructions` keeps
our kernels from newer instructions of the processor, and ONEDNN_MAX_CPU_ISA those of oneDNN, which OpenVINO and torch
use. Compare ratios, not milliseconds: the machine may be shared.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu_amx import CPU, OPENMP, build_together, library, under
from tqdit.architectures.shapes import shape_config
from tqdit.backends.instructions import available
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.speed.baselines import DenoiserCall, build, missing
from tqdit.speed.random_solution import random_solution
from tqdit.speed.timing import Percentiles, interleaved
from tqdit.system.environment import cores, environment
from tqdit.system.files import write_text

SHAPE, BATCH = "DiT-XL/2", 2


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--instructions", choices=available(), default=available()[0], help="of our kernels")
    parser.add_argument("--against", nargs="*", default=[], metavar="NAME", help="baselines of `tqdit bench` besides")
    arguments = parser.parse_args()
    ways = {"own threads": {"TQDIT_INSTRUCTIONS": arguments.instructions}}
    ways["OpenMP"] = ways["own threads"] | OPENMP
    build_together(list(ways.values()))
    libraries = {name: library(variables) for name, variables in ways.items()}
    config = {**shape_config(SHAPE), "num_layers": arguments.blocks}
    call = DenoiserCall(convert(random_solution(config, Recipe("plus", "w8a8")), "cpu"), config, BATCH, CPU)
    calls = {name: under(found, call) for name, found in libraries.items()}
    for name in arguments.against:
        if (why := missing(name, CPU)) is not None:
            parser.error(why)
        calls[name] = DenoiserCall(build([name], config, CPU)[name], config, BATCH, CPU)
    for run in calls.values():
        run(0)
    rows: list[dict[str, Any]] = []
    result = {
        "command": shlex.join(["python", "bench/cpu_busy.py", *sys.argv[1:]]), "environment": environment(),
        "load_average": os.getloadavg()[0], "model": f"{arguments.blocks} blocks of {SHAPE}, batch {BATCH}, W8A8",
        "instructions": arguments.instructions, "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "rows": rows,
    }  # fmt: skip
    for others in sorted({0, 1, cores()}):
        for name, times in busy(others, lambda: interleaved(calls, arguments.rounds)).items():
            found = Percentiles.from_sample(times)
            rows.append(
                {"others": others, "threads": name, "p20_ms": found.p20, "p50_ms": found.p50, "p80_ms": found.p80}
            )
            print(rows[-1], flush=True)
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")


def busy(others: int, measure: Any) -> Any:
    """Return what `measure` does while other processes count."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        return measure()
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
