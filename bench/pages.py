"""Result files and tables: what the writers of the result pages share."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(row: dict[str, Any]) -> str:
    keys = ("device", "cpu", "cores", "threads", "python", "torch", "diffusers", "tqdit")
    return ", ".join(f"{key} {row[key]}" for key in keys if key in row)
