"""Time the CPU kernels compiled to every set of integer instructions that this processor can run.

python bench/instructions.py --json bench/results/instructions-cpu.json

One random model of a few blocks of DiT-XL/2; its calls under the sets are interleaved, and a ratio is the median of the
rounds' own ratios. A processor with AVX-512 VNNI and without AVX-VNNI runs `avx2-vnni` in the encoding of AVX-512
(evex.sh): the same instructions on the same registers of 256 bits. Compare ratios, not milliseconds: the machine may be
shared.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tqdit.architectures.shapes import shape_config
from tqdit.backends import native
from tqdit.backends.instructions import GENERIC, KNOWN, available, features
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.speed.baselines import DenoiserCall
from tqdit.speed.random_solution import random_solution
from tqdit.speed.timing import interleaved
from tqdit.system.environment import environment
from tqdit.system.files import write_text

EVEX = Path(__file__).with_name("evex.sh")
PRESETS = ("paper", "plus")
BLOCKS, BATCH = 2, 2


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    libraries, rows = built(), []
    for preset in PRESETS:
        times = interleaved(calls_of(preset, libraries), arguments.rounds)
        best = times[next(iter(libraries))]
        for name, spent in times.items():
            ratio = statistics.median(a / b for a, b in zip(spent, best, strict=True))
            rows.append({"preset": preset, "instructions": name, "p50_ms": statistics.median(spent), "ratio": ratio})
            print(f"{preset}, {name}: {rows[-1]['p50_ms']:.1f} ms, {ratio:.2f}")
    command = "python bench/instructions.py --json bench/results/instructions-cpu.json"
    result = {
        "command": f"{command} --rounds {arguments.rounds}",
        "environment": environment(),
        "model": f"{BLOCKS} blocks of DiT-XL/2, batch {BATCH}, W8A8",
        "avx2-vnni": "as it is" if "avx_vnni" in features() else "in the encoding of AVX-512",
        "rows": rows,
    }
    write_text(arguments.json, json.dumps(result, indent=1) + "\n")


def built() -> dict[str, Any]:
    """Return the kernels by the name of their instructions, the best first."""
    names = [name for name in available() if name != GENERIC]
    borrowed = "avx2-vnni" not in names and {"avx512vl", "avx512_vnni"} <= features()
    if borrowed:
        names.insert(1, "avx2-vnni")
    found = {}
    for name in names:
        variables = {"TQDIT_INSTRUCTIONS": name}
        if borrowed and name == "avx2-vnni":
            variables = {"TQDIT_CXX": str(EVEX), "TQDIT_CXXFLAGS": " ".join(KNOWN[name].flags)}
        os.environ.update(variables)
        native._load.cache_clear()
        found[name] = native.library()
        assert native.instructions() == name
        for variable in variables:
            del os.environ[variable]
    return found


def calls_of(preset: str, libraries: dict[str, Any]) -> dict[str, Callable[[int], object]]:
    """Return a call of one model, under every library; all of them read the same packed weights."""
    config = {**shape_config("DiT-XL/2"), "num_layers": BLOCKS}
    native._load = lambda: next(iter(libraries.values()))
    call = DenoiserCall(
        convert(random_solution(config, Recipe(preset, "w8a8")), "cpu"), config, BATCH, torch.device("cpu")
    )

    def under(library: Any) -> Callable[[int], object]:
        def run(step: int) -> object:
            native._load = lambda: library
            return call(100 * step % 1000)

        return run

    calls = {name: under(library) for name, library in libraries.items()}
    for run in calls.values():
        run(0)
    return calls


if __name__ == "__main__":
    main()
