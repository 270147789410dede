"""Write the comparison's numbers as text: headline, summary, the table's cells, and a table of site roles."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdit.quality.comparison import Comparison, ModelRow
from tqdit.spec import Granularity, GridParams, Role

NOTHING = "–"
ROLES = {
    Role.WEIGHT: "Weights",
    Role.WEIGHT_ONLY: "Weights of layers with float inputs",
    Role.INPUT: "Inputs of linear layers",
    Role.QUERY: "Queries",
    Role.KEY: "Keys",
    Role.VALUE: "Values",
    Role.SOFTMAX: "Post-softmax probabilities",
    Role.GELU: "Post-GELU activations",
}
SHARED = {
    Granularity.PER_TENSOR: "per tensor",
    Granularity.PER_CHANNEL: "per channel",
    Granularity.PER_HEAD: "per head",
}
FACTS = {
    "num": "images",
    "samples_per_group": "held-out states per range of timesteps",
    "groups": "ranges",
    "states": "held-out states",
    "call_batch": "samples of a timed call",
}


def number(value: float | None, digits: int) -> str:
    """Return a number with a fixed number of decimals; an en dash where there is no value."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞"


def title(comparison: Comparison) -> str:
    """Return the headline: the model closest to float, its cost and its savings."""
    name = comparison.float_model.name
    best = closest(comparison.models)
    if best is None or best.eps is None:
        return f"{name}, quantized"
    return f"{name}, {_smaller(comparison, best)} at {number(best.eps.overall, 1)} dB ε SQNR"


def summary(comparison: Comparison) -> str:
    """Return one paragraph: the method, the closest model and the smallest."""
    reference, models = comparison.float_model, comparison.models
    text = f"{reference.name} takes {_megabytes(reference)} MB in {reference.file_dtype or reference.bits}. "
    best = closest(models)
    if best is None or best.eps is None:
        return text + "No quantized model was measured against it."
    count = "One model was" if len(models) == 1 else f"{len(models)} models were"
    text += f"{count} quantized from it after training, without training data. "
    text += (
        f"{_described(best)} predicts the noise ε of held-out states with a signal-to-noise ratio (SQNR) of "
        f"{number(best.eps.overall, 1)} dB: its error has {10 ** (2 - best.eps.overall / 10):.2g} % of the signal's "
        f"power. It takes {_megabytes(best)} MB, {100 * best.disk_bytes / reference.disk_bytes:.1f} % of that."
    )
    if best.cost:
        text += (
            f" A call of the denoiser takes {number(best.cost.ms_per_call, 1)} ms, {best.cost.speedup:.1f}× as fast as "
            "the float model in eager float32."
        )
    smallest = min(models, key=lambda row: row.size_bytes)
    if smallest is not best:
        text += (
            f" The smallest, {_described(smallest)}, takes {_megabytes(smallest)} MB "
            f"({_smaller(comparison, smallest)}) at {number(_sqnr(smallest), 1)} dB."
        )
    return text


def closest(models: Sequence[ModelRow]) -> ModelRow | None:
    """Return the model with the highest SQNR of ε; the first of equals."""
    measured = [row for row in models if row.eps and not math.isnan(row.eps.overall)]
    return max(measured, key=lambda row: row.eps.overall if row.eps else -math.inf, default=None)


def cells(row: ModelRow, reference: ModelRow) -> list[str]:
    """Return a row of the table, after the name.

    The cells: preset, bits; MB, % of the file that was quantized, of bf16 and of fp32; SQNR, PSNR, FD-fashion; ms a
    call, times as fast as eager float32, peak MB; seconds of calibration.
    """
    fp32, size, cost = reference.size_bytes, row.disk_bytes, row.cost
    return [
        row.preset or NOTHING,
        row.bits,
        _megabytes(row),
        *(number(100 * size / whole, 1) for whole in (reference.disk_bytes, fp32 / 2, fp32)),
        number(_sqnr(row), 1),
        number(row.psnr_db, 1),
        number(row.fd_fashion, 2),
        number(cost.ms_per_call if cost else None, 1),
        number(cost.speedup if cost else None, 2),
        number(cost.peak_bytes / 1e6 if cost and cost.peak_bytes is not None else None, 0),
        number(row.calibration_seconds, 0),
    ]


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings or environment as (label, value)."""
    return [(FACTS.get(key, key.replace("_", " ")), str(value)) for key, value in values.items()]


def site_table(models: Sequence[ModelRow]) -> list[tuple[str, list[list[tuple[str, str]]]]]:
    """Return, for each role that occurs, its label and a cell for each model.

    A cell is (number and grid, what shares a scale).
    """
    rows = []
    for role, label in ROLES.items():
        columns = [_phrases(row.solution.params.values() if row.solution else (), role) for row in models]
        if any(columns):
            rows.append((label, columns))
    return rows


def _phrases(sites: Iterable[GridParams], role: Role) -> list[tuple[str, str]]:
    counts = Counter((f"{p.spec.bits}-bit {p.spec.grid.label}", _shared(p)) for p in sites if p.spec.role is role)
    return [(f"{count} × {codes}", shared) for (codes, shared), count in counts.items()]


def _shared(params: GridParams) -> str:
    """Return what shares one scale of a site."""
    spec = params.spec
    shared = "per row" if spec.grid.per_row else SHARED[spec.granularity]
    shared += f", {spec.groups} time groups" if spec.groups > 1 else ""
    return shared if params.channels is None else f"{shared}, a factor for each channel"


def _megabytes(row: ModelRow) -> str:
    return number(row.disk_bytes / 1e6, 2)


def _smaller(comparison: Comparison, row: ModelRow) -> str:
    """Return how much smaller a model is than the file it was made from."""
    reference = comparison.float_model
    return f"{reference.disk_bytes / row.disk_bytes:.1f}× smaller than in {reference.file_dtype or reference.bits}"


def _sqnr(row: ModelRow) -> float | None:
    return row.eps.overall if row.eps else None


def _described(row: ModelRow) -> str:
    return f"{row.name} ({row.preset}, {row.bits})" if row.preset else f"{row.name} ({row.bits})"
