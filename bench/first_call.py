"""Seconds of the first call of a model on a GPU, with configurations that are committed, carried, or timed.

python bench/first_call.py bench/results/first-call-h200.json --random DiT-B/2 --batch 16

Every case is a process of its own with a cache folder of its own for Triton's kernels and for configurations:
`committed`: both empty; `again`: the same folder a second time; `another batch`: half the samples, then; `unknown`: as
on a GPU of which nothing is known, empty folders; `unknown, again`. The model has random codes. Seconds are those of
the conversion, of the first call and of the second; Python, torch and the GPU have started. `compiled` and `timed`
count what a case added to its folders: kernels, and configurations. The file is written after each case.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tqdit.architectures.shapes import shape_config
from tqdit.artifact import folder as artifact
from tqdit.backends.triton import configurations
from tqdit.recipe import Recipe
from tqdit.runtime import fitting
from tqdit.runtime.convert import convert
from tqdit.speed.baselines import DenoiserCall
from tqdit.speed.random_solution import random_solution
from tqdit.system.environment import environment
from tqdit.system.files import write_text

# Name -> (cache folder, whether committed configurations count, samples over those that are asked for)
CASES = {
    "committed": ("known", True, 1.0),
    "again": ("known", True, 1.0),
    "another batch": ("known", True, 0.5),
    "unknown": ("unknown", False, 1.0),
    "unknown, again": ("unknown", False, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--random", default="DiT-B/2", help="shape of the model")
    parser.add_argument("--preset", default="plus")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--batch", type=int, default=16, help="samples of a call")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        write_text(arguments.out, json.dumps(measure(arguments, *CASES[arguments.case][1:])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "artifact")
        model.mkdir()
        artifact.write(random_solution(shape_config(arguments.random), Recipe(arguments.preset, arguments.bits)), model)
        for name, (caches, *_) in CASES.items():
            rows.append({"case": name, **run(name, model, Path(scratch, caches), Path(scratch, "row.json"))})
            print(f"{name}: {rows[-1]['first_seconds']:.1f} s, then {rows[-1]['second_seconds']:.3f} s", flush=True)
            result = {
                "command": shlex.join(["python", "bench/first_call.py", *sys.argv[1:]]),
                "environment": environment(arguments.device),
                "model": f"random {arguments.random} {arguments.preset} {arguments.bits}",
                "rows": rows,
            }
            write_text(arguments.out, json.dumps(result, indent=1) + "\n")


def run(name: str, model: Path, caches: Path, row: Path) -> dict[str, Any]:
    """The row of a case, measured in a process of its own."""
    where = {"TRITON_CACHE_DIR": str(caches / "triton"), "TQDIT_CACHE": str(caches / "tqdit")}
    command = [sys.executable, __file__, str(row), *sys.argv[2:], "--case", name, "--model", str(model)]
    before = kept(caches)
    subprocess.run(command, env={**os.environ, **where}, check=True)
    added = {what: count - before[what] for what, count in kept(caches).items()}
    return {**json.loads(row.read_text(encoding="utf-8")), **added}


def kept(caches: Path) -> dict[str, int]:
    """The numbers of kernels and of configurations in the folders of a case."""
    files = caches.glob("tqdit/triton-*.json")
    return {
        "compiled": len(list(caches.glob("triton/**/*.cubin"))),
        "timed": sum(len(json.loads(file.read_text(encoding="utf-8"))["configurations"]) for file in files),
    }


def measure(arguments: argparse.Namespace, committed: bool, share: float) -> dict[str, Any]:
    """Convert the artifact and call it twice. Without `committed` configurations the GPU is an unknown one."""
    if not committed:
        configurations.TUNED = Path("of no GPU")
    device, solution = torch.device(arguments.device), fitting.read(arguments.model)
    batch = max(1, int(arguments.batch * share))
    torch.ones(1, device=device).sum().item()  # the GPU has started
    start = time.perf_counter()
    model = convert(solution, "auto", device, torch.bfloat16 if device.type == "cuda" else None)
    converted = time.perf_counter()
    call = DenoiserCall(model, solution.model_config, batch, device)
    begin = time.perf_counter()
    call(500)
    first = time.perf_counter()
    call(400)
    second = time.perf_counter()
    return {
        "batch": batch,
        "convert_seconds": converted - start,
        "first_seconds": first - begin,
        "second_seconds": second - first,
    }


if __name__ == "__main__":
    main()
