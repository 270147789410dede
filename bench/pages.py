"""Result files and tables: what the writers of the result pages share."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TWO_PRODUCTS = "two products after GELU"  # what `plus` allowed before recipes had `gelu_products`
FORMER_PLUS = f"plus, {TWO_PRODUCTS}"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def variant(row: dict[str, Any], run: dict[str, Any]) -> str:
    """The variant of a row of an ablation; `plus` says so where the run was before `plus` allowed one product only."""
    former = row["variant"] == "plus" and "gelu_products" not in run["settings"]["calibration"]
    return FORMER_PLUS if former else row["variant"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(row: dict[str, Any]) -> str:
    keys = ("device", "cpu", "cores", "threads", "python", "torch", "diffusers", "tqdit")
    return ", ".join(f"{key} {row[key]}" for key in keys if key in row)
