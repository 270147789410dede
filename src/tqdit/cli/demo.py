"""Define the command `tqdit demo`: the main job on the bundled model, in a few minutes on two cores."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqdit.cli.bars import Report, progress
from tqdit.cli.console import print_comparison
from tqdit.cli.options import Quiet, Verbose, check_outputs
from tqdit.cli.settings import Set, parsed

if TYPE_CHECKING:
    from tqdit.quality.comparison import Comparison

MODEL = "fashion-dit"
BITS = ("w8a8", "w6a6")
STAGES = {
    "trajectories": 70, "statistics": 10, "search w8a8": 14, "search w6a6": 64, "held-out states": 5,
    f"images of {MODEL}": 15, f"images of {MODEL}-w8a8": 5, f"timing {MODEL}-w8a8": 4, f"images of {MODEL}-w6a6": 5,
    f"timing {MODEL}-w6a6": 4, "memory": 17,
}  # seconds on two cores, to estimate the time that is left  # fmt: skip
# These settings calibrate less than published, so that the demo takes minutes; `tqdit quantize` has the published ones.
SETTINGS: dict[str, Any] = {"samples": 16, "steps": 100, "rounds": 1, "rows": 1024, "queries": 1024}


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for artifacts, report and summary")] = Path(
        "build/demo"
    ),
    assignments: Set = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize the bundled model to W8A8 and W6A6, sample all three with the same seeds, and write a report."""
    from tqdit.system.extras import check_report
    from tqdit.system.files import check_target

    check_report()
    settings = _settings(assignments)
    for bits in BITS:
        check_target(out / f"{MODEL}-{bits}", overwrite=True)
    check_outputs(out / "report.html", out / "side-by-side.png", out / "summary.json")
    with progress(quiet, STAGES) as report:
        result = run_demo(out, report, settings)
    print_comparison(result)
    typer.echo(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}")


def _settings(assignments: list[str] | None) -> dict[str, Any]:
    """Return the settings of both recipes, with those of `--set`. The demo's bit-widths cannot be set."""
    from tqdit.errors import InputError

    assigned = parsed(assignments)
    if fixed := [name for name in ("bits", "weight_bits", "activation_bits") if name in assigned]:
        raise InputError(f"--set {fixed[0]}: the demo has {' and '.join(BITS)}")
    return SETTINGS | assigned


def run_demo(
    out: Path,
    report: Report = lambda stage, fraction: None,
    settings: Mapping[str, Any] = SETTINGS,
    num: int = 40,
    steps: int = 20,
    samples: int = 4,
) -> "Comparison":
    """Quantize, sample, compare and report into `out`; artifacts go to `out`/fashion-dit-<bits>.

    `settings`: the settings of the calibration. `num`: the number of images, of `steps` DDIM steps each. `samples`: the
    number of held-out states per time group.
    """
    from tqdit import workflow
    from tqdit.quality.compare import compare
    from tqdit.recipe import Recipe
    from tqdit.report.page import write_report
    from tqdit.sampling.guidance import Sampling

    recipes = [Recipe(**{"bits": bits, **settings}) for bits in BITS]
    prepared = workflow.prepare(MODEL, recipes[0], report)
    folders, seconds = [], []
    for bits, recipe in zip(BITS, recipes, strict=True):
        solution, searched = workflow.solve_prepared(prepared, recipe, partial(_renamed, report, f"search {bits}"))
        folders.append(out / f"{MODEL}-{bits}")
        seconds.append(prepared.seconds + searched)
        workflow.save(solution, prepared.source, folders[-1], overwrite=True)
    result = compare(MODEL, list(folders), num, Sampling("ddim", steps, 1.5), samples, report=report)
    result = result.with_seconds(seconds)
    write_report(result, prepared.records.maxima, prepared.records.t, out / "report.html")
    _write_figures(result, out, {name: getattr(recipes[0], name) for name in settings})
    return result


def _write_figures(result: "Comparison", out: Path, settings: Mapping[str, Any]) -> None:
    """Write the images side by side, and the summary. `settings`: the settings of the calibration."""
    import torch

    from tqdit.imaging.generate import save_grid
    from tqdit.system.files import write_text

    rows = (result.float_model, *result.models)
    save_grid(torch.cat([row.images[:10] for row in rows]), out / "side-by-side.png", columns=10)
    summary = {
        "environment": result.environment,
        "settings": {**result.settings, "calibration": dict(settings)},
        "models": [row.figures() for row in rows],
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")


def _renamed(report: Report, name: str, _: str, fraction: float) -> None:
    report(name, fraction)
