"""The demo: the main job on the bundled model, in a few minutes on two cores."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from tqdit import workflow
from tqdit.comparison import Comparison, compare
from tqdit.files import write_text
from tqdit.models.sampler import Sampling
from tqdit.recipe import Recipe
from tqdit.workflow import Report, silent

MODEL = "fashion-dit"
BITS = ("w8a8", "w6a6")
# Less than the published calibration, so that the demo takes minutes; `tqdit quantize` has the published defaults.
SETTINGS: dict[str, Any] = {"samples": 16, "steps": 100, "rounds": 1, "rows": 1024, "queries": 1024}


def run_demo(out: Path, report: Report = silent, settings: dict[str, Any] | None = None, num: int = 40) -> Comparison:
    """Quantize, sample, compare and report into `out`; artifacts go to `out`/fashion-dit-<bits>."""
    from tqdit.report.page import write_report

    chosen = SETTINGS if settings is None else settings
    prepared = workflow.prepare(MODEL, Recipe.build(**chosen), report)
    folders, seconds = [], []
    for bits in BITS:
        recipe = Recipe.build("paper", bits, **chosen)
        solution, searched = workflow.solve_prepared(prepared, recipe, partial(_renamed, report, f"search {bits}"))
        folders.append(out / f"{MODEL}-{bits}")
        seconds.append(prepared.seconds + searched)
        workflow.save(solution, prepared.source, folders[-1], overwrite=True)
    result = compare(MODEL, list(folders), num, Sampling("ddim", 20, 1.5), samples=4, report=report)
    result = result.with_seconds(seconds)
    write_report(result, prepared.records.maxima, prepared.records.t, out / "report.html")
    summary = {
        "environment": result.environment,
        "settings": {**result.settings, "calibration": chosen},
        "models": [row.figures() for row in (result.float_model, *result.models)],
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return result


def _renamed(report: Report, name: str, _: str, fraction: float) -> None:
    report(name, fraction)
