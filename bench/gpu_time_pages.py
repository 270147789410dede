"""The part of the result pages about what takes time on a GPU: in a call, in a kernel, and in the first call."""

from typing import Any

from pages import environment, read, table

FIRST_CALL = {False: 2.0, True: 10.0}  # seconds at most; whether the GPU is unknown
GROUPS = {  # words in the names of kernels -> what they do
    "hopper_linear": "linear layers of blocks", "attention": "attention", "norm_quantize": "LayerNorm and codes",
    "float_input": "adaLN of all blocks", "activated": "embedders", "few_rows": "embedders", "unembed": "last layer",
    "poison": "last layer", "embed": "patch embedding",
}  # fmt: skip


def gpu_time() -> list[str]:
    """Return the section about what takes the time of a call, and of the first one."""
    profile = read("profile-h200")
    return [
        "### Where the time goes",
        "",
        "`python bench/gpu_profile.py bench/results/profile-h200.json --presets plus` shows where the time of a call "
        "goes, by kernels, in ms. Some kernels start before their predecessors end at 2 samples, and wait; the wait "
        "is in their times.",
        "",
        _profile(profile["rows"]),
        "",
        *_power(profile["rows"]),
        "",
        *_counters(),
        "",
        *_first_calls(),
        "",
    ]


def _counters() -> list[str]:
    """Return the part about hardware counters of kernels."""
    run = read("counters-h200")
    rows = [
        [row["kernel"], f"{row['us']:.0f}", f"{row['clock_ghz']:.2f}", f"{row['issue']:.0f}",
         f"{row['busiest'][0]} {row['busiest'][1]:.0f}", f"{row['memory_busy']:.0f}"]
        for row in run["rows"]
    ]  # fmt: skip
    return [
        f"`{run['command']}` reads hardware counters of kernels alone, 64 samples of 256 tokens unless their names say "
        "otherwise: the clock, and in % of the cycles how often a scheduler issues, how much the busiest pipeline "
        "does, and how busy the memory units are.",
        "",
        table(["kernel", "µs", "GHz", "issue", "busiest", "memory"], rows),
    ]


def _first_calls() -> list[str]:
    """Return the part about the seconds of a first call."""
    run = read("first-call-h200")
    rows = [
        [row["case"], str(row["batch"]), str(row["compiled"]), str(row["timed"]),
         *(f"{row[key]:.2f}" for key in ("convert_seconds", "first_seconds")), *_first_aim(row)]
        for row in run["rows"]
    ]  # fmt: skip
    return [
        "#### The first call",
        "",
        f"`{run['command']}`: a {run['model']} in processes of their own. Folders for kernels are empty at first. "
        "`committed`: the committed configurations, so no kernel is timed, but all are compiled; `again`: the same "
        "folders; `another batch`: the same folders and half of the samples; `unknown`: no committed configurations, "
        "so a few candidates are timed. `compiled` and `timed` count kernels. Cases that are missing were not "
        "measured; on "
        f"{environment(run['environment'])}.",
        "",
        table(["case", "samples", "compiled", "timed", "converting (s)", "first call (s)", "target (s)", "met"], rows),
    ]


def _first_aim(row: dict[str, Any]) -> list[str]:
    target = FIRST_CALL[row["case"].startswith("unknown")]
    return [f"≤ {target:.0f}", "yes" if row["first_seconds"] <= target else "no"]


def _profile(rows: list[dict[str, Any]]) -> str:
    """Return the table of a profile: milliseconds of each group of kernels, and of a whole call."""
    sums = {row["workload"]: grouped(row["kernels"]) for row in rows}
    names = list(dict.fromkeys(name for found in sums.values() for name in found))
    cells = [[row["workload"], *(f"{sums[row['workload']].get(name, 0.0):.2f}" for name in names), f"{row['ms']:.2f}"]
             for row in rows]  # fmt: skip
    return table(["workload", *names, "a call"], cells)


def grouped(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Return the milliseconds of kernels by what they do, the longest first."""
    sums: dict[str, float] = {}
    for kernel in kernels:
        name = next((said for word, said in GROUPS.items() if word in kernel["name"]), "other")
        sums[name] = sums.get(name, 0.0) + kernel["us"] / 1e3
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _power(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence about the clocks and the power at which calls follow each other."""
    said = ", ".join(f"{row['clock_mhz']:.0f} MHz and {row['watts']:.0f} W ({row['workload']})" for row in rows)
    return [
        f"While calls follow each other the GPU runs at {said}. Its limits are 1,980 MHz and 700 W: many samples are "
        "bound by power, so overlapping their kernels gains nothing."
    ]
