"""The figures of docs/models.md, from the result files of the scripts that measure models of any class.

The page is written by hand but for its sections, as docs/quality.md is (see `quality_pages.py`).
"""

import math
import statistics
from typing import Any

from pages import RESULTS, environment, read, table
from quality_pages import SECTION

Run = dict[str, Any]
Lines = list[str]
TARGET = 30  # dB of a model's output with random weights
SMALL = ("flux", "z-image")
APART = "int8 apart"  # a linear layer in integers with a quantize of its own, in traced-linears-h200.json


def models(text: str) -> str:
    """Return docs/models.md with the figures of the result files that there are; the rest of `text` stays.

    Raises `ValueError` where the page lacks a section or has one that nothing writes.
    """
    names = [found[2] for found in SECTION.finditer(text)]
    if sorted(names) != sorted(SECTIONS):
        raise ValueError(f"docs/models.md has the sections {sorted(names)}, not {sorted(SECTIONS)}")
    return SECTION.sub(lambda found: found[1] + "\n".join(["", *SECTIONS[found[2]]()]) + "\n" + found[3], text)


def _there(*names: str) -> dict[str, Run]:
    """Return the result files that exist, by name."""
    return {name: read(name) for name in names if (RESULTS / f"{name}.json").is_file()}


def _missing(*names: str) -> Lines:
    return ["Not measured yet: there is no " + " or ".join(f"`bench/results/{name}.json`" for name in names) + ".", ""]


def shares() -> Lines:
    """Return the table of what linear layers take of the published models."""
    found = _there("architecture-shares", "traced-linears-h200")
    if len(found) < 2:
        return _missing(*(name for name in ("architecture-shares", "traced-linears-h200") if name not in found))
    run = found["architecture-shares"]
    faster = statistics.median(row["times_bf16"][APART] for row in found["traced-linears-h200"]["rows"])
    head = [
        "model", "tokens of image or video + text", "width of a head", "FLOPs in integers (%)", "of attention (%)",
        "parameters in integers (%)", "integer weights alone (%)", "bound",
    ]  # fmt: skip
    return [
        "The shares are those of the FLOPs of one call, at the size that the model is made for, and of the model's "
        "parameters. `bench/architecture_shares.py` computes them from the model's config. What is missing to 100 % "
        "stays in float. The bound says how many times as fast as bf16 a call would be, if linear layers in integers "
        f"were {faster:.2f} times as fast, everything else took as long as before, and all FLOPs of bf16 were equally "
        f"fast. {faster:.2f} is the median of the layers under [speed](#speed), each with its own quantize. A FLOP of "
        "attention usually takes longer than one of a linear layer; then the gain is lower.",
        "",
        table(head, [_shares_row(row, faster) for row in run["models"]]),
        "",
        environment(run["environment"]),
        "",
    ]


def _shares_row(row: Run, faster: float) -> list[str]:
    flops, parameters, (*_, width) = row["flops"], row["parameters"], row["attention"]
    call, model = sum(flops.values()), sum(parameters.values())
    integer = flops["integer"] / call
    return [
        f"{row['model']}, {model / 1e9:.2f} B",
        f"{math.prod(row['patches'])} + {row['text_tokens']}",
        str(width),
        *(f"{100 * part:.1f}" for part in (integer, flops["attention"] / call)),
        *(f"{100 * parameters[kind] / model:.1f}" for kind in ("integer", "weight_only")),
        f"{1 / (1 - integer + integer / faster):.2f}",
    ]


