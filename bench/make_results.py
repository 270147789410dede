"""Write docs/results.md and the README's table from the committed result files; `--check` only compares.

python bench/make_results.py
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from full_size_pages import full_size
from gpu_pages import gpu_speed, readme_gpu_speed
from pages import FORMER_PLUS, ROOT, TWO_PRODUCTS, environment, read, table, variant
from scale_pages import calibration_scale
from speed_pages import cpu_speed, readme_speed

START, END = "<!-- results: written by bench/make_results.py -->", "<!-- end of results -->"


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
    training, ablation, cost = (read(name) for name in ("fashion-dit-training", "ablation", "calibration-cpu"))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    parts = [_readme_table(ablation, cost), readme_speed(), readme_gpu_speed()]
    return {
        ROOT / "docs" / "results.md": _results(training, ablation, cost),
        readme: "".join([before, START, "\n", "\n\n".join(parts), "\n", END, after]),
    }


def _readme_table(ablation: dict[str, Any], cost: dict[str, Any]) -> str:
    floats = ablation["float_fd_fashion"]
    wanted = ("round-to-nearest (min-max)", "paper (HO + MRQ + TGQ)", "plus")
    measured = {(row["bits"], row["variant"]) for row in ablation["rows"]}
    rows = [["float32", "–", "1.000", "–", "–", f"{floats[0]:.2f}"]]
    rows += [
        [row["bits"].upper(), variant(row, ablation), f"{row['size_ratio']:.3f}", f"{row['eps_sqnr_db']:.1f}",
         f"{row['psnr_db']:.1f}", f"{row['fd_fashion']:.2f}"]
        for row in ablation["rows"] if row["variant"] in wanted and (row["bits"], "plus") in measured
    ]  # fmt: skip
    methods = table(["bits", "method", "size / fp32", "ε SQNR (dB)", "PSNR (dB)", "FD-fashion"], rows)
    paper = next(run for run in cost["runs"] if run["preset"] == "paper" and run["bits"] == "w8a8")
    note = (
        f"`fashion-dit` in integers; FD-fashion over {ablation['settings']['images']} images, DDIM "
        f"{ablation['settings']['steps']} steps, guidance {ablation['settings']['guidance']}; the float model's own "
        f"spread over {len(floats)} seeds is {min(floats):.2f} to {max(floats):.2f}. Calibration with the published "
        f"settings takes {paper['calibration_seconds']:.0f} s and {paper['peak_memory_bytes'] / 2**30:.1f} GiB on "
        f"{paper['environment']['cores']} CPU cores. All figures: [docs/results.md](docs/results.md)."
    )
    return f"{methods}\n\n{note}\n\n{_readme_products(read('ablation-plus-cpu'))}"


def _readme_products(both: dict[str, Any]) -> str:
    """What `plus` gives now beside its former definition, in a sentence."""
    rows = {(row["variant"], row["bits"]): row for row in both["rows"]}
    changes = [
        f"{bits.upper()} {former['eps_sqnr_db']:.1f} → {rows['plus', bits]['eps_sqnr_db']:.1f} and "
        f"{former['psnr_db']:.1f} → {rows['plus', bits]['psnr_db']:.1f}"
        for (name, bits), former in rows.items()
        if name == FORMER_PLUS
    ]
    return (
        f"`{FORMER_PLUS}`: its definition when these rows were measured; now it allows one. Both from the same "
        f"calibration, ε SQNR (dB) and PSNR (dB) of {both['settings']['images']} images, two products → one: "
        f"{'; '.join(changes)}. FD-fashion was not measured again."
    )


def _results(training: dict[str, Any], ablation: dict[str, Any], cost: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Results",
            "",
            "Written by `python bench/make_results.py` from the files in `bench/results/`; not edited by hand.",
            "",
            *_aims(ablation, cost),
            *_training(training),
            *_ablation(ablation),
            *_cost(cost),
            *calibration_scale(),
            *full_size(),
            *cpu_speed(),
            *gpu_speed(),
        ]
    )


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


def _ablation(ablation: dict[str, Any]) -> list[str]:
    floats = ablation["float_fd_fashion"]
    spread = statistics.stdev(floats)
    settings = ablation["settings"]
    lines = [
        "## Ablation",
        "",
        f"`bench/ablation.py` on {environment(ablation['environment'])}. Published calibration settings, "
        f"every variant solved from the same records and run in integers. SQNR of ε over "
        f"{settings['held_out_per_group']} held-out states per time group; PSNR of images with the same seeds; "
        f"FD-fashion over {settings['images']} images, DDIM {settings['steps']} steps, guidance "
        f"{settings['guidance']}.",
        "",
        f"FD-fashion of the float model over {len(floats)} seeds: {', '.join(f'{fd:.3f}' for fd in floats)} "
        f"(standard deviation {spread:.3f}). Every row below uses the first seed: compare with {floats[0]:.3f}.",
        "",
    ]
    header = ["variant", "ε SQNR (dB)", "PSNR (dB)", "FD-fashion", "calibration (s)", "GPU memory (GiB)", "size / fp32"]
    for bits in dict.fromkeys(row["bits"] for row in ablation["rows"]):
        rows = [
            [variant(row, ablation), f"{row['eps_sqnr_db']:.2f}", f"{row['psnr_db']:.2f}", f"{row['fd_fashion']:.3f}",
             f"{row['calibration_seconds']:.0f}", f"{row['peak_memory_bytes'] / 2**30:.1f}", f"{row['size_ratio']:.3f}"]
            for row in ablation["rows"] if row["bits"] == bits
        ]  # fmt: skip
        lines += [f"### {bits.upper()}", "", table(header, rows), ""]
    lines += _w4a8_on_cpu(read("ablation-w4a8-cpu"))
    lines += _products(read("ablation-plus-cpu"))
    lines += ["### ε SQNR (dB) by time group, W8A8", "", _by_group(ablation, "w8a8"), ""]
    notes = ROOT / "bench" / "ablation-notes.md"
    return [*lines, notes.read_text(encoding="utf-8").strip(), ""]


def _w4a8_on_cpu(cpu: dict[str, Any]) -> list[str]:
    rows = [[variant(r, cpu), f"{r['eps_sqnr_db']:.2f}", f"{r['psnr_db']:.2f}"] for r in cpu["rows"]]
    return [
        "The GPU run ended before `paper` and `plus` at W4A8, so their FD-fashion was not measured. SQNR over the same "
        f"held-out states and PSNR over {cpu['settings']['images']} images, DDIM {cpu['settings']['steps']} steps, on "
        f"{environment(cpu['environment'])}, with one earlier row for comparison:",
        "",
        table(["variant", "ε SQNR (dB)", "PSNR (dB)"], rows),
        "",
    ]


def _products(both: dict[str, Any]) -> list[str]:
    """`plus` beside its former definition."""
    rows = [
        [row["bits"].upper(), row["variant"], f"{row['eps_sqnr_db']:.2f}", f"{row['psnr_db']:.2f}",
         f"{row['size_ratio']:.3f}"]
        for row in both["rows"]
    ]  # fmt: skip
    return [
        "### `plus`: one product after GELU, or two",
        "",
        "`plus` allows one integer product after GELU: a uniform grid at 8 bits, below that the better of regions that "
        f"merge and a uniform grid. Rows on this page that say *{TWO_PRODUCTS}* were measured before, when it took the "
        "better of MRQ and a uniform grid at any cost. Both definitions, solved from the same records and run in "
        f"integers on {environment(both['environment'])}; SQNR over the same held-out states, PSNR over "
        f"{both['settings']['images']} images, DDIM {both['settings']['steps']} steps. FD-fashion of so few images is "
        "not shown: with one product it was not measured. Nor are calibration times: the machine had other work.",
        "",
        table(["bits", "variant", "ε SQNR (dB)", "PSNR (dB)", "size / fp32"], rows),
        "",
        "ε SQNR (dB) by time group:",
        "",
        *(line for bits in ("w8a8", "w6a6") for line in (f"{bits.upper()}:", "", _by_group(both, bits), "")),
    ]


def _by_group(ablation: dict[str, Any], bits: str) -> str:
    rows = [row for row in ablation["rows"] if row["bits"] == bits]
    step = 1000 // len(rows[0]["eps_sqnr_db_by_group"])
    header = ["variant", *(f"t < {step * (g + 1)}" for g in range(1000 // step))]
    return table(header, [[variant(r, ablation), *(f"{v:.1f}" for v in r["eps_sqnr_db_by_group"])] for r in rows])


def _aims(ablation: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    """The aims of the first release beside what was measured."""
    floats, rows = ablation["float_fd_fashion"], {(r["variant"], r["bits"]): r for r in ablation["rows"]}
    paper = rows["paper (HO + MRQ + TGQ)", "w8a8"]
    gain = (
        rows["paper (HO + MRQ + TGQ)", "w6a6"]["eps_sqnr_db"]
        - rows["round-to-nearest (min-max)", "w6a6"]["eps_sqnr_db"]
    )
    runs = cost["runs"]
    slowest = max(run["calibration_seconds"] for run in runs)
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**30
    measured = [*ablation["rows"], *read("ablation-w4a8-cpu")["rows"], *read("ablation-plus-cpu")["rows"]]
    sizes = {bits: max(r["size_ratio"] for r in measured if r["bits"] == bits) for bits in ("w8a8", "w6a6", "w4a8")}

    def met(condition: bool) -> str:
        return "yes" if condition else "no"

    low, high = min(floats), max(floats)
    aims = [
        ["FD-fashion of `paper` W8A8 within the float model's seeds", f"{low:.3f} to {high:.3f}",
         f"{paper['fd_fashion']:.3f}", met(paper["fd_fashion"] <= high)],
        ["SQNR gain of `paper` W6A6 over round-to-nearest", "≥ 3 dB", f"{gain:.1f} dB", met(gain >= 3)],
        ["calibration, published settings, 2 CPU cores", "< 300 s", f"{slowest:.0f} s", met(slowest < 300)],
        ["its peak memory", "< 4 GiB", f"{memory:.2f} GiB", met(memory < 4)],
        *([f"artifact {bits.upper()}, of fp32", f"≤ {aim}", f"{sizes[bits]:.3f}", met(sizes[bits] <= aim)]
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
        f"{environment(cost['runs'][0]['environment'])}. Peak memory is the whole process, imports included. "
        f"The run of `plus` also tried {TWO_PRODUCTS}, which `plus` no longer does.",
        "",
        table(["run", "calibration (s)", "peak memory (GiB)", "artifact (MB)", "size / fp32"], rows),
        "",
    ]


if __name__ == "__main__":
    main()
