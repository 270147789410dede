"""The section on what large models cost: calibration, from every `calibration-scale-*.json`, and several processes."""

from typing import Any

from pages import RESULTS, environment, read, table

SETTINGS = ("groups", "samples", "trajectories", "steps", "rounds", "candidates", "rows", "queries")
GIB = 2**30
MOST_SECONDS, MOST_GIB = 60, 16  # of DiT-XL/2 with published settings on one H200


def calibration_scale() -> list[str]:
    lines = ["## Calibration at the size of DiT-XL/2", ""]
    runs = [read(path.stem) for path in sorted(RESULTS.glob("calibration-scale-*.json"))]
    for run in runs:
        lines += [*_run(run), *scaling(run, runs)]
    for path in sorted(RESULTS.glob("distributed-*.json")):
        lines += sampling(read(path.stem))
    return lines


def sampling(run: dict[str, Any]) -> list[str]:
    """Images per second of one process and of several, as `bench/distributed.py` wrote them."""
    same = "the same pixels" if len({row["sha256"] for row in run["rows"]}) == 1 else "**other pixels**"
    settings = run["settings"]
    return [
        f"`{run['command']}`: {run['model']}, {settings['steps']} steps, guidance {settings['guidance']}, batches of "
        f"{settings['batch']} images, on {environment(run['environment'])}; {same} for every number of processes.",
        "",
        table(["processes", "exchange", "images/s", "of perfect scaling"],
              [[str(row["processes"]), row["exchange"], f"{row['images_per_second']:.3g}", f"{row['scaling']:.3f}"]
               for row in run["rows"]]),
        "",
    ]  # fmt: skip


def scaling(run: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """How much faster several processes were than one on such a machine, if one was measured; nothing for one alone."""
    if run.get("processes", 1) == 1:
        return []
    alone = [other for other in runs if other.get("processes", 1) == 1 and _conditions(other) == _conditions(run)]
    if not alone:
        return ["One process was not measured on such a machine.", ""]
    before, now = ({name: row["seconds"] for name, row in r["stages"].items()} for r in (alone[0], run))
    ratios = ", ".join(f"{name} {before[name] / now[name]:.2f}×" for name in now)
    found = "the same" if alone[0].get("solution_sha256") == run["solution_sha256"] else "**another**"
    return [
        f"{run['processes']} processes ({run['exchange']}) take {sum(now.values()):.0f} s where one takes "
        f"{sum(before.values()):.0f} s: {sum(before.values()) / sum(now.values()):.2f}× as fast ({ratios}), and choose "
        f"{found} scales and codes.{_beyond(before, now, run['processes'])}",
        "",
    ]


def _beyond(before: dict[str, float], now: dict[str, float], processes: int) -> str:
    """Return a sentence where some stage is faster than sharing alone can make it, else nothing."""
    if all(before[name] <= processes * now[name] for name in now):
        return ""
    return f" More than {processes}× is not from sharing: a later run finds the search's kernels compiled."


def _conditions(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return what must be equal in two runs for a comparison.

    Processes share the machine's threads as they like. A process on a GPU needs few cores, whatever the machine has.
    """
    left_out = ("threads",) if run["environment"]["device"] == "cpu" else ("threads", "cores")
    where = {key: value for key, value in run["environment"].items() if key not in left_out}
    return where, run["shape"], run["blocks"], run["recipe"], run["work_folder"]


def _run(run: dict[str, Any]) -> list[str]:
    """One run beside what it is extrapolated to."""
    rows = [_measured(run)]
    rows += [_extrapolated(name, case) for name, case in run["extrapolated"].items() if _differs(run, case)]
    header = ["run", "blocks", *SETTINGS, "trajectories (s)", "statistics (s)", "search (s)", "peak memory (GiB)"]
    header = [*header, "peak GPU memory (GiB)"]
    return [
        f"`{run['command']}`, {run['shape']} with random weights, `{run['recipe']['preset']}` at "
        f"W{run['recipe']['weight_bits']}A{run['recipe']['activation_bits']}, on {environment(run['environment'])}"
        f"{', records on disk' if run['work_folder'] else ''}. Peak memory is the whole process"
        f"{_of_several(run)}. Rows in italics are extrapolated, not measured: seconds in proportion to the operations "
        "of the matmuls, as if no search ended early; memory by what weights, codes, records and one forward and "
        "backward pass take more.",
        "",
        table(header, rows),
        "",
        *_aims(run),
    ]


def _aims(run: dict[str, Any]) -> list[str]:
    """Those of a whole calibration on one GPU."""
    stages = run["stages"].values()
    where = run["environment"]["device"], run["shape"], run.get("processes", 1)
    if where != ("NVIDIA H200", "DiT-XL/2", 1) or any(_differs(run, case) for case in run["extrapolated"].values()):
        return []
    seconds = sum(row["seconds"] for row in stages)
    memory = max(row["peak_gpu_reserved_bytes"] for row in stages) / GIB
    process = max(row["peak_rss_bytes"] for row in stages) / GIB
    rows = [
        ["trajectories, statistics and search", f"≤ {MOST_SECONDS} s", f"{seconds:.0f} s", seconds <= MOST_SECONDS],
        ["GPU memory, reserved", f"≤ {MOST_GIB} GiB", f"{memory:.1f} GiB", memory <= MOST_GIB],
        ["the process's own memory", f"≤ {MOST_GIB} GiB", f"{process:.1f} GiB", process <= MOST_GIB],
    ]
    cells = [[name, target, found, "yes" if met else "no"] for name, target, found, met in rows]
    return [table(["aim", "target", "measured", "met"], cells), ""]


def _of_several(run: dict[str, Any]) -> str:
    return "" if run.get("processes", 1) == 1 else f", of the first of {run['processes']}"


def _measured(run: dict[str, Any]) -> list[str]:
    stages = run["stages"].values()
    gpu = [row["peak_gpu_bytes"] for row in stages if "peak_gpu_bytes" in row]
    peak = max(row["peak_rss_bytes"] for row in stages)
    return [
        "measured", str(run["blocks"]), *_settings(run["recipe"]), *(f"{row['seconds']:.0f}" for row in stages),
        f"{peak / GIB:.1f}", f"{max(gpu) / GIB:.1f}" if gpu else "–",
    ]  # fmt: skip


def _extrapolated(name: str, case: dict[str, Any]) -> list[str]:
    return [
        f"*{name}*", str(case["blocks"]), *_settings(case["recipe"]),
        *(f"*{seconds:.0f}*" for seconds in case["seconds"].values()), f"*{case['peak_rss_bytes'] / GIB:.1f}*", "–",
    ]  # fmt: skip


def _settings(recipe: dict[str, Any]) -> list[str]:
    return [str(recipe[name]) for name in SETTINGS]


def _differs(run: dict[str, Any], case: dict[str, Any]) -> bool:
    return (run["blocks"], run["recipe"]) != (case["blocks"], case["recipe"])
