"""The table of attention kernels in docs/gpu.md, from attention-h200.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from pages import environment, read, table

START, END = "<!-- attention: written by bench/make_results.py -->\n", "<!-- end of attention -->"
KINDS = {"before": "other integer kernels", "one pass": "one pass", "bf16": "dequantized, bf16"}


def attention(page: str) -> str:
    """Return the page with its table written anew."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{section(read('attention-h200'))}\n\n{END}{after}"


def section(run: Mapping[str, Any]) -> str:
    """Return the table of the sizes that were measured, and a sentence that names the others."""
    rows = run["rows"]
    errors = [error for row in rows if (error := error_of_one_pass(row)) is not None]
    lines = [
        f"`bench/gpu_attention.py` on {environment(run['environment'])}; µs. SDPA is the fastest of torch's kernels on "
        "q, k and v that are in bf16 already.",
        "",
        table(["samples × heads × tokens × head_dim", "SDPA, bf16", *KINDS.values(), "fastest of ours over SDPA"],
              [_cells(row) for row in rows]),
        "",
        f"Results in one pass are {percent(min(errors))} to {percent(max(errors))} of their bound away from a softmax "
        "in fp64." if errors else "",
        _clocks(run),
        f"Of the integer kernels one pass is the fastest {_where([row for row in rows if leads(row)])}.",
        f"Not measured: {_where(run['left_out'])}." if run.get("left_out") else "",
    ]  # fmt: skip
    return "\n".join(line for i, line in enumerate(lines) if line or i in (1, 3))


def leads(row: Mapping[str, Any]) -> bool:
    """Say whether one pass is faster than the other integer kernels, or the only one that ran."""
    here, others = row["best_us"].get("one pass"), row["best_us"].get("before")
    return here is not None and (others is None or here < others)


def error_of_one_pass(row: Mapping[str, Any]) -> float | None:
    """The error over its bound of the fastest kernel in one pass, or None where none ran."""
    times = {name: t for name, t in row["us"].items() if name.startswith("one pass")}
    if not times:
        return None
    name = min(times, key=times.__getitem__)
    errors = row["error_of_bound"]
    return float(errors.get(name, errors.get(name.removeprefix("one pass "))))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _clocks(run: Mapping[str, Any]) -> str:
    """How long one pass takes for a score, in the unit of the floor, where the clock is known."""
    about, rows = run["environment"], [row for row in run["rows"] if row["best_us"].get("one pass")]
    if not rows or not about.get("highest_clock_khz"):
        return ""
    scores = {row["shape"]: row["sizes"][0] * row["sizes"][1] * row["sizes"][2] ** 2 for row in rows}
    a_score = about["highest_clock_khz"] * 1e-3 * about["multiprocessors"]  # clocks of all multiprocessors a us
    found = [row["best_us"]["one pass"] * a_score / scores[row["shape"]] for row in rows]
    return (
        f"At the highest clock of the GPU one pass takes {min(found):.3f} to {max(found):.3f} clocks of a "
        "multiprocessor a score."
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    best = row["best_us"]
    ours = [best[kind] for kind in KINDS if best.get(kind)]
    ratio = f"{best['sdpa'] / min(ours):.2f}×" if ours and best["sdpa"] else "–"
    times = [best.get(kind) for kind in ("sdpa", *KINDS)]
    return [" × ".join(map(str, row["sizes"])), *("–" if t is None else f"{t:.0f}" for t in times), ratio]


def _where(found: Sequence[Any]) -> str:
    names = [x if isinstance(x, str) else "at " + " × ".join(map(str, x["sizes"])) for x in found]
    return "; ".join(names) if names else "nowhere"
