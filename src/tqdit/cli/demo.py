"""The demo: the main job on the bundled model, in a few minutes on two cores."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tqdit import workflow
from tqdit.imaging.generate import save_grid
from tqdit.quality.comparison import Comparison, compare
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import Sampling
from tqdit.system.extras import check_report
from tqdit.system.files import write_text
from tqdit.workflow import Report, silent

MODEL = "fashion-dit"
BITS = ("w8a8", "w6a6")
# Less than the published calibration, so that the demo takes minutes; `tqdit quantize` has the published defaults.
STAGES = {
    "trajectories": 18, "statistics": 12, "search w8a8": 33, "search w6a6": 33, "held-out states": 6,
    f"images of {MODEL}": 24, f"images of {MODEL}-w8a8": 8, f"timing {MODEL}-w8a8": 3, f"images of {MODEL}-w6a6": 8,
    f"timing {MODEL}-w6a6": 3, "memory": 25,
}  # seconds on two cores, for the time that is left  # fmt: skip
SETTINGS: dict[str, Any] = {"samples": 16, "steps": 100, "rounds": 1, "rows": 1024, "queries": 1024}


def run_demo(
    out: Path,
    report: Report = silent,
    settings: dict[str, Any] = SETTINGS,
    num: int = 40,
    steps: int = 20,
    samples: int = 4,
) -> Comparison:
    """Quantize, sample, compare and report into `out`; artifacts go to `out`/fashion-dit-<bits>.

    `settings`: of the calibration. `num` images of `steps` DDIM steps, `samples` held-out states per time group.
    """
    check_report()
    from tqdit.report.page import write_report

    prepared = workflow.prepare(MODEL, Recipe.build(**settings), report)
    folders, seconds = [], []
    for bits in BITS:
        recipe = Recipe.build(bits=bits, **settings)
        solution, searched = workflow.solve_prepared(prepared, recipe, partial(_renamed, report, f"search {bits}"))
        folders.append(out / f"{MODEL}-{bits}")
        seconds.append(prepared.seconds + searched)
        workflow.save(solution, prepared.source, folders[-1], overwrite=True)
    result = compare(MODEL, list(folders), num, Sampling("ddim", steps, 1.5), samples, report=report)
    result = result.with_seconds(seconds)
    write_report(result, prepared.records.maxima, prepared.records.t, out / "report.html")
    rows = (result.float_model, *result.models)
    save_grid(torch.cat([row.images[:10] for row in rows]), out / "side-by-side.png", columns=10)
    summary = {
        "environment": result.environment,
        "settings": {**result.settings, "calibration": settings},
        "models": [row.figures() for row in rows],
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return result


def _renamed(report: Report, name: str, _: str, fraction: float) -> None:
    report(name, fraction)
