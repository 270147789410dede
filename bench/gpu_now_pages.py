"""The part of the result pages about today's kernels on a GPU: calls beside compiled bf16, and what takes time."""

from typing import Any

from pages import environment, read, table

# (workload, preset) -> the least speed-up asked for over compiled bf16, W8A8
TARGETS = {
    ("256-b64", "plus"): 1.9, ("256-b64", "paper"): 1.5, ("256-b2", "plus"): 1.9, ("256-b2", "paper"): 1.6,
    ("512-b16", "plus"): 1.8, ("512-b16", "paper"): 1.5,
}  # fmt: skip
GROUPS = {  # words in the names of kernels -> what they do
    "hopper_linear": "linear layers of blocks", "attention": "attention", "norm_quantize": "LayerNorm and codes",
    "float_input": "adaLN of all blocks", "activated": "embedders", "few_rows": "embedders", "unembed": "last layer",
    "poison": "last layer", "embed": "patch embedding",
}  # fmt: skip


def gpu_now() -> list[str]:
    """Return the section of the page."""
    run, earlier, profile = read("speed-h200"), read("h200"), read("profile-h200")
    tuned = {row["workload"]: row["p50_ms"] for row in earlier["rows"] if row["backend"] == "bf16-compiled"}
    rows = [_row(run["rows"], workload, preset, target) for (workload, preset), target in TARGETS.items()]
    return [
        "### Today's kernels",
        "",
        "W8A8 of `plus` with scales of rows, and of `paper`, in one run with bf16 compiled by torch.compile in its "
        "default mode and captured as a CUDA graph. The commands are in `bench/results/speed-h200.json`; on "
        f"{environment(run['environment'])}. In the earlier run above, where every kernel of bf16 was tuned "
        "(max-autotune), bf16 took " + ", ".join(f"{tuned[w]:.1f} ms ({w})" for w in _workloads(rows)) + ".",
        "",
        table(["workload", "preset", "ms p50", "bf16 ms", "× bf16", "target", "met"], rows),
        "",
        "`python bench/gpu_profile.py bench/results/profile-h200.json --presets plus` shows where the time of a call "
        "goes, by kernels, in ms. Some kernels start before their predecessors end at 2 samples, and wait; the wait "
        "is in their times.",
        "",
        _profile(profile["rows"]),
        "",
        *_power(profile["rows"]),
        "",
        *_first_calls(),
        "",
    ]


def _first_calls() -> list[str]:
    """Return the part about the seconds of a first call."""
    run = read("first-call-h200")
    rows = [
        [row["case"], str(row["batch"]), *(f"{row[key]:.2f}" for key in ("convert_seconds", "first_seconds"))]
        for row in run["rows"]
    ]
    return [
        "#### The first call",
        "",
        f"`{run['command']}`: a {run['model']} in processes of their own. Folders for kernels are empty at first. "
        "`committed`: the committed configurations, which have none for this model, so a few candidates are timed; "
        "`again`: the same folders; `another batch`: the same folders and half of the samples; `unknown`: no committed "
        f"configurations. Cases that are missing were not measured; on {environment(run['environment'])}.",
        "",
        table(["case", "samples", "converting (s)", "first call (s)"], rows),
    ]


def _workloads(rows: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(row[0] for row in rows))


def _row(rows: list[dict[str, Any]], workload: str, preset: str, target: float) -> list[str]:
    of_it = [row for row in rows if row["workload"] == workload]
    ours = next(row["p50_ms"] for row in of_it if row.get("preset") == preset)
    bf16 = next(row["p50_ms"] for row in of_it if row["backend"] == "bf16-compiled")
    return [workload, preset, f"{ours:.2f}", f"{bf16:.2f}", f"{bf16 / ours:.2f}", f"{target}",
            "yes" if bf16 / ours >= target else "no"]  # fmt: skip


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
