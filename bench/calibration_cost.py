"""Time, peak memory and size of `tqdit quantize` with published settings, each run in a fresh process.

python bench/calibration_cost.py --json bench/results/calibration-cpu.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS = (("paper", "w8a8"), ("paper", "w6a6"), ("plus", "w8a8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for preset, bits in RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            figures = Path(scratch) / "figures.json"
            command = [sys.executable, "-m", "tqdit", "quantize", args.model, "-o", f"{scratch}/artifact"]
            options = ["--preset", preset, "--bits", bits, "--json", str(figures), "--quiet"]
            subprocess.run([*command, *options], check=True)
            runs.append(json.loads(figures.read_text(encoding="utf-8")))
        args.json.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
