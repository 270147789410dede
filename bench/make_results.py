"""Write the figures of docs/ and the README's table from result files.

Whole pages: results.md and any-input.md; sections: quality.md, evaluation.md, models.md and gpu.md.

python bench/make_results.py
python bench/make_results.py --check    # only compares
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from architecture_pages import architectures
from attention_pages import attention
from evaluation_pages import evaluation
from full_size_pages import full_size
from gpu_pages import gpu_speed, gpu_summary
from model_pages import models
from pages import ROOT, environment, read, table
from quality_pages import quality
from readme_pages import readme_table
from scale_pages import calibration_scale
from speed_pages import cpu_speed, cpu_summary
from trust_pages import any_input
from verdict_pages import verdict_summary

START, END = "<!-- results: written by bench/make_results.py -->", "<!-- end of results -->"
DTYPES = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: run python bench/make_results.py")
        else:
            path.write_text(pages()[path], encoding="utf-8")
    sys.exit(1 if check and stale else 0)


def pages() -> dict[Path, str]:
    """Path -> text of every page that shows figures."""
    training, methods, cost = (read(name) for name in ("fashion-dit-training", "ablation-cpu", "calibration-cpu"))
    readme, page, any_class = ROOT / "README.md", ROOT / "docs" / "quality.md", ROOT / "docs" / "models.md"
    gpu, scores = ROOT / "docs" / "gpu.md", ROOT / "docs" / "evaluation.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    return {
        ROOT / "docs" / "results.md": _results(training, methods, cost),
        ROOT / "docs" / "any-input.md": any_input(),
        page: quality(page.read_text(encoding="utf-8")),
        gpu: attention(gpu.read_text(encoding="utf-8")),
        scores: evaluation(scores.read_text(encoding="utf-8")),
        any_class: models(any_class.read_text(encoding="utf-8")),
        readme: "".join([before, START, "\n", readme_table(), "\n", END, after]),
    }


def _methods_summary(methods: dict[str, Any], cost: dict[str, Any]) -> str:
    rows = [["float32", "–", "1.000", "–", "–", f"{methods['float_fd_fashion'][0]:.2f}"]]
    rows += [
        [row["bits"].upper(), row["variant"], f"{row['size_ratio']:.3f}", f"{row['eps_sqnr_db']:.1f}",
         f"{row['psnr_db']:.1f}", f"{row['fd_fashion']:.2f}"]
        for row in methods["rows"]
    ]  # fmt: skip
    paper = next(run for run in cost["runs"] if run["preset"] == "paper" and run["bits"] == "w8a8")
    low, high = _spread()
    return (
        f"{table(['bits', 'method', 'size / fp32', 'ε SQNR (dB)', 'PSNR (dB)', 'FD-fashion'], rows)}\n\n"
        f"`fashion-dit` in integers; FD-fashion over {methods['settings']['images']} images, DDIM "
        f"{methods['settings']['steps']} steps, guidance {methods['settings']['guidance']}; the float model's own "
        f"spread over four seeds is {low:.2f} to {high:.2f}. Calibration with the published "
        f"settings takes {paper['calibration_seconds']:.0f} s and {paper['peak_memory_bytes'] / 2**30:.1f} GiB on "
        f"{paper['environment']['cores']} CPU cores. {_age(methods)}"
    )


def _age(run: dict[str, Any]) -> str:
    """Say of a run before `plus` had scales of rows that its rows `plus` are of the preset as it was then."""
    present = "input_grid" in run["settings"]["calibration"]
    return "" if present else "`plus` is the preset as it was before the parts of [quality.md](quality.md). "


def _spread() -> tuple[float, float]:
    """Least and largest FD-fashion of the float model over seeds, which say what differences mean."""
    floats = read("ablation")["float_fd_fashion"]
    return min(floats), max(floats)


def _results(training: dict[str, Any], methods: dict[str, Any], cost: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Results",
            "",
            "Written by `python bench/make_results.py` from the files in `bench/results/`; not edited by hand.",
            "",
            "The figures of `plus` on this page, quality and speed, are of the preset as it was before it had scales "
            "of rows, but for the first table; [quality.md](quality.md) has those of today, and the ratio of the times "
            "of both.",
            "",
            *_in_short(methods, cost),
            *_aims(methods, cost),
            *_training(training),
            *_methods(methods),
            *_ablation(read("ablation")),
            *_cost(cost),
            *_states(read("ablation-plus-cpu"), read("states-bfloat16-cpu")),
            *calibration_scale(),
            *full_size(),
            *architectures(),
            *cpu_speed(),
            *gpu_speed(),
        ]
    )


def _in_short(methods: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    """Return the most important figures of quality and speed."""
    parts = [
        verdict_summary(read("equivalence-h200")), _methods_summary(methods, cost), cpu_summary(), gpu_summary(),
    ]  # fmt: skip
    return ["## In short", "", *(line for part in parts for line in (part, ""))]


def _training(training: dict[str, Any]) -> list[str]:
    text = json.dumps(training, indent=1)
    return [
        "## The bundled model",
        "",
        "`examples/train_fashion_dit.py` trains `fashion-dit` and its classifier; with `--steps 0` it trained the "
        "classifier, measured the shipped transformer and wrote `bench/results/fashion-dit-training.json` "
        "(`class_agreement`: the classifier agrees with the class that was asked for):",
        "",
        "```json",
        text,
        "```",
        "",
    ]


def _methods(run: dict[str, Any]) -> list[str]:
    """Presets beside round-to-nearest, on a CPU."""
    header = ["method", "ε SQNR (dB)", "PSNR (dB)", "FD-fashion", "size / fp32"]
    lines = [
        "## Quality",
        "",
        f"`{_command(run)}` on {environment(run['environment'])}. {_how(run)}",
        "",
        f"FD-fashion of the float model, same seed: {run['float_fd_fashion'][0]:.3f}.",
        "",
    ]
    for bits in dict.fromkeys(row["bits"] for row in run["rows"]):
        rows = [
            [row["variant"], f"{row['eps_sqnr_db']:.2f}", f"{row['psnr_db']:.2f}", f"{row['fd_fashion']:.3f}",
             f"{row['size_ratio']:.3f}"]
            for row in run["rows"] if row["bits"] == bits
        ]  # fmt: skip
        lines += [f"### {bits.upper()}", "", table(header, rows), ""]
    return [*lines, "### ε SQNR (dB) by time group, W8A8", "", _by_group(run["rows"], "w8a8"), ""]


def _command(run: dict[str, Any]) -> str:
    """What writes the rows again."""
    variants, settings = dict.fromkeys(row["variant"] for row in run["rows"]), run["settings"]
    options = {"--num": settings["images"], "--steps": settings["steps"], "--seeds": len(run["float_fd_fashion"])}
    numbers = [str(part) for option in options.items() for part in option]
    return shlex.join(["python", "bench/ablation.py", "--variants", *variants, *numbers])


def _how(run: dict[str, Any]) -> str:
    settings = run["settings"]
    return (
        "Published calibration settings, every variant solved from the same records and run in integers. SQNR of ε "
        f"over {settings['held_out_per_group']} held-out states per time group; PSNR of images with the same seeds; "
        f"FD-fashion over {settings['images']} images, DDIM {settings['steps']} steps, guidance "
        f"{settings['guidance']}. {_age(run)}"
    ).strip()


def _ablation(run: dict[str, Any]) -> list[str]:
    """The ideas of the method one by one. `plus` has changed since, and is measured elsewhere."""
    floats, found = run["float_fd_fashion"], [row for row in run["rows"] if row["variant"] != "plus"]
    lines = [
        "## Ablation",
        "",
        f"`bench/ablation.py` on {environment(run['environment'])}. {_how(run)}",
        "",
        f"FD-fashion of the float model over {len(floats)} seeds: {', '.join(f'{fd:.3f}' for fd in floats)} "
        f"(standard deviation {statistics.stdev(floats):.3f}). Every row below uses the first seed: compare with "
        f"{floats[0]:.3f}.",
        "",
    ]
    header = ["variant", "ε SQNR (dB)", "PSNR (dB)", "FD-fashion", "calibration (s)", "GPU memory (GiB)", "size / fp32"]
    for bits in dict.fromkeys(row["bits"] for row in found):
        rows = [
            [row["variant"], f"{row['eps_sqnr_db']:.2f}", f"{row['psnr_db']:.2f}", f"{row['fd_fashion']:.3f}",
             f"{row['calibration_seconds']:.0f}", f"{row['peak_memory_bytes'] / 2**30:.1f}", f"{row['size_ratio']:.3f}"]
            for row in found if row["bits"] == bits
        ]  # fmt: skip
        lines += [f"### {bits.upper()}, idea by idea", "", table(header, rows), ""]
    lines += _products(read("ablation-plus-cpu"))
    lines += ["### ε SQNR (dB) by time group, W8A8, idea by idea", "", _by_group(found, "w8a8"), ""]
    notes = ROOT / "bench" / "ablation-notes.md"
    return [*lines, notes.read_text(encoding="utf-8").strip(), ""]


def _products(both: dict[str, Any]) -> list[str]:
    """`plus` beside what it was while it allowed two products."""
    rows = [
        [row["bits"].upper(), row["variant"], f"{row['eps_sqnr_db']:.2f}", f"{row['psnr_db']:.2f}",
         f"{row['size_ratio']:.3f}"]
        for row in both["rows"]
    ]  # fmt: skip
    return [
        "### `plus`: one product after GELU, or two",
        "",
        "`plus` allows one integer product after GELU: a uniform grid at 8 bits, below that the better of regions that "
        "merge and a uniform grid. The alternative is the better of MRQ and a uniform grid at any cost. Both solved "
        f"from the same records and run in integers on {environment(both['environment'])}; SQNR over the same held-out "
        f"states, PSNR over {both['settings']['images']} images, DDIM {both['settings']['steps']} steps. "
        f"{_age(both)}".strip(),
        "",
        table(["bits", "variant", "ε SQNR (dB)", "PSNR (dB)", "size / fp32"], rows),
        "",
        "ε SQNR (dB) by time group:",
        "",
        *(line for bits in ("w8a8", "w6a6") for line in (f"{bits.upper()}:", "", _by_group(both["rows"], bits), "")),
    ]


def _by_group(found: list[dict[str, Any]], bits: str) -> str:
    rows = [row for row in found if row["bits"] == bits]
    step = 1000 // len(rows[0]["eps_sqnr_db_by_group"])
    header = ["variant", *(f"t < {step * (g + 1)}" for g in range(1000 // step))]
    return table(header, [[r["variant"], *(f"{v:.1f}" for v in r["eps_sqnr_db_by_group"])] for r in rows])


def _aims(methods: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    """The aims of the first release beside what was measured."""
    rows = {(row["variant"], row["bits"]): row for row in methods["rows"]}
    paper, rounded = "paper (HO + MRQ + TGQ)", "round-to-nearest (min-max)"
    fd = rows[paper, "w8a8"]["fd_fashion"]
    gain = rows[paper, "w6a6"]["eps_sqnr_db"] - rows[rounded, "w6a6"]["eps_sqnr_db"]
    slowest = max(run["calibration_seconds"] for run in cost["runs"])
    memory = max(run["peak_memory_bytes"] for run in cost["runs"]) / 2**30
    low, high = _spread()

    def size(bits: str) -> float:
        return max(row["size_ratio"] for row in rows.values() if row["bits"] == bits)

    def met(condition: bool) -> str:
        return "yes" if condition else "no"

    aims = [
        ["FD-fashion of `paper` W8A8 within the float model's seeds", f"{low:.3f} to {high:.3f}",
         f"{fd:.3f}", met(fd <= high)],
        ["SQNR gain of `paper` W6A6 over round-to-nearest", "≥ 3 dB", f"{gain:.1f} dB", met(gain >= 3)],
        ["calibration, published settings, 2 CPU cores", "< 300 s", f"{slowest:.0f} s", met(slowest < 300)],
        ["its peak memory", "< 4 GiB", f"{memory:.2f} GiB", met(memory < 4)],
        *([f"artifact {bits.upper()}, of fp32", f"≤ {aim}", f"{size(bits):.3f}", met(size(bits) <= aim)]
          for bits, aim in (("w8a8", 0.27), ("w6a6", 0.21), ("w4a8", 0.15))),
    ]  # fmt: skip
    return ["## Aims", "", table(["aim", "target", "measured", "met"], aims), ""]


def _cost(cost: dict[str, Any]) -> list[str]:
    rows = [
        [f"{run['preset']} {run['bits'].upper()}", f"{run['calibration_seconds']:.0f}",
         f"{run['peak_memory_bytes'] / 2**30:.2f}", f"{run['size_bytes'] / 1e6:.2f}", f"{run['size_ratio']:.3f}"]
        for run in cost["runs"]
    ]  # fmt: skip
    return [
        "## Calibration cost on a CPU",
        "",
        f"`bench/calibration_cost.py`, each run a fresh process of `tqdit quantize` with published settings, on "
        f"{environment(cost['runs'][0]['environment'])}. Peak memory is the whole process, imports included.",
        "",
        table(["run", "calibration (s)", "peak memory (GiB)", "artifact (MB)", "size / fp32"], rows),
        "",
    ]


def _states(float32: dict[str, Any], bfloat16: dict[str, Any]) -> list[str]:
    """`plus` calibrated at states that were drawn in fp32 and in bf16."""
    before, now = ({r["bits"]: r for r in run["rows"] if r["variant"] == "plus"} for run in (float32, bfloat16))
    figures = ("eps_sqnr_db", "psnr_db")
    rows = [[bits.upper(), *(f"{run[bits][key]:.2f}" for key in figures for run in (before, now))] for bits in now]
    header = ["`plus`", *(f"{name}, states in {dtype}" for name in ("ε SQNR (dB)", "PSNR (dB)") for dtype in DTYPES)]
    notes = (ROOT / "bench" / "calibration-notes.md").read_text(encoding="utf-8").strip()
    how = f"`{_command(bfloat16)}`, on {environment(bfloat16['environment'])}. {_age(bfloat16)}".strip()
    return ["### States in bf16", "", how, "", table(header, rows), "", notes, ""]


if __name__ == "__main__":
    main()
