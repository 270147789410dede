"""The whole way of a model trained by flow matching: train a SiT, quantize it, compare its artifacts with it.

python bench/sit.py bench/results/sit-h200.json --data build/fashion-mnist --work build/sit
python bench/sit.py build/sit-quick.json --data build/fashion-mnist --work build/sit-quick --quick

`--data`: the folder of Fashion-MNIST's four .gz files; nothing is downloaded. Each part is a process of its own with a
limit of time, and leaves its record and its output in `--work`. A part that has finished there is not run again, so a
run that was cut goes on with the next one; the file is put together anew after each part. `--part` runs some alone.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdit.system.environment import environment
from tqdit.system.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
FLOAT, TRAINING, COMPARISON = "float", "training.json", "comparison.json"
ARTIFACTS = {"plus": ("plus", "w8a8"), "paper": ("paper", "w8a8")}  # folder -> preset, bits
LIMITS = {"train": 260, "plus": 240, "paper": 240, "compare": 420}  # seconds
SETTINGS = {"train": "--minutes 3", "quantize": "", "compare": "--num 2000 --steps 20 --no-cost"}
QUICK = {
    "train": "--steps 200",
    "quantize": "--samples 4 --steps 20 --rounds 0",
    "compare": "--num 64 --steps 4 --samples 2 --no-cost",
}
ENDING = 4000  # characters of a failed part's output that are kept


@dataclass(frozen=True)
class Part:
    """One process: its command, its limit in seconds, and the folder or file below the work folder that it writes."""

    command: list[str]
    limit: float
    output: str


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = parts(args)
    for name in args.part or wanted:
        run(name, wanted[name], args.work)
        assemble(args, list(wanted))
    if unfinished := [name for name in wanted if not finished(args.work, name, wanted[name])]:
        sys.exit(f"not finished: {', '.join(unfinished)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--work", type=Path, default=Path("build/sit"), help="folder of the models and the records")
    parser.add_argument("--part", nargs="+", choices=LIMITS, help="run these parts alone; default: all")
    parser.add_argument("--quick", action="store_true", help="few steps, samples and images: a rehearsal")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.data, args.work = args.data.resolve(), args.work.resolve()  # the parts run in the repository's folder
    return args


def parts(args: argparse.Namespace) -> dict[str, Part]:
    """Every part by name, in order."""
    settings = {name: shlex.split(text) for name, text in (QUICK if args.quick else SETTINGS).items()}
    device, model = ["--device", args.device], str(args.work / FLOAT)
    script = [sys.executable, str(ROOT / "examples/train_fashion_dit.py"), "--objective", "flow"]
    tqdit = [sys.executable, "-m", "tqdit"]
    train = [*script, "--data", str(args.data), "--out", model, *settings["train"], *device]
    found = {"train": Part(train, LIMITS["train"], FLOAT)}
    for name, (preset, bits) in ARTIFACTS.items():
        to = ["-o", str(args.work / name), "--preset", preset, "--bits", bits, "--sampler", "flow"]
        command = [*tqdit, "quantize", model, *to, *settings["quantize"], *device, "--quiet"]
        found[name] = Part(command, LIMITS[name], name)
    artifacts = [str(args.work / name) for name in ARTIFACTS]
    to = ["--sampler", "flow", "--json", str(args.work / COMPARISON)]
    command = [*tqdit, "compare", model, *artifacts, *to, *settings["compare"], *device, "--quiet"]
    return found | {"compare": Part(command, LIMITS["compare"], COMPARISON)}


def record(work: Path, name: str) -> Path:
    return work / f"{name}.part.json"


def finished(work: Path, name: str, part: Part) -> bool:
    """Say whether the same command has run to its end and its output is there."""
    path = record(work, name)
    found = read_json(path) if path.is_file() else {}
    return found.get("command") == shown(part) and found.get("exit_code") == 0 and (work / part.output).exists()


def shown(part: Part) -> str:
    """The command as a line that can be pasted, without the place of Python."""
    return shlex.join(["python", *part.command[1:]]).replace(f"{ROOT}/", "")


def run(name: str, part: Part, work: Path) -> None:
    """Run a part unless it has finished, and keep its seconds, its exit code and how it ended."""
    if finished(work, name, part):
        return
    remove(work / part.output)
    start, log = time.perf_counter(), work / f"{name}.log"
    kept: dict[str, Any] = {"command": shown(part), "limit_seconds": part.limit}
    try:
        with log.open("w") as stream:
            done = subprocess.run(
                part.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=part.limit, check=False
            )
        kept["exit_code"] = done.returncode
    except subprocess.TimeoutExpired:
        kept["exit_code"] = None  # it was ended at its limit
    kept["seconds"] = round(time.perf_counter() - start, 1)
    if kept["exit_code"] != 0:
        kept["ending"] = log.read_text(errors="replace")[-ENDING:]
    write_json(record(work, name), kept)
    print(f"{name}: exit code {kept['exit_code']} after {kept['seconds']} s", flush=True)


def remove(path: Path) -> None:
    """Remove what an earlier run of a part left."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def assemble(args: argparse.Namespace, names: list[str]) -> None:
    """Write the file from the records of the parts and from what they wrote."""
    work = args.work
    places = {"training": work / FLOAT / TRAINING, "comparison": work / COMPARISON}
    result = {
        "environment": environment(args.device),
        "parts": {name: read_json(record(work, name)) for name in names if record(work, name).is_file()},
        **{name: read_json(place) for name, place in places.items() if place.is_file()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