def classes() -> Lines:
    """Return the table of all classes of diffusers that were tried with random weights."""
    found = _there("class-sweep").get("class-sweep")
    if found is None:
        return _missing("class-sweep")
    ran = {name: row for name, row in found["classes"].items() if "skipped" not in row}
    rows = [
        [
            f"`{name}`" if not row["failures"] else f"`{name}` (failed)",
            f"{row['sqnr_db']:.1f}" if "sqnr_db" in row else "–",
            str(row.get("quantized", "–")),
            str(row.get("weight_only", "–")),
            "; ".join(f"{count} × {reason}" for reason, count in row.get("left", {}).items()) or "–",
        ]
        for name, row in sorted(ran.items())
    ]
    summary = found["summary"]
    head = ["class", "output SQNR, W8A8 (dB)", "in integers", "weight only", "linear layers in float, and why"]
    skipped = {name: row["skipped"] for name, row in found["classes"].items() if "skipped" in row}
    failed = {name: "; ".join(row["failures"]) for name, row in ran.items() if row["failures"]}
    return [
        f"`bench/class_sweep.py` builds every transformer that diffusers' own tests build, with random weights: "
        f"{summary['classes']} classes, of which {summary['failed']} fail; the lowest output has "
        f"{summary['lowest_sqnr_db']:.1f} dB (aim: {TARGET}). Each is recorded, quantized by `plus` at W8A8 with few "
        "rows, saved, loaded and run; codes and outputs of the loaded model are those of the saved one, and the CPU's "
        "codes those of the reference. Random weights show that the mechanics work, not quality.",
        "",
        table(head, rows),
        "",
        *([f"Failed: {_named(failed)}.", ""] if failed else []),
        *([f"Not tried: {_named(skipped)}.", ""] if skipped else []),
        environment(found["environment"]),
        "",
    ]


def _named(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in sorted(reasons.items()))


def trained() -> Lines:
    """Return the tables of the small models that were trained."""
    names = [f"small-models-{name}-{device}" for name in SMALL for device in ("h200", "cpu")]
    found = _there(*names)
    if not found:
        return _missing(*names)
    lines: Lines = [
        "Two small models of real classes, trained on Fashion-MNIST with labels as a prompt of tokens "
        "(`examples/train_small_models.py`, measured by `bench/small_models.py`). SQNR is of the model's outputs on "
        "calls that calibration did not see; PSNR of images of the same seeds; both against fp32.",
        "",
    ]
    for run in found.values():
        training, settings = run["training"], run["settings"]
        lines += [
            f"{training['model']}, {training['parameters'] / 1e6:.1f} M parameters, "
            f"{settings['images'] or 'no'} images, {settings['steps']} steps, guidance {settings['guidance']}:",
            "",
            table(["model", "SQNR (dB)", "PSNR (dB)", "FD-fashion"], _trained_rows(run)),
            "",
            environment(run["environment"]),
            "",
        ]
    return lines


