"""Count what becomes of damaged files, killed processes, races and random input.

python bench/trust.py --json bench/results/trust.json

Every suite of tests/trust runs at length, the fuzzer for TQDIT_TRUST_MINUTES (3). Ends with exit code 1 if anything
failed: an output that is neither the old nor the new one, an error that is no `InputError`, damage that is not noticed.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tqdit.system.environment import environment
from tqdit.system.files import write_text
from tqdit.system.outputs import check_file

TESTS = Path(__file__).resolve().parent.parent / "tests"
MINUTES = float(os.environ.get("TQDIT_TRUST_MINUTES", "3"))
SEED = int(os.environ.get("TQDIT_TRUST_SEED", "1"))
DAMAGES = 1500
ROUNDS = 50  # of two processes at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="suites whose name has this in it")
    args = parser.parse_args()
    check_file(args.json)
    sys.path[:0] = [str(TESTS / "trust"), str(TESTS / "models"), str(TESTS)]
    result: dict[str, Any] = {"environment": environment(), "fuzz_minutes": MINUTES, "seed": SEED, "suites": {}}
    for name, suite in SUITES.items():
        if args.only in name:
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                counts = suite(Path(scratch))
            result["suites"][name] = {"seconds": round(time.monotonic() - start, 1), "cases": counts}
            show(name, counts)
    write_text(args.json, json.dumps(result, indent=1) + "\n")
    print(f"figures: {args.json}")
    sys.exit(any(failures_of(suite["cases"]) for suite in result["suites"].values()))


def kills(number: int) -> Callable[[Path], dict[str, Any]]:
    """A suite: a signal before each file-system call of each step that writes."""

    def suite(scratch: Path) -> dict[str, Any]:
        module = importlib.import_module("kills")
        return module.run(module.cases(scratch / "models"), scratch / "runs", number=number)

    return suite


def races(scratch: Path) -> dict[str, Any]:
    """A suite: two processes take the same step at once."""
    module = importlib.import_module("kills")
    return module.races(module.cases(scratch / "models"), scratch / "runs", ROUNDS)


def fuzzed(scratch: Path) -> dict[str, Any]:
    """A suite: random changes of everything that is read."""
    module = importlib.import_module("fuzz")
    return module.run(module.targets(scratch / "models"), scratch, minutes=MINUTES, seed=SEED)


def damaged(reader: str) -> Callable[[Path], dict[str, Any]]:
    """A suite: artifacts with damage of every family, read by the command line's code or by diffusers."""

    def suite(_: Path) -> dict[str, Any]:
        found = importlib.import_module("campaign").run(DAMAGES, SEED, len(os.sched_getaffinity(0)), reader)
        cases = {name: {**dict.fromkeys(found["outcomes"], 0), **counts} for name, counts in found["by_family"].items()}
        return {"all": {**found["outcomes"], "failures": found["first_failures"]}} | {
            name: {**counts, "failures": []} for name, counts in cases.items()
        }

    return suite


def tested(name: str) -> Callable[[Path], dict[str, Any]]:
    """A suite that is a file of tests, of which each is a case."""

    def suite(scratch: Path) -> dict[str, Any]:
        if not (TESTS / name).is_file():
            return {}
        report = scratch / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "trust or not trust",
            "-q",
            f"--junit-xml={report}",
            TESTS / name,
        ]
        subprocess.run([str(part) for part in command], check=False, cwd=TESTS.parent)
        cases: dict[str, Any] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [part.get("message", "") for part in case if part.tag in ("failure", "error")]
            skipped = sum(part.tag == "skipped" for part in case)
            counts = cases.setdefault(case.get("name", "").partition("[")[0], {"runs": 0, "skipped": 0, "failures": []})
            counts["runs"] += 1
            counts["skipped"] += skipped
            counts["failures"] += bad
        return cases

    return suite


SUITES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "SIGKILL": kills(signal.SIGKILL),
    "SIGINT": kills(signal.SIGINT),
    "races": races,
    "fuzz": fuzzed,
    "damage": damaged("tqdit"),
    "damage, diffusers": damaged("diffusers"),
    "sanitizer": tested("trust/test_sanitizer.py"),
}


def failures_of(cases: dict[str, Any]) -> list[str]:
    return [failure for counts in cases.values() for failure in counts["failures"]]


def show(name: str, cases: dict[str, Any]) -> None:
    """One line a case, one column a count."""
    columns = [key for key, value in next(iter(cases.values()), {}).items() if isinstance(value, int)]
    width = max(map(len, [name, *cases]))
    print(f"\n{name:{width}}", *(f"{column:>11}" for column in [*columns, "failures"]))
    for case, counts in cases.items():
        print(f"{case:{width}}", *(f"{counts[column]:11,}" for column in columns), f"{len(counts['failures']):11}")
    for failure in failures_of(cases):
        print(f"  {failure}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
