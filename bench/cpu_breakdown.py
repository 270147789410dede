"""Where the time of a denoiser call goes on a CPU, and what each half of the CPU backend is worth.

python bench/cpu_breakdown.py --json bench/results/cpu-breakdown.json

Each way of running the same random model is a process of its own: the backend as it is; its integer products through
oneDNN; without a C++ compiler; the reference. Per operation: milliseconds of one call, and for products how many 10^9
integer operations per second they reach, their epilogues included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tqdit.architectures.shapes import shape_config, tokens, width
from tqdit.backends import native, panels
from tqdit.ops.schema import Activation
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sources.resolve import resolve
from tqdit.speed.baselines import DenoiserCall
from tqdit.speed.machine import measure_peaks
from tqdit.speed.random_solution import random_solution
from tqdit.system.environment import environment

WAYS = {
    "as it is": {},
    "products through oneDNN": {},
    "no C++ compiler": {"TQDIT_CXX": ""},
    "reference": {},
}
SHAPES = {"DiT-XL/2": 2, "fashion-dit": 16}  # and the batch
VERBS = ("quantize", "project", "attend", "linear", "float_input_linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs=2, metavar=("SHAPE", "WAY"), help="measure one way in this process")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only, arguments.repeats)))
        return
    rows = []
    for shape in SHAPES:
        for way, variables in WAYS.items():
            command = [
                sys.executable,
                __file__,
                "--json",
                "-",
                "--repeats",
                str(arguments.repeats),
                "--only",
                shape,
                way,
            ]
            done = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{shape}, {way}: {rows[-1]['p50_ms']:.1f} ms", flush=True)
    command = "python bench/cpu_breakdown.py --json bench/results/cpu-breakdown.json"
    result = {"command": command, "environment": environment(), "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(shape: str, way: str, repeats: int) -> dict[str, Any]:
    """One way of running one shape: median of the call and of its operations, in ms."""
    config = resolve(shape).config if shape == "fashion-dit" else shape_config(shape)
    if way == "products through oneDNN":
        panels.supported = lambda depth: False
    model = convert(random_solution(config, Recipe("plus", "w8a8")), "reference" if way == "reference" else "cpu")
    batch, device = SHAPES[shape], torch.device("cpu")
    call = DenoiserCall(model, config, batch, device)
    spent: dict[str, list[float]] = {}
    watch(model.transformer_blocks[0].backend, spent)
    for t in (10, 500):
        call(t)
    spent.clear()
    totals = []
    for i in range(repeats):
        start = time.perf_counter()
        call(100 * i % 1000)
        totals.append((time.perf_counter() - start) * 1e3)
    work = integer_operations(config, batch)
    operations = {
        name: {
            "ms": sum(times) / repeats,
            **({"gops": work[name] * repeats / sum(times) / 1e6} if name in work else {}),
        }
        for name, times in spent.items()
    }
    return {
        "shape": shape, "way": way, "batch": batch, "p50_ms": statistics.median(totals),
        "mean_ms": statistics.mean(totals), "int8_peak_gops": measure_peaks(device).int8_gops,
        "compiled": native.reason() or "yes",
        "operations": operations,
    }  # fmt: skip


def watch(backend: Any, spent: dict[str, list[float]]) -> Callable[[], None]:
    """Time every verb of the backend of a model, until the result is called."""
    for name in VERBS:

        def timed(*args: Any, verb: Callable = getattr(backend, name), name: str = name) -> torch.Tensor:
            start = time.perf_counter()
            out = verb(*args)
            key = _linear_name(args[2], args[3]) if name == "linear" else name
            spent.setdefault(key, []).append((time.perf_counter() - start) * 1e3)
            return out

        setattr(backend, name, timed)

    def restore() -> None:
        for name in VERBS:
            delattr(backend, name)

    return restore


def _linear_name(layer: Any, then: Any) -> str:
    """Tell the three linear layers of a block apart: two of them have a residual, and one of those is deep."""
    if isinstance(then, Activation):
        return "linear (fc1)"
    columns, depth = layer.unpacked().shape if not hasattr(layer, "shape") else layer.shape
    return "linear (fc2)" if depth > columns else "linear (out)"


def integer_operations(config: Any, batch: int) -> dict[str, float]:
    """Integer operations of one call by operation; a two-region product counts once."""
    n, c, layers = tokens(config), width(config), config["num_layers"]
    linear = 2.0 * layers * batch * n * c * c
    return {
        "project": 3 * linear, "linear (out)": linear, "linear (fc1)": 4 * linear,
        "linear (fc2)": 4 * linear, "attend": 4.0 * layers * batch * n * n * c,
    }  # fmt: skip


if __name__ == "__main__":
    main()
