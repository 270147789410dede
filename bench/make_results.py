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
        readme: f"{before}{START}\n{_readme_table(ablation, cost)}\n\n{_readme_speed()}\n{END}{after}",
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
    measured = {(row["bits"], row["variant"]) for row in ablation["rows"]}
    rows = [["float32", "–", "1.000", "–", "–", f"{floats[0]:.2f}"]]
    rows += [
        [row["bits"].upper(), row["variant"], f"{row['size_ratio']:.3f}", f"{row['eps_sqnr_db']:.1f}",
         f"{row['psnr_db']:.1f}", f"{row['fd_fashion']:.2f}"]
        for row in ablation["rows"] if row["variant"] in wanted and (row["bits"], "plus") in measured
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
            *_aims(ablation, cost),
            *_training(training),
            *_ablation(ablation),
            *_cost(cost),
            *_cpu_speed(),
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
    lines += _w4a8_on_cpu(_read("ablation-w4a8-cpu"))
    lines += ["### ε SQNR (dB) by time group, W8A8", "", _by_group(ablation, "w8a8"), ""]
    notes = ROOT / "bench" / "ablation-notes.md"
    return [*lines, notes.read_text(encoding="utf-8").strip(), ""]


def _w4a8_on_cpu(cpu: dict[str, Any]) -> list[str]:
    rows = [[r["variant"], f"{r['eps_sqnr_db']:.2f}", f"{r['psnr_db']:.2f}"] for r in cpu["rows"]]
    return [
        "The GPU run ended before `paper` and `plus` at W4A8, so their FD-fashion was not measured. SQNR over the same "
        f"held-out states and PSNR over {cpu['settings']['images']} images, DDIM {cpu['settings']['steps']} steps, on "
        f"{_environment(cpu['environment'])}, with one earlier row for comparison:",
        "",
        _table(["variant", "ε SQNR (dB)", "PSNR (dB)"], rows),
        "",
    ]


def _by_group(ablation: dict[str, Any], bits: str) -> str:
    rows = [row for row in ablation["rows"] if row["bits"] == bits]
    step = 1000 // len(rows[0]["eps_sqnr_db_by_group"])
    header = ["variant", *(f"t < {step * (g + 1)}" for g in range(1000 // step))]
    return _table(header, [[row["variant"], *(f"{v:.1f}" for v in row["eps_sqnr_db_by_group"])] for row in rows])


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
    measured = [*ablation["rows"], *_read("ablation-w4a8-cpu")["rows"]]
    sizes = {bits: max(r["size_ratio"] for r in measured if r["bits"] == bits) for bits in ("w8a8", "w6a6", "w4a8")}

    def met(condition: bool) -> str:
        return "yes" if condition else "no"

    low, high = min(floats), max(floats)
    table = [
        ["FD-fashion of `paper` W8A8 within the float model's seeds", f"{low:.3f} to {high:.3f}",
         f"{paper['fd_fashion']:.3f}", met(paper["fd_fashion"] <= high)],
        ["SQNR gain of `paper` W6A6 over round-to-nearest", "≥ 3 dB", f"{gain:.1f} dB", met(gain >= 3)],
        ["calibration, published settings, 2 CPU cores", "< 300 s", f"{slowest:.0f} s", met(slowest < 300)],
        ["its peak memory", "< 4 GiB", f"{memory:.2f} GiB", met(memory < 4)],
        *([f"artifact {bits.upper()}, of fp32", f"≤ {aim}", f"{sizes[bits]:.3f}", met(sizes[bits] <= aim)]
          for bits, aim in (("w8a8", 0.27), ("w6a6", 0.21), ("w4a8", 0.15))),
    ]  # fmt: skip
    return ["## Aims", "", _table(["aim", "target", "measured", "met"], table), ""]


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


# Result file -> the least speed-up asked for over each family, for the preset that is compared.
CPU_RUNS = {
    "cpu-dit-xl-2": {"float32": 4.0, "bfloat16": 1.7, "torchao": 1.4},
    "cpu-fashion-dit": {"float32": 3.0, "bfloat16": 1.4, "torchao": 1.3},
}
MOST_RESIDENT, MOST_LOAD_SECONDS = 0.8e9, 3.0  # of DiT-XL/2 W8A8


def _cpu_speed() -> list[str]:
    lines = [
        "## Speed on a CPU",
        "",
        "Milliseconds of one denoiser call, every contender timed in turn within one run (`tqdit bench`), and full "
        "sampling runs; baselines have random weights in the same shape and share one embedder. Bytes are above the "
        "imports, each in a process of its own; `of floor`: the integer products and the reading of the other weights "
        "at this machine's peaks, measured in the same run, over the median. How it works: [cpu.md](cpu.md).",
        "",
    ]
    for name, targets in CPU_RUNS.items():
        run = _read(name)
        where = run["environment"]
        lines += [
            f"`{run['command']}`",
            "",
            f"on {_environment(where)}, torchao {where['torchao']}; int8 peak {where['int8_peak_gops']:.0f} GOPS, "
            f"reads {where['read_gb_per_s']:.0f} GB/s.",
            "",
            _table(
                ["model", "runs in", "ms p20", "p50", "p80", *(f"× {family}" for family in targets), "images/s",
                 "× float32", "× bfloat16", "× torchao", "peak MB", "loaded MB", "load s", "of floor"],
                [_speed_row(row, run["rows"], targets) for row in run["rows"]],
            ),
            "",
            *(f"- not measured: {what}: {why}" for what, why in run["skipped"].items()),
            _table(["aim", "target", "measured", "met"], _speed_aims(run, targets)),
            "",
        ]  # fmt: skip
    return [*lines, (ROOT / "bench" / "cpu-notes.md").read_text(encoding="utf-8").strip(), ""]


def _speed_row(row: dict[str, Any], rows: list[dict[str, Any]], families: dict[str, float]) -> list[str]:
    def cell(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "–" if value is None else f"{value * factor:.{digits}f}"

    model = f"{row['model']} {row['bits'].upper()} {row['preset']}" if row["integer"] else row["model"]
    ours = [cell(row["speedup_over"].get(family), 2) for family in families]
    sampling = [cell(_sampling_ratio(row, rows, family), 2) for family in families]
    return [
        model, row["backend"], *(cell(row[f"p{p}_ms"], 1) for p in (20, 50, 80)), *ours,
        cell(row["images_per_second"], 3), *sampling, cell(row["peak_bytes"], 0, 1e-6),
        cell(row["resident_bytes"], 0, 1e-6), cell(row["load_seconds"], 1), cell(row["floor_fraction"], 2),
    ]  # fmt: skip


def _sampling_ratio(row: dict[str, Any], rows: list[dict[str, Any]], family: str) -> float | None:
    """Images per second over those of a family's fastest member."""
    rates = [r["images_per_second"] for r in rows if r["backend"].startswith(f"{family}-") and r["images_per_second"]]
    return row["images_per_second"] / max(rates) if row["integer"] and rates and row["images_per_second"] else None


def _speed_aims(run: dict[str, Any], targets: dict[str, float]) -> list[list[str]]:
    aims = []
    for row in (row for row in run["rows"] if row["integer"]):
        name = f"{row['preset']} {row['bits'].upper()}"
        for family, target in targets.items():
            found = row["speedup_over"].get(family)
            shown = "–" if found is None else f"{found:.2f}×"
            aims.append([f"{name} over {family}", f"≥ {target}×", shown, "yes" if found and found >= target else "no"])
        if "XL" in row["model"] and row["bits"] == "w8a8":
            resident, seconds = row["resident_bytes"], row["load_seconds"]
            aims.append([f"{name} resident after loading", f"≤ {MOST_RESIDENT / 1e9} GB", f"{resident / 1e9:.2f} GB",
                         "yes" if resident <= MOST_RESIDENT else "no"])  # fmt: skip
            aims.append([f"{name} load from page cache", f"< {MOST_LOAD_SECONDS:.0f} s", f"{seconds:.1f} s",
                         "yes" if seconds < MOST_LOAD_SECONDS else "no"])  # fmt: skip
    return aims


def _readme_speed() -> str:
    """What the README says about speed."""
    rows = []
    for name, targets in CPU_RUNS.items():
        run = _read(name)
        for row in (row for row in run["rows"] if row["integer"]):
            rows.append([
                f"{row['model']} {row['bits'].upper()} `{row['preset']}`", str(row["batch"]), f"{row['p50_ms']:.0f}",
                *(f"{row['speedup_over'][family]:.1f}×" for family in targets),
            ])  # fmt: skip
    where = _read("cpu-dit-xl-2")["environment"]
    table = _table(["on a CPU", "batch", "ms a call", "over float32", "over bfloat16", "over torchao int8"], rows)
    return (
        f"{table}\n\nMedians of one interleaved run on {where['cores']} cores of an {where['cpu']} processor with "
        "AVX-512 VNNI; each baseline is the better of eager and `torch.compile`."
    )


if __name__ == "__main__":
    main()
