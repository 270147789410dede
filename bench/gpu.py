"""Every GPU figure: random DiT-XL/2 models against bfloat16 and torchao, on one CUDA device.

python bench/gpu.py bench/results/gpu-dit-xl-2.json

Each workload is a process of its own, `tqdit bench`, and the file is written anew after each: a run that is cut keeps
what it has. A workload that is in the file already is replaced, once its new rows are there; a file of another machine
or other versions is set aside. `--workload NAME` runs one; `--quick` takes few calls, no sampling runs and no memory.
Options that are not known here go to `tqdit bench`, behind the file's name: `--no-memory`, `--against bf16-autotuned`.
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

ROOT = Path(__file__).resolve().parent.parent
# Name -> shape, batch, the quantized models, and what they run against. Rows of a workload are of one run; torchao has
# one of its own, since its models take minutes to compile.
BFLOAT16 = "bfloat16,bf16-compiled"  # eager, compiled with every kernel tuned, and compiled block by block without
VARIANTS = "plus:w8a8,paper:w8a8,plus:w6a6"
WORKLOADS = {
    "256-b64": ("DiT-XL/2", 64, f"{VARIANTS},plus:w4a8", BFLOAT16),
    "256-b64 torchao": ("DiT-XL/2", 64, "plus:w8a8", "bf16-autotuned,bf16-blocks,torchao"),
    "256-b2": ("DiT-XL/2", 2, VARIANTS, BFLOAT16),
    "512-b16": ("DiT-XL/2@512", 16, VARIANTS, BFLOAT16),
}
DEFAULTS = ["--device", "cuda", "--repeats", "30", "--quiet", "--verbose"]
QUICK = ["--repeats", "5", "--no-sampling", "--no-memory"]
SAME = ("device", "torch", "torchao", "tqdit")  # of the environment: what rows of one file have in common


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--workload", choices=WORKLOADS, help="run this one alone")
    parser.add_argument("--quick", action="store_true", help="few calls, no sampling runs, no memory")
    arguments, more = parser.parse_known_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [arguments.workload] if arguments.workload else WORKLOADS:
        start = time.perf_counter()
        code, run = measure(name, [*(QUICK if arguments.quick else []), *more])
        print(f"{name}: exit code {code} after {time.perf_counter() - start:.0f} s", flush=True)
        if run is not None:
            add(arguments.out, name, run)
        if code:
            failed.append(name)
    if failed:
        sys.exit(f"failed, in part or whole: {', '.join(failed)}")


def measure(name: str, more: list[str]) -> tuple[int, dict[str, Any] | None]:
    """The exit code of `tqdit bench` for a workload, and what it wrote, if it came so far. A later option wins."""
    shape, batch, variants, against = WORKLOADS[name]
    command = ["bench", "--random", shape, "--variants", variants, "--batch", str(batch), "--against", against]
    command += [*DEFAULTS, *more]
    print(shlex.join(["tqdit", *command]), flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        done = subprocess.run(
            [sys.executable, "-m", "tqdit", *command, "--json", str(result)],
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
        if not result.exists():
            return done.returncode or 1, None
        run = json.loads(result.read_text(encoding="utf-8"))
    return done.returncode, {**run, "command": shlex.join(["tqdit", *command])}


def add(out: Path, name: str, run: dict[str, Any]) -> None:
    """Put the rows of one workload into the file, whole or not at all."""
    before: dict[str, Any] = {"commands": {}, "skipped": {}, "rows": []}
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
        if same(found["environment"], run["environment"]):
            before = found
        else:
            out.replace(out.with_suffix(".old.json"))
    rows = [row for row in before["rows"] if row["workload"] != name]
    rows += [{**row, "workload": name} for row in run["rows"]]
    result = {
        # Its peaks are those of the newest run; a floor is by those of its own.
        "environment": before.get("environment", {}) | {k: v for k, v in run["environment"].items() if v is not None},
        "commands": _ordered({**before["commands"], name: run["command"]}),
        "skipped": _ordered({**before["skipped"], name: run["skipped"]}),
        "rows": sorted(rows, key=lambda row: list(WORKLOADS).index(row["workload"])),
    }
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether rows of two runs may be in one file. A run that did not need torchao may have been without."""
    absent = {key for key in ("torchao",) if None in (one.get(key), other.get(key))}
    return all(one.get(key) == other.get(key) for key in SAME if key not in absent)


def _ordered(by_workload: dict[str, Any]) -> dict[str, Any]:
    return {name: by_workload[name] for name in WORKLOADS if name in by_workload}


if __name__ == "__main__":
    main()
