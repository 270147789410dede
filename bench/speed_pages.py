"""The part of the result pages that is about speed."""

from typing import Any

from pages import ROOT, environment, read, table

# Result file -> the least speed-up asked for over each family, for the preset that is compared.
CPU_RUNS: dict[str, dict[str, float]] = {
    "cpu-dit-xl-2": {"float32": 4.0, "bfloat16": 1.7, "torchao": 1.4},
    "cpu-fashion-dit": {"float32": 3.0, "bfloat16": 1.4, "torchao": 1.3},
}
AMX_TARGET = 1.8  # over compiled bf16
MOST_RESIDENT, MOST_LOAD_SECONDS = 0.8e9, 3.0  # of DiT-XL/2 W8A8


def cpu_speed() -> list[str]:
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
        run = read(name)
        where = run["environment"]
        lines += [
            f"`{run['command']}`",
            "",
            f"on {environment(where)}, torchao {where['torchao']}; int8 peak {where['int8_peak_gops']:.0f} GOPS, "
            f"reads {where['read_gb_per_s']:.0f} GB/s.",
            "",
            table(
                ["model", "runs in", "ms p20", "p50", "p80", *(f"× {family}" for family in targets), "images/s",
                 "peak MB", "loaded MB", "load s", "of floor"],
                [_speed_row(row, list(targets)) for row in run["rows"]],
            ),
            "",
            *(f"- not measured: {what}: {why}" for what, why in run["skipped"].items()),
            table(["aim", "target", "measured", "met"], [*_speed_aims(run, targets), *_loading_aims(run)]),
            "",
        ]  # fmt: skip
    lines += [
        "### The same on 16 cores with AMX",
        "",
        *_amx(),
        "### By operation",
        "",
        *_breakdown(),
    ]
    return [*lines, (ROOT / "bench" / "cpu-notes.md").read_text(encoding="utf-8").strip(), ""]


def _amx() -> list[str]:
    """A processor whose float units have int8 and bf16 tiles: a race, and an earlier run."""
    now, run = read("cpu-amx"), read("cpu-dit-xl-2-amx")
    found = amx_speedup()
    rows = [
        [row["name"], str(row["threads"]), *(f"{row[f'p{p}_ms']:.0f}" for p in (20, 50, 80)),
         f"{row['speedup_over_bf16_compiled']:.2f}"]
        for row in now["race"]
    ]  # fmt: skip
    met = "yes" if found >= AMX_TARGET else "no"
    aim = ["amx-int8 over bf16-compiled", f"≥ {AMX_TARGET}×", f"{found:.2f}×", met]
    families = ["bfloat16", "torchao"]
    header = ["model", "runs in", "ms p20", "p50", "p80", *(f"× {family}" for family in families), "images/s",
              "peak MB", "loaded MB", "load s", "of floor"]  # fmt: skip
    where = run["environment"]
    return [
        f"`{now['command']}`, {now['model']}, all contenders in turn, on {environment(now['environment'])}:",
        "",
        table(["instructions", "threads", "ms p20", "p50", "p80", "× bf16-compiled"], rows),
        "",
        table(["aim", "target", "measured", "met"], [aim]),
        "",
        "An earlier run, before there were kernels for AMX, has torchao's int8 as well: "
        f"`{run['command']}` on {environment(where)}, torchao {where['torchao']}; int8 peak "
        f"{where['int8_peak_gops']:.0f} GOPS (AMX).",
        "",
        table(header, [_speed_row(row, families) for row in run["rows"]]),
        "",
    ]


def amx_speedup() -> float:
    """Return how many times as fast as compiled bf16 the kernels of AMX are."""
    return next(row["speedup_over_bf16_compiled"] for row in read("cpu-amx")["race"] if row["name"] == "amx-int8")