def _trained_rows(run: Run) -> list[list[str]]:
    def figure(row: Run, key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else "–"

    rows = [["float32", "–", "–", figure(run["float"], "fd_fashion", 2)]] if run["float"] else []
    return rows + [
        [name, f"{row['sqnr_db']:.1f}", figure(row, "psnr_db", 1), figure(row, "fd_fashion", 2)]
        for name, row in run["models"].items()
    ]


def speed() -> Lines:
    """Return the tables of blocks of published shapes on a GPU and on two cores."""
    names = ("traced-blocks-h200", "traced-blocks-cpu")
    found = _there(*names)
    if not found:
        return _missing(*names)
    lines: Lines = []
    for run in found.values():
        device = run["environment"]["device"]
        weights = ", ".join(f"{one['model']} {one['bytes_of_bf16']:.3f}" for one in run["models"])
        lines += [
            "Blocks of published shapes with random weights under the preset `dynamic`, by `tqdit bench --random`, on "
            f"{'two cores of a CPU' if device == 'cpu' else device}. Cells are milliseconds, bf16 → integers, medians "
            "of interleaved rounds. The gain is the time of the fastest bf16 over that of the fastest in integers. "
            "`linears` are all linear layers of one block of each kind. `all blocks` is computed from one block of "
            f"each kind, for as many as the published model has. Weights of the whole model over bf16's: {weights}.",
            "",
            table(
                ["model", "part", *MODES, "gain"],
                [_speed_row(one, part) for one in run["models"] for part in _parts(one)],
            ),
            "",
            environment(run["environment"]),
            "",
        ]
    return lines


MODES = {"eager": "eager", "compiled": "compiled", "CUDA graphs": "graphs"}


def _parts(one: Run) -> list[str]:
    """Return the parts of a model that the table has; a call of so few blocks is mostly what is outside of them."""
    return [part for part in dict.fromkeys(row["part"] for row in one["rows"]) if part != "call"]


def _speed_row(one: Run, part: str) -> list[str]:
    times = {row["entrant"]: row["p50_ms"] for row in one["rows"] if row["part"] == part}
    size = f"{' x '.join(str(n) for n in one['patches'] if n > 1)} patches"

    def pair(mode: str) -> str:
        both = [times.get(f"{kind}-{mode}") for kind in ("bf16", "ours")]
        return " → ".join("–" if ms is None else f"{ms:.2f}" for ms in both) if any(both) else "–"

    best = {kind: min(ms for name, ms in times.items() if name.startswith(kind)) for kind in ("bf16", "ours")}
    title = part if part in ("linears", "all blocks") else f"`{part}`, one block"
    gain = f"{best['bf16'] / best['ours']:.2f}"
    return [f"{one['model']}, {size}", title, *map(pair, MODES.values()), gain]


def linears() -> Lines:
    """Return the times of single linear layers of published widths on a GPU and on two cores."""
    names = ("traced-linears-h200", "traced-linears-cpu")
    found = _there(*names)
    lines: Lines = []
    if run := found.get("traced-linears-h200"):
        head = ["layer", "rows", "bf16 (µs)", "int8 product", "with its own quantize", "quantize shared by 3", "fp8"]
        lines += [
            "Linear layers of published widths by `bench/traced_linears.py`: times as fast as bf16 (cuBLAS), medians "
            "of interleaved rounds. fp8 is a compiled quantize by rows and torch's own product.",
            "",
            table(head, [_gpu_linear(row) for row in run["rows"]]),
            "",
            environment(run["environment"]),
            "",
        ]
    if run := found.get("traced-linears-cpu"):
        rows = [row for row in run["rows"] if "ours" in row["p50_ms"]]
        lines += [
            "The same on two cores, quantize and product together, by `bench/traced_linears_cpu.py`. This processor "
            "has AVX2 alone, neither VNNI nor products of bf16, so fp32 is the faster float:",
            "",
            table(
                ["layer", "tokens", "times as fast as fp32", "as compiled bf16"],
                [
                    [f"{row['model']} {row['layer']}", str(row["tokens"]), *_over(row, "fp32", "bf16-compiled")]
                    for row in rows
                ],
            ),
            "",
            environment(run["environment"]),
            "",
        ]
    return lines or _missing(*names)


def _gpu_linear(row: Run) -> list[str]:
    ratios = row["times_bf16"]
    shown = ("int8 product", APART, "int8 of three", "fp8 apart, compiled")
    figures = [f"{ratios[name]:.2f}" if name in ratios else "–" for name in shown]
    return [f"{row['model']} {row['depth']} → {row['columns']}", str(row["rows"]), f"{row['us']['bf16']:.0f}", *figures]


def _over(row: Run, *names: str) -> list[str]:
    return [f"{row['speedup_over'][name]:.1f}" if name in row["speedup_over"] else "–" for name in names]


def calibration() -> Lines:
    """Return what calibrating a model of six billion parameters takes."""
    found = _there("calibration-large-h200").get("calibration-large-h200")
    if found is None:
        return _missing("calibration-large-h200")
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found["stages"].items())
    return [
        f"Calibrating {found['model']} ({found['parameters'] / 1e9:.2f} B parameters, {found['calls']} calls of "
        f"{found['tokens']} tokens, `plus` {found['recipe']['weight_bits']}-bit weights, without the Fisher diagonal) "
        f"takes {found['seconds']:.0f} s ({stages}) and {found['peak_ratio']:.2f} times the memory of the bf16 model. "
        f"The integer model's weights take {found['weight_ratio']:.3f} of bf16's.",
        "",
        environment(found["environment"]),
        "",
    ]


SECTIONS = {
    "shares": shares, "classes": classes, "trained": trained, "linears": linears, "speed": speed,
    "calibration": calibration,
}  # fmt: skip
