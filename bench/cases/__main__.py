"""Situations from public bug reports of this field, each with its right outcome: a table, one row a situation.

python bench/cases [--json bench/results/cases.json] [--only TEXT]

Each situation runs in a process of its own, so that one that dies or hangs is a row like the others. The exit code is
1 if any row is wrong.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import textwrap
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import adapters
import pipelines
import prompts
import ranges
import state
import torch
import tracing
import worlds
from tiny import WrongError

import models
from tqdit.system.environment import environment

SECONDS = 240  # that a situation may take
MODULES = (tracing, models, prompts, ranges, worlds, adapters, pipelines, state)
WIDTH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="situations whose name has this text")
    args = parser.parse_args()
    torch.set_num_threads(1)  # nothing may have started threads before a process forks
    rows = []
    for module in MODULES:
        for name, run in module.CASES.items():
            if args.only in name:
                rows.append(outcome_of(name, run))
                print_row(rows[-1])
    wrong = [row["situation"] for row in rows if not row["right"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} right")
    if args.json:
        table = {"environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(1 if wrong else 0)


def outcome_of(name: str, run: Any) -> dict[str, Any]:
    """One row: how the situation ended, and whether that is right."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(run, there))
    process.start()
    there.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return {"situation": name, "right": False, "outcome": f"busy after {SECONDS} s"}
    try:
        right, outcome = here.recv()
    except EOFError:
        right, outcome = False, f"the process died with exit code {process.exitcode}"
    return {"situation": name, "right": right, "outcome": outcome}


def _run(run: Any, answer: Connection) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        try:
            found = (True, run(Path(work)))
        except WrongError as error:
            found = (False, str(error))
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            line = str(error).strip().partition("\n")[0]
            found = (False, f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {line}")
        answer.send((found[0], found[1].replace(work, "…")))


def print_row(row: dict[str, Any]) -> None:
    mark = "right" if row["right"] else "WRONG"
    text = textwrap.wrap(row["outcome"], WIDTH - 8) or [""]
    print(f"{mark}  {row['situation']}", *(f"       {line}" for line in text), sep="\n", flush=True)


if __name__ == "__main__":
    main()
