"""The parts of docs/quality.md that compare with others: bf16, published methods, and the equivalence test."""

import math
from typing import Any

from pages import environment, table

FLOAT, BF16 = "float32", "bfloat16"  # in the equivalence test's file
DTYPES = ("bf16", "fp16")  # in the baselines' file
DB = 10 / math.log(10)  # of a logarithm of squared errors
KID_UNIT = 1e-5
Run = dict[str, Any]
Lines = list[str]


def yardstick(run: Run) -> Lines:
    """Return the float model in smaller float types beside the artifacts of the same run, the least error first."""
    rows = [row for row in run["rows"] if row["method"] in DTYPES or _is_artifact(row)]
    measured = sorted((row for row in rows if "failed" not in row), key=lambda row: -row["psnr_db"])
    cells = [[_name(row), *_figures(row)] for row in measured]
    return [
        f"On {environment(run['environment'])}; how is said below the [baselines](#baselines). In order of the PSNR:",
        "",
        table(["model", *FIGURES], cells),
        "",
    ]


def published(run: Run) -> Lines:
    """Return a table for each bit-width: published methods, libraries and artifacts; then what failed."""
    settings, calibration = run["settings"], run["settings"]["calibration"]
    lines = [
        f"`python bench/baseline_table.py` on {environment(run['environment'])}: {settings['model']}, "
        f"{settings['images']} images of each row with the same seeds, DDIM {settings['steps']} steps, guidance "
        f"{settings['guidance']}; SQNR over {settings['held_out_per_group']} held-out states in each time group. All "
        f"methods are calibrated on the same {calibration['samples']} states in each of {calibration['groups']} time "
        f"groups, with {settings['rows_per_sample']} tokens of each state to tune on. {settings['scope']} FD-fashion "
        f"of the float model: {_number(run['float_fd_fashion'], '.3f')}.",
        "",
    ]
    for bits in dict.fromkeys(row["bits"] for row in run["rows"] if row["bits"] not in DTYPES):
        rows = [row for row in run["rows"] if row["bits"] == bits and "failed" not in row]
        ordered = sorted(rows, key=lambda row: -row["psnr_db"])
        cells = [[_name(row), *_figures(row), f"{row['quantization_seconds']:.1f}"] for row in ordered]
        if cells:
            title = f"**{bits.upper()}**, in order of the PSNR:"
            lines += [title, "", table(["method", *FIGURES, "quantization (s)"], cells), ""]
    lines += ["What methods chose: " + "; ".join(chosen) + ".", ""] if (chosen := _chosen(run["rows"])) else []
    failed = [f"{row['bits'].upper()} {row['method']}: {row['failed']}" for row in run["rows"] if "failed" in row]
    return lines + (["Not measured: " + "; ".join(failed) + ".", ""] if failed else [])


def equivalence(run: Run) -> Lines:
    """Return how often each model passed both tests, then the figures of every repeat."""
    settings = run["settings"]
    return [
        f"`{run['command']}` on {environment(run['environment'])}; {settings['blocks']} blocks, "
        f"{settings['real_images']} real images, level {settings['alpha']}, margin "
        f"{settings['margin_standard_errors']} standard errors of what other seeds do.",
        "",
        table(["images by", "model", "repeats", "equivalent in", "closer than bf16 in"], _counted(run)),
        "",
        f"Every repeat. KID: the mean difference to the float model's distance from real images, in units of "
        f"{KID_UNIT:g}, with its one-sided 95 % bounds. Error: the mean log ratio of the squared error of an image to "
        "that of bf16, in dB; below 0 is closer than bf16.",
        "",
        table(
            ["images by", "seed", "model", "KID", "margin", "error over bf16's (dB)", "PSNR (dB)", "FD difference"],
            [cells for trial in run["trials"] for cells in _trial(trial)],
        ),
        "",
    ]


def verdict_summary(run: Run) -> str:
    """Return a table of the first setting of the equivalence test."""
    first = _setting(run["trials"][0])
    trials = [trial for trial in run["trials"] if _setting(trial) == first]
    cells = [
        [_label(run, name), f"{row['psnr_db']:.1f}", f"{row['verdict']['fd']['value']:+.3f}",
         _all(trials, name, "equivalent"), "–" if name == BF16 else _all(trials, name, "closer_than_bf16")]
        for name, row in trials[0]["models"].items()
        if "verdict" in row
    ]  # fmt: skip
    header = ["images of", "PSNR (dB)", "FD difference", "equivalent to fp32's", "closer to fp32's than bf16's"]
    return (
        f"{table(header, cells)}\n\n"
        f"Today's `plus` on the bundled model: {first} of each model, on an {run['environment']['device']}. Equivalent "
        "is the verdict of a test whose rules were fixed beforehand "
        "([quality.md](quality.md#the-equivalence-test))."
    )


