"""Define the command `tqdit demo`: the main job on the bundled model, in a few minutes on two cores."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqdit.cli.bars import Report, progress
from tqdit.cli.console import print_comparison
from tqdit.cli.options import Quiet, Verbose, check_outputs, command
from tqdit.cli.settings import Set, parsed

if TYPE_CHECKING:
    from tqdit.quality.samples import Comparison

MODEL = "fashion-dit"
MODELS = (("plus", "w8a8"), ("paper", "w8a8"), ("plus", "w4a8"))  # preset and bits, in the order of the report
NAMES = tuple(f"{MODEL}-{preset}-{bits}" for preset, bits in MODELS)
STAGES = {
    "trajectories": 70, "statistics": 10,
    **dict(zip((f"search {preset} {bits}" for preset, bits in MODELS), (14, 40, 14), strict=True)),
    "held-out states": 5, f"images of {MODEL}": 15,
    **{f"images of {name}": 5 for name in NAMES}, "timing": 12, f"images of {MODEL}, other seeds": 15,
    **{f"sites of {name}": 5 for name in NAMES}, "memory": 22, "report": 5,
}  # seconds on two cores, to estimate the time that is left  # fmt: skip
RUN = "run.safetensors"
FILES = ("report.html", RUN, "side-by-side.png", "summary.json")
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
    """Quantize the bundled model in three ways, sample all four with the same seeds, and write a report.

    The preset plus to W8A8 and W4A8, and paper, the published method, to W8A8. The report begins with the verdict of
    the equivalence test, and says what a test of so few images can tell.
    """
    from tqdit.system.extras import check_report
    from tqdit.system.outputs import check_target

    check_report()
    settings = _settings(assignments)
    for name in NAMES:
        check_target(out / name, overwrite=True)
    check_outputs(*(out / name for name in FILES))
    with progress(quiet, STAGES) as report:
        result = run_demo(out, report, settings)
    print_comparison(result)
    typer.echo(f"report: {out / 'report.html'}\nrun: {out / RUN}\nfigures: {out / 'summary.json'}")


def _settings(assignments: list[str] | None) -> dict[str, Any]:
    """Return the settings of all recipes, with those of `--set`. The demo's bit-widths cannot be set."""
    from tqdit.errors import InputError

    assigned = parsed(assignments)
    if fixed := [name for name in ("preset", "bits", "weight_bits", "activation_bits") if name in assigned]:
        raise InputError(f"--set {fixed[0]}: the demo has {', '.join(map(' '.join, MODELS))}")
    return SETTINGS | assigned


def run_demo(
    out: Path,
    report: Report = lambda stage, fraction: None,
    settings: Mapping[str, Any] = SETTINGS,
    num: int = 40,
    steps: int = 20,
    samples: int = 4,
) -> "Comparison":
    """Quantize, sample, compare and report into `out`; artifacts go to `out`/fashion-dit-<preset>-<bits>.

    `settings`: the settings of the calibration. `num`: the number of images, of `steps` DDIM steps each; the
    equivalence test wants a multiple of 20, at least 40, and is left out for other numbers. `samples`: the number of
    held-out states per time group.
    """
    from tqdit import workflow
    from tqdit.quality import run_file
    from tqdit.quality.comparison import compare_samples
    from tqdit.recipe import Recipe
    from tqdit.report.page import write_report
    from tqdit.sampling.guidance import Sampling

    recipes = [Recipe(**{"preset": preset, "bits": bits, **settings}) for preset, bits in MODELS]
    prepared = workflow.prepare(MODEL, recipes[0], report)
    seconds = []
    for name, recipe in zip(NAMES, recipes, strict=True):
        stage = f"search {recipe.preset} {recipe.bits}"
        solution, searched = workflow.solve_prepared(prepared, recipe, partial(_renamed, report, stage))
        seconds.append(prepared.seconds + searched)
        workflow.save(solution, prepared.source, out / name, overwrite=True)
    result = compare_samples(
        MODEL, [out / name for name in NAMES], num, Sampling("ddim", steps, 1.5), samples, report=report,
        equivalence=num >= 40 and num % 20 == 0, sites=True, bfloat16=False,
    )  # fmt: skip
    result = result.with_seconds(seconds)
    result.save(out / RUN, command())
    report("report", 0.0)
    write_report([run_file.read(out / RUN)], out / "report.html")
    report("report", 1.0)
    _write_figures(result, out, {name: getattr(recipes[0], name) for name in settings})
    return result


def _write_figures(result: "Comparison", out: Path, settings: Mapping[str, Any]) -> None:
    """Write the images side by side, and the summary. `settings`: the settings of the calibration."""
    from tqdit.imaging.generate import save_picture
    from tqdit.imaging.rows import labelled_rows
    from tqdit.system.files import write_text

    rows = (result.float_model, *result.models)
    labels = ("float32", *(f"{preset} {bits.upper()}" for preset, bits in MODELS))
    shown = {label: row.images[:10] for label, row in zip(labels, rows, strict=True)}
    save_picture(labelled_rows(shown, scale=2), out / "side-by-side.png")
    summary = {
        "environment": result.environment,
        "settings": {**result.settings, "calibration": dict(settings)},
        "models": [row.figures() for row in rows],
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")


def _renamed(report: Report, name: str, _: str, fraction: float) -> None:
    report(name, fraction)
