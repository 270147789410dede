"""Time two versions of tqdit side by side: one process of each in turn, so that both see the same machine.

    python bench/before_after.py --revision a300e34 --random DiT-XL/2 --json bench/results/before-after.json

Each round runs `tqdit bench` once with the source tree of the revision and once with this one, the first of a round
being another one each time. The result has every time, and the median of the ratios new / old of the rounds.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from pages import ROOT
from tqdit.system.environment import environment
from tqdit.system.files import write_text

VERSIONS = ("before", "after")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="the git revision to compare with")
    parser.add_argument("--before", type=Path, help="its src folder, where there is no git")
    parser.add_argument("--random", default="DiT-XL/2", help="the shape of the model, whose codes are random")
    parser.add_argument("--batch", default="64,2")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    if (arguments.revision is None) == (arguments.before is None):
        parser.error("give one of --revision and --before")
    with tempfile.TemporaryDirectory() as work:
        before = arguments.before or _source(arguments.revision, Path(work))
        sources = {"before": before.resolve(), "after": ROOT / "src"}
        rounds = [_round(number, sources, arguments, Path(work)) for number in range(arguments.rounds)]
    result = {
        "before": arguments.revision or "a source folder",
        "shape": arguments.random,
        "bits": arguments.bits,
        "rounds": rounds,
        "ratio": _ratios(rounds),
        "environment": environment(_device(arguments.device)),
    }
    write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    for workload, ratio in result["ratio"].items():
        print(f"{arguments.random} {workload}: new / old {ratio:.3f}")


def _device(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _source(revision: str, work: Path) -> Path:
    """Unpack the src folder of a git revision."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", revision, "src"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(work, filter="data")
    return work / "src"


def _round(
    number: int, sources: dict[str, Path], arguments: argparse.Namespace, work: Path
) -> dict[str, dict[str, float]]:
    """Median ms of a call by version and workload."""
    order = VERSIONS if number % 2 == 0 else VERSIONS[::-1]
    return {version: _times(sources[version], arguments, work / f"{version}.json") for version in order}


def _times(source: Path, arguments: argparse.Namespace, out: Path) -> dict[str, float]:
    options = ["--random", arguments.random, "--bits", arguments.bits, "--preset", "plus", "--batch", arguments.batch]
    options += ["--device", arguments.device, "--against", "", "--no-sampling", "--no-memory", "--json", str(out)]
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "tqdit", "bench", *options], check=True, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return {row["workload"]: row["p50_ms"] for row in rows}


def _ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """The median of new / old over the rounds, by workload."""
    workloads = rounds[0]["after"]
    return {
        name: statistics.median(found["after"][name] / found["before"][name] for found in rounds) for name in workloads
    }


if __name__ == "__main__":
    main()