def _breakdown() -> list[str]:
    """Milliseconds of one call by operation, for each way of running it."""
    run = read("cpu-breakdown")
    lines = [
        f"`{run['command']}` on {environment(run['environment'])}; mean ms of one call (10⁹ operations/s). The "
        "models are `plus` W8A8.",
        "",
    ]
    for shape in dict.fromkeys(row["shape"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["shape"] == shape]
        names = sorted(rows[0]["operations"], key=lambda name: -rows[0]["operations"][name]["ms"])
        cells = [["whole call (median)", *(f"{row['p50_ms']:.1f}" for row in rows)]]
        cells += [[name, *(_operation(row["operations"].get(name)) for row in rows)] for name in names]
        lines += [table([f"{shape}, batch {rows[0]['batch']}", *(row["way"] for row in rows)], cells), ""]
    return lines


def _loading_aims(run: dict[str, Any]) -> list[list[str]]:
    """Of the model that has aims: memory after loading, and the time of it with the file in the page cache."""
    aims = []
    for row in (row for row in run["rows"] if row["integer"] and row["model"] == "DiT-XL/2"):
        name = f"{row['preset']} {row['bits'].upper()}"
        resident, seconds = row["resident_bytes"], row["load_seconds"]
        aims.append([f"{name} resident after loading", f"≤ {MOST_RESIDENT / 1e9} GB", f"{resident / 1e9:.2f} GB",
                     "yes" if resident <= MOST_RESIDENT else "no"])  # fmt: skip
        aims.append([f"{name} load from page cache", f"< {MOST_LOAD_SECONDS:.0f} s", f"{seconds:.1f} s",
                     "yes" if seconds < MOST_LOAD_SECONDS else "no"])  # fmt: skip
    return aims


def _operation(found: dict[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{found['ms']:.1f}" + (f" ({found['gops']:.0f})" if "gops" in found else "")


def _speed_row(row: dict[str, Any], families: list[str]) -> list[str]:
    def cell(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "–" if value is None else f"{value * factor:.{digits}f}"

    model = f"{row['model']} {row['bits'].upper()} {row['preset']}" if row["integer"] else row["model"]
    return [
        model, row["backend"], *(cell(row[f"p{p}_ms"], 1) for p in (20, 50, 80)),
        *(cell(row["speedup_over"].get(family), 2) for family in families), cell(row["images_per_second"], 3),
        cell(row["peak_bytes"], 0, 1e-6), cell(row["resident_bytes"], 0, 1e-6), cell(row["load_seconds"], 1),
        cell(row["floor_fraction"], 2),
    ]  # fmt: skip


def _speed_aims(run: dict[str, Any], targets: dict[str, float]) -> list[list[str]]:
    aims = []
    for row in (row for row in run["rows"] if row["integer"]):
        name = f"{row['preset']} {row['bits'].upper()}"
        for family, target in targets.items():
            found = row["speedup_over"].get(family)
            shown, met = "–" if found is None else f"{found:.3f}×", "yes" if found and found >= target else "no"
            aims.append([f"{name} over {family}", f"≥ {target}×", shown, met])
    return aims


def cpu_summary() -> str:
    """Return the table of how much faster a call is on a CPU."""
    rows = []
    for name, targets in CPU_RUNS.items():
        run = read(name)
        for row in (row for row in run["rows"] if row["integer"]):
            rows.append([
                f"{row['model']} {row['bits'].upper()} `{row['preset']}`",
                str(row["batch"]), f"{row['p50_ms']:.0f}",
                *(f"{found:.1f}×" if (found := row["speedup_over"].get(family)) else "–" for family in targets),
            ])  # fmt: skip
    where = read("cpu-dit-xl-2")["environment"]
    speeds = table(["on a CPU", "batch", "ms a call", "over float32", "over bfloat16", "over torchao int8"], rows)
    return (
        f"{speeds}\n\nMedians of one interleaved run on {where['cores']} cores of an {where['cpu']} processor with "
        "AVX-512 VNNI. float32 and bfloat16: the better of eager and `torch.compile`; torchao: int8 dynamic, compiled. "
        f"On 16 cores with AMX W8A8 is {amx_speedup():.1f} times as fast as bf16: "
        "[below](#the-same-on-16-cores-with-amx)."
    )
