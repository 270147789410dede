"""The figures of docs/quality.md, from the result files of the scripts that measure quality.

The page is written by hand but for its sections, each between two comments: `<!-- NAME: written by
bench/make_results.py -->` and `<!-- end of NAME -->`. A section whose result file is missing says so.
"""

import re
from collections.abc import Callable
from typing import Any

from pages import RESULTS, environment, read, table
from verdict_pages import equivalence, published, yardstick

SAME = 0.1  # dB: a smaller difference counts as none
PLUS, FORMER = "plus", "former plus"
STEP, WITHOUT, OTHER = "... + ", "plus without ", "plus, "
SECTION = re.compile(r"(<!-- ([\w-]+): written by bench/make_results\.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
Run = dict[str, Any]
Lines = list[str]


def quality(text: str) -> str:
    """Return docs/quality.md with the figures of the result files that there are; the rest of `text` stays.

    Raises `ValueError` where the page lacks a section or has one that nothing writes.
    """
    names = [found[2] for found in SECTION.finditer(text)]
    if sorted(names) != sorted(SECTIONS):
        raise ValueError(f"docs/quality.md has the sections {sorted(names)}, not {sorted(SECTIONS)}")
    return SECTION.sub(lambda found: found[1] + "\n".join(section(found[2])) + "\n" + found[3], text)


def section(name: str) -> Lines:
    """Return the lines of one section."""
    write, files = SECTIONS[name]
    there = [file for file in files if (RESULTS / f"{file}.json").is_file()]
    lines = [line for file in there for line in write(read(file))]
    if not there:
        missing = " or ".join(f"`bench/results/{file}.json`" for file in files)
        lines += [f"Not measured yet: there is no {missing}.", ""]
    return ["", *lines]


def parts(run: Run) -> Lines:
    """Return the tables of the parts of `plus`: added one by one, and each left out of the whole."""
    lines = [_ablation_head(run), ""]
    for bits, rows in _by_bits(run):
        lines += _steps(bits, rows) + _left_out(bits, rows)
    return lines + _groups(run)


def alternatives(run: Run) -> Lines:
    """Return the table of variants of `plus` that are not in it, each with a verdict."""
    cells = [
        [bits.upper(), name.removeprefix(OTHER), *_beside(row, rows[PLUS]), _verdict(row, rows[PLUS])]
        for bits, rows in _by_bits(run)
        if PLUS in rows
        for name, row in rows.items()
        if name.startswith(OTHER)
    ]
    if not cells:
        return ["Not measured yet: the result file has no such variant.", ""]
    header = ["bits", "`plus`, but with", *BESIDE, "beside `plus`"]
    why = (
        f"The same run as above. A difference of at most {SAME} dB counts as none. FD-fashion has no verdict, because "
        f"it moves with the seed alone: the float model has {_spread(run)}."
    )
    return [why, "", table(header, cells), ""]


def objective(run: Run) -> Lines:
    """Return how well each loss ranks models as their images do, and the sensitivity by time group."""
    settings, rows = run["settings"], run["variants"]
    misses = [abs(row["predicted_psnr_db"] - row["psnr_db"]) for row in rows]
    ranks = [[LOSSES[name], _number(value, ".3f")] for name, value in run["spearman"].items()]
    curves = {name: curve["by_group"] for name, curve in run["sensitivity"].items()}
    count = max(map(len, curves.values()))
    tops = {name: max(values) for name, values in curves.items()}
    by_group = [
        [f"{name}, of its largest", *(f"{v / tops[name]:.2g}" for v in values)] for name, values in curves.items()
    ]
    return [
        f"`python bench/objective.py --json bench/results/objective-h200.json` on {environment(run['environment'])}: "
        f"{len(rows)} variants of {settings['model']}, {settings['images']} images each by "
        f"{settings['sampler'].upper()} in {settings['steps']} steps, guidance {settings['guidance']}; "
        f"{settings['states']} held-out states in each time group, sensitivity from {settings['probes']} sampling runs "
        f"in {run['seconds']['sensitivity']:.0f} s.",
        "",
        table(["loss", "rank correlation with the PSNR"], ranks),
        "",
        "The sensitivity also predicts the PSNR itself; the prediction is off by "
        f"{sum(misses) / len(misses):.1f} dB in the mean over the variants, and by {max(misses):.1f} dB at most. "
        "Squared sensitivity by time group, from clean images to noise:",
        "",
        table(["errors", *map(str, range(count))], by_group),
        "",
    ]


def cost(run: Run) -> Lines:
    """Return what `plus` costs beside its former form, or how long its calibration takes."""
    where = environment(run["environment"])
    if "stages" in run:
        seconds = {name: stage["seconds"] for name, stage in run["stages"].items()}
        shares = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        return [
            f"Calibration of {run['shape']} with published settings and `{run['recipe']['preset']}` takes "
            f"{sum(seconds.values()):.0f} s on {where}: {shares}.",
            "",
        ]
    ratios = [f"{ratio:.3f} at {workload}" for workload, ratio in run["ratio"].items()]
    return [
        f"A call of {run['shape']} {run['bits'].upper()} takes {' and '.join(ratios)} of the time that it took with "
        f"`plus` in its former form (pixels and samples of a call; {len(run['rounds'])} "
        f"{'round' if len(run['rounds']) == 1 else 'rounds'} of both versions in turn) on {where}.",
        "",
    ]


def colour(run: Run) -> Lines:
    """Return the second model's figures."""
    training, settings, float_row = run["training"], run["settings"], run["reference"]
    shown = sum(train for train, _ in training["images_train_test"].values())
    rows = [["float32", "–", "1.000", "–", "–", f"{float_row['fd']:.2f}", f"{float_row['class_agreement']:.3f}"]]
    if bf16 := run.get("bfloat16"):
        rows += [["bfloat16", "–", "0.500", f"{bf16['eps_sqnr_db']:.2f}", f"{bf16['psnr_db']:.2f}",
                  f"{bf16['fd']:.2f}", f"{bf16['class_agreement']:.3f}"]]  # fmt: skip
    rows += [
        [row["bits"].upper(), f"`{row['preset']}`", f"{row['size_ratio']:.3f}", f"{row['eps_sqnr_db']:.2f}",
         f"{row['psnr_db']:.2f}", f"{row['fd']:.2f}", f"{row['class_agreement']:.3f}"]
        for row in run["models"]
    ]  # fmt: skip
    return [
        f"`python bench/colour.py bench/results/colour-h200.json` on {environment(run['environment'])}: a "
        f"{training['shape']} of {training['parameters'] / 1e6:.1f} M parameters for colour images of "
        f"{len(training['images_train_test'])} classes, trained on {shown} images "
        f"(`examples/train_colour_dit.py`) for {training['training']['steps']} steps. "
        f"{settings['images']} images of each model, DDIM {settings['steps']} steps, guidance {settings['guidance']}; "
        f"SQNR over {settings['states']} held-out states. One calibration of "
        f"{run['calibration_seconds']:.0f} s served all rows.",
        "",
        table(["bits", "preset", "size / fp32", "ε SQNR (dB)", "PSNR (dB)", "FD", "class agreement"], rows),
        "",
        "FD is a Fréchet distance over features of this model's own classifier, so compare it within this table alone. "
        f"Images of the float model from other seeds have {float_row['fd_other_seeds']:.2f}.",
        "",
    ]


LOSSES = {
    "plain": "all states alike",
    "sampler": "by the sampler's next state",
    "white": "by the image, for white errors of the output",
    "image": "by the image, for errors that arise in the layers",
}
SHOWN = ["ε SQNR (dB)", "PSNR (dB)"]
BESIDE = ["ε SQNR (dB)", "Δ", "PSNR (dB)", "Δ", "FD-fashion", "size / fp32"]


def _ablation_head(run: Run) -> str:
    settings, recipe = run["settings"], run["settings"]["calibration"]
    return (
        "`python bench/ablation.py --device cuda --json bench/results/ablation-quality.json` on "
        f"{environment(run['environment'])}. Every variant is solved from the same records and runs in integers. SQNR "
        f"over {settings['held_out_per_group']} held-out states in each time group; PSNR of images with the same seeds "
        f"as the float model's, {settings['images']} of them, DDIM {settings['steps']} steps, guidance "
        f"{settings['guidance']}; FD-fashion of the float model over its seeds: {_spread(run)}. Calibration: "
        f"{recipe['samples']} samples in each of {recipe['groups']} time groups. Δ: in dB, see each table."
    )


def _spread(run: Run) -> str:
    floats = run["float_fd_fashion"]
    return f"{min(floats):.3f} to {max(floats):.3f}"


def _by_bits(run: Run) -> list[tuple[str, dict[str, Run]]]:
    """Return (bits, rows by variant), in the order of the file."""
    bits = dict.fromkeys(row["bits"] for row in run["rows"])
    return [(one, {row["variant"]: row for row in run["rows"] if row["bits"] == one}) for one in bits]


def _steps(bits: str, rows: dict[str, Run]) -> Lines:
    """Return the table that adds one part after the other. The last part makes the variant before it `plus`."""
    chain = [name for name in rows if name in (FORMER, PLUS) or name.startswith(STEP)]
    if len(chain) < 2:
        return []
    added = {name.removeprefix(STEP) for name in chain}
    last = [name.removeprefix(WITHOUT) for name in rows if name.startswith(WITHOUT)]
    last = [name for name in last if name not in added]
    names = {PLUS: f"... + {last[0]}: `plus`" if len(last) == 1 else "`plus`, all parts"}
    cells = [
        [names.get(name, name), *_beside(rows[name], rows[chain[max(place - 1, 0)]]), *_cost(rows[name])]
        for place, name in enumerate(chain)
    ]
    header = ["variant", *BESIDE, "calibration (s)", "GPU memory (GiB)"]
    return [f"**{bits.upper()}**, part by part; Δ is over the row above:", "", table(header, cells), ""]


def _left_out(bits: str, rows: dict[str, Run]) -> Lines:
    """Return the table of `plus` without each of its parts."""
    without = [name for name in rows if name.startswith(WITHOUT)]
    if PLUS not in rows or not without:
        return []
    cells = [
        [name.removeprefix(WITHOUT), *_beside(rows[name], rows[PLUS]), _verdict(rows[name], rows[PLUS])]
        for name in without
    ]
    title = f"**{bits.upper()}**, `plus` without one part; Δ is over `plus`, and negative where the part helps:"
    return [title, "", table(["without", *BESIDE, "beside `plus`"], cells), ""]


def _groups(run: Run) -> Lines:
    """Return the SQNR by time group of `plus` and of what it was before."""
    cells = [
        [f"{bits.upper()} {name}", *(f"{db:.1f}" for db in rows[name]["eps_sqnr_db_by_group"])]
        for bits, rows in _by_bits(run)
        for name in (FORMER, PLUS)
        if name in rows
    ]
    if not cells:
        return []
    count = len(cells[0]) - 1
    return ["ε SQNR (dB) by time group, from clean images to noise:", "",
            table(["variant", *map(str, range(count))], cells), ""]  # fmt: skip


def _beside(row: Run, other: Run) -> Lines:
    """Return the cells of `BESIDE`."""
    cells = []
    for key in ("eps_sqnr_db", "psnr_db"):
        cells += [f"{row[key]:.2f}", "–" if row is other else f"{row[key] - other[key]:+.2f}"]
    return [*cells, _number(row["fd_fashion"], ".3f"), f"{row['size_ratio']:.3f}"]


def _cost(row: Run) -> Lines:
    memory = row["peak_memory_bytes"]
    return [f"{row['calibration_seconds']:.0f}", "–" if memory is None else f"{memory / 2**30:.1f}"]


def _verdict(row: Run, other: Run) -> str:
    """Say in which of both figures a row is better or worse than another."""
    gains = {name: row[key] - other[key] for name, key in (("SQNR", "eps_sqnr_db"), ("PSNR", "psnr_db"))}
    better = " and ".join(name for name, gain in gains.items() if gain > SAME)
    worse = " and ".join(name for name, gain in gains.items() if gain < -SAME)
    said = [f"{word} {names}" for word, names in (("better", better), ("worse", worse)) if names]
    return ", ".join(said) or "the same"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


SECTIONS: dict[str, tuple[Callable[[Run], Lines], tuple[str, ...]]] = {
    "yardstick": (yardstick, ("baselines-h200", "baselines-cpu")),
    "parts": (parts, ("ablation-quality",)),
    "objective": (objective, ("objective-h200",)),
    "equivalence": (equivalence, ("equivalence-h200",)),
    "baselines": (published, ("baselines-h200", "baselines-cpu")),
    "colour": (colour, ("colour-h200", "colour-bf16-h200")),
    "cost": (cost, ("before-after-quality-h200", "before-after-quality-cpu", "calibration-quality-h200")),
    "alternatives": (alternatives, ("ablation-quality",)),
}
