"""Write docs/results.md and the README's table from the committed result files; `--check` only compares.

python bench/make_results.py
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
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
    training, ablation, cost = (_read(name) for name in ("fashion-dit-training", "ablation", "calibration-cpu"))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    return {
        ROOT / "docs" / "results.md": _results(training, ablation, cost),
        readme: f"{before}{START}\n{_readme_table(ablation, cost)}\n{END}{after}",
    }


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _environment(row: dict[str, Any]) -> str:
    keys = ("device", "cpu", "cores", "threads", "python", "torch", "diffusers", "tqdit")
    return ", ".join(f"{key} {row[key]}" for key in keys if key in row)


def _readme_table(ablation: dict[str, Any], cost: dict[str, Any]) -> str:
    floats = ablation["float_fd_fashion"]
    wanted = ("round-to-nearest (min-max)", "paper (HO + MRQ + TGQ)", "plus")
    rows = [["float32", "–", "1.000", "–", "–", f"{floats[0]:.2f}"]]
    rows += [
        [row["bits"].upper(), row["variant"], f"{row['size_ratio']:.3f}", f"{row['eps_sqnr_db']:.1f}",
         f"{row['psnr_db']:.1f}", f"{row['fd_fashion']:.2f}"]
        for row in ablation["rows"] if row["variant"] in wanted
    ]  # fmt: skip
    table = _table(["bits", "method", "size / fp32", "ε SQNR (dB)", "PSNR (dB)", "FD-fashion"], rows)
    paper = next(run for run in cost["runs"] if run["preset"] == "paper" and run["bits"] == "w8a8")
    note = (
        f"`fashion-dit` in integers; FD-fashion over {ablation['settings']['images']} images, DDIM "
        f"{ablation['settings']['steps']} steps, guidance {ablation['settings']['guidance']}; the float model's own "
        f"spread over {len(floats)} seeds is {min(floats):.2f} to {max(floats):.2f}. Calibration with the published "
        f"settings takes {paper['calibration_seconds']:.0f} s and {paper['peak_memory_bytes'] / 2**30:.1f} GiB on "
        f"{paper['environment']['cores']} CPU cores. All figures: [docs/results.md](docs/results.md)."
    )
    return f"{table}\n\n{note}"


def _results(training: dict[str, Any], ablation: dict[str, Any], cost: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Results",
            "",
            "Written by `python bench/make_results.py` from the files in `bench/results/`; not edited by hand.",
            "",
            *_training(training),
            *_ablation(ablation),
            *_cost(cost),
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
        f"`bench/ablation.py` on {_environment(ablation['environment'])}. Published calibration settings, "
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
            [row["variant"], f"{row['eps_sqnr_db']:.2f}", f"{row['psnr_db']:.2f}", f"{row['fd_fashion']:.3f}",
             f"{row['calibration_seconds']:.0f}", f"{row['peak_memory_bytes'] / 2**30:.1f}", f"{row['size_ratio']:.3f}"]
            for row in ablation["rows"] if row["bits"] == bits
        ]  # fmt: skip
        lines += [f"### {bits.upper()}", "", _table(header, rows), ""]
    notes = ROOT / "bench" / "ablation-notes.md"
    return [*lines, notes.read_text(encoding="utf-8").strip(), ""]


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
        f"{_environment(cost['runs'][0]['environment'])}. Peak memory is the whole process, imports included.",
        "",
        _table(["run", "calibration (s)", "peak memory (GiB)", "artifact (MB)", "size / fp32"], rows),
        "",
    ]


if __name__ == "__main__":
    main()