def _all(trials: list[Run], name: str, verdict: str) -> str:
    """Say in how many trials a model has a verdict."""
    passed = sum(trial["models"][name]["verdict"][verdict] for trial in trials)
    if len(trials) == 1:
        return "yes" if passed else "no"
    return f"in {passed} of {len(trials)} repeats"


FIGURES = ["ε SQNR (dB)", "PSNR (dB)", "FD-fashion"]


def _chosen(rows: list[Run]) -> Lines:
    """Say what the notes of rows have: SmoothQuant's exponents, Q-DiT's groups, and versions of libraries."""
    said = []
    for row in rows:
        notes = row.get("notes", {})
        parts = [f"{name} {notes[name]}" for name in ("torchao", "openvino", "nncf") if name in notes]
        if sizes := notes.get("group_sizes"):
            parts.append("groups of " + " and ".join(map(str, sorted(set(sizes.values())))))
        if "exponents" in notes:
            powers = [power for power in notes["exponents"].values() if power is not None]
            smoothed = f"{len(powers)} of {len(notes['exponents'])} layers smoothed"
            parts.append(f"{smoothed}, exponents {min(powers):g} to {max(powers):g}" if powers else smoothed)
        said += [f"{row['bits'].upper()} {row['method']}: {', '.join(parts)}"] if parts else []
    return said


def _is_artifact(row: Run) -> bool:
    """Say whether a row is an artifact's: its name is its folder's, and those of methods are known."""
    from baselines import METHODS

    return row["method"] not in (*METHODS, *DTYPES, "torchao int8", "OpenVINO int8")


def _name(row: Run) -> str:
    if row["method"] in DTYPES:
        return f"the float model in {row['method']}"
    return f"**`{row['method']}`**, ours" if _is_artifact(row) else row["method"]


def _figures(row: Run) -> Lines:
    return [f"{row['eps_sqnr_db']:.2f}", f"{row['psnr_db']:.2f}", _number(row["fd_fashion"], ".3f")]


def _setting(trial: Run) -> str:
    return f"{trial['sampler'].upper()} {trial['steps']}, guidance {trial['guidance']:g}, {trial['num']} images"


def _label(run: Run, name: str) -> str:
    known = run["settings"]["artifacts"].get(name)
    return f"{known['bits'].upper()} `{known['preset']}`" if known else f"the float model in {name}"


def _counted(run: Run) -> list[Lines]:
    """Return the rows of the summary. bf16 is not compared with itself."""
    verdicts: dict[tuple[str, str], list[Run]] = {}
    for trial in run["trials"]:
        for name, row in trial["models"].items():
            if "verdict" in row:
                verdicts.setdefault((_setting(trial), name), []).append(row["verdict"])
    return [
        [setting, _label(run, name), str(len(found)), str(sum(verdict["equivalent"] for verdict in found)),
         "–" if name == BF16 else str(sum(verdict["closer_than_bf16"] for verdict in found))]
        for (setting, name), found in verdicts.items()
    ]  # fmt: skip


def _trial(trial: Run) -> list[Lines]:
    """Return the rows of one repeat, the float model's without a verdict."""
    rows = []
    for name, row in trial["models"].items():
        head = [_setting(trial), str(trial["seed"]), name]
        verdict = row.get("verdict")
        if not verdict:
            rows.append([*head, "–", "–", "–", "–", f"FD {_number(row['fd_fashion'], '.3f')}"])
            continue
        kid, error, fd = verdict["kid"], verdict["log_error"], verdict["fd"]
        rows.append([
            *head,
            f"{kid['value'] / KID_UNIT:+.2f} ({kid['lower'] / KID_UNIT:+.2f} to {kid['upper'] / KID_UNIT:+.2f})",
            f"{verdict['margin'] / KID_UNIT:.2f}",
            "–" if name == BF16 else f"{DB * error['value']:+.2f} (below {DB * error['upper']:+.2f})",
            f"{row['psnr_db']:.2f}",
            f"{fd['value']:+.4f} ± {fd['standard_error']:.4f}",
        ])  # fmt: skip
    return rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
