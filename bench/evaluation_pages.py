"""The figures of docs/evaluation.md, from the result files of bench/evaluation.py.

The page is written by hand but for its sections, each between two comments: `<!-- NAME: written by
bench/make_results.py -->` and `<!-- end of NAME -->`. A section whose result file is missing says so.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from pages import RESULTS, environment, read, table
from tqdit.evaluation.table import DIGITS, OTHERS, PAPERS

SECTION = re.compile(r"(<!-- ([\w-]+): written by bench/make_results\.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
STAGES = {
    "moments": "mean and covariance", "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial Fréchet distance", "precision_recall": "precision and recall",
    "kernel_distance": "kernel distance", "inception_score": "Inception score",
}  # fmt: skip
Run = Mapping[str, Any]


def evaluation(text: str) -> str:
    """Return docs/evaluation.md with the figures of the result files that there are; the rest of `text` stays.

    Raises `ValueError` where the page lacks a section or has one that nothing writes.
    """
    names = [found[2] for found in SECTION.finditer(text)]
    if sorted(names) != sorted(SECTIONS):
        raise ValueError(f"docs/evaluation.md has the sections {sorted(names)}, not {sorted(SECTIONS)}")
    return SECTION.sub(lambda found: f"{found[1]}\n{section(found[2])}\n\n{found[3]}", text)


def section(name: str) -> str:
    """Return the text of one section."""
    write, file = SECTIONS[name]
    if not (RESULTS / f"{file}.json").is_file():
        return f"Not measured yet: there is no `bench/results/{file}.json`."
    return write(read(file))


def models(run: Run) -> str:
    """Return the table of the bundled model and its artifacts."""
    found, protocol = run["evaluation"]["rows"], run["evaluation"]["protocol"]
    titles = PAPERS if protocol["network"]["inception"] else OTHERS
    names = [name for name in titles if any(name in row["scores"] for row in found)]
    rows = [[row["name"], *(_score(row, name) for name in names), *_cost(row)] for row in found]
    images = protocol["images"]
    head = (
        f"`{run['command']}`, on {environment(found[0]['environment'])}. {images['num']} images of each model, "
        f"{images['sampler']}, {images['steps']} steps, guidance {images['guidance']}, seed {images['seed']}; "
        f"{protocol['reference']['images']} real images; features of `{protocol['network']['name']}`. Seconds are of "
        "the images, the features and the scores; the peak of memory is that of the process so far."
    )
    header = ["model", *(titles[name] for name in names), "images (s)", "features (s)", "scores (s)", "peak (GiB)"]
    return f"{head}\n\n{table(header, rows)}"


def _score(row: Run, name: str) -> str:
    value = row["scores"].get(name)
    if value is None:
        return "–"
    error = row["details"].get(name, {}).get("standard_error")
    return f"{value:.{DIGITS[name]}f}" + (f" ± {error:.{DIGITS[name]}f}" if error is not None else "")


def _cost(row: Run) -> list[str]:
    seconds = [f"{row['seconds'][stage]:.1f}" for stage in ("images", "features", "scores")]
    return [*seconds, f"{row['peak_memory_bytes'] / 2**30:.1f}"]


def scores(run: Run) -> str:
    """Return the table of the time that scores take."""
    settings = run["settings"]
    rows = [[title, f"{run['seconds'][name]:.1f}", f"{run['cpu_seconds'][name]:.1f}"] for name, title in STAGES.items()]
    rows.append(["together", f"{run['total_seconds']:.1f}", f"{run['total_cpu_seconds']:.1f}"])
    head = (
        f"`{run['command']}`, on {environment(run['environment'])}: {settings['num']} real and {settings['num']} drawn "
        f"rows of {settings['pooled']} pooled and {settings['spatial']} spatial features. Peak of the process: "
        f"{run['peak_memory_bytes'] / 2**30:.1f} GiB. Seconds of the processor are summed over threads; other programs "
        "that run at the time lengthen the seconds on the wall alone."
    )
    return f"{head}\n\n{table(['stage', 'seconds', 'of the processor'], rows)}"


SECTIONS: dict[str, tuple[Callable[[Run], str], str]] = {
    "models": (models, "evaluation-h200"),
    "scores": (scores, "evaluation-scores-cpu"),
}
