"""The sections on SiT and PixArt, and on what the redesign for many architectures costs, from the files there are."""

from collections.abc import Mapping, Sequence
from typing import Any

from pages import RESULTS, environment, read, table

MB, GB = 1e6, 1e9


def architectures() -> list[str]:
    """The sections of the result files that exist."""
    parts = {"sit-h200": sit, "pixart-h200": pixart, "before-after-h200": before_after}
    return [line for name, part in parts.items() if (RESULTS / f"{name}.json").is_file() for line in part(read(name))]


def sit(run: Mapping[str, Any]) -> list[str]:
    """A small SiT from its training to the comparison of its artifacts."""
    training, comparison, parts = run["training"], run["comparison"], run["parts"]
    settings, float_row, models = comparison["settings"], comparison["reference"], comparison["models"]
    rows = [["float", "–", f"{float_row['file_bytes'] / MB:.2f}", "1.000", "–", "–", f"{float_row['fd_fashion']:.2f}"]]
    rows += [
        [model["name"], f"{parts[model['name']]['seconds']:.0f}", f"{model['size_bytes'] / MB:.2f}",
         f"{model['size_ratio_file']:.3f}", f"{model['eps_sqnr_db']:.1f}", f"{model['psnr_db']:.1f}",
         f"{model['fd_fashion']:.2f}"]
        for model in models
    ]  # fmt: skip
    header = ["W8A8", "seconds to quantize", "MB", f"of the {float_row['file_dtype']} file", "SQNR (dB)", "PSNR (dB)",
              "FD-fashion"]  # fmt: skip
    return [
        "## A SiT",
        "",
        f"`bench/sit.py` on {environment(run['environment'])}. The example `examples/train_fashion_dit.py --objective "
        f"flow` trained a {training['shape']} by flow matching, with {training['steps']} steps of {training['batch']} "
        f"images in {training['seconds']:.0f} s. The model was then quantized and compared: {settings['num']} images, "
        f"{settings['steps']} Euler steps, guidance {settings['guidance']}. SQNR is that of the model's output over "
        f"{settings['states']} held-out states; seconds are those of the whole process.",
        "",
        table(header, rows),
        "",
        "SQNR (dB) by range of timesteps, from the data to the noise:",
        "",
        table(["W8A8", *map(str, range(1, settings["groups"] + 1))],
              [[model["name"], *(f"{value:.1f}" for value in model["eps_sqnr_db_by_group"])] for model in models]),
        "",
    ]  # fmt: skip


def pixart(run: Mapping[str, Any]) -> list[str]:
    """PixArt at its published shape."""
    ms, size, full = run["call_ms"], run["weight_bytes"], run["float32_bytes"]
    settings = ", ".join(f"{name} {value}" for name, value in run["settings"].items())
    rows = [
        ["seconds to quantize", f"{run['quantize_seconds']:.1f}"],
        ["weights (GB)", f"{size / GB:.3f}"],
        ["of float32", f"{size / full:.3f}"],
        ["SQNR of the output (dB)", f"{run['sqnr_db']['integer']:.1f}"],
        ["ms a call of two samples, integers", f"{ms['integer']:.2f}"],
        ["ms a call of two samples, eager bfloat16", f"{ms['bfloat16 eager']:.2f}"],
    ]
    return [
        "## A PixArt",
        "",
        f"`bench/pixart.py` on {environment(run['environment'])}: {run['shape']} with {run['blocks']} blocks, W8A8, "
        f"preset `plus` with reduced settings ({settings}). Weights and prompts are random, so the figures say nothing "
        "of images. SQNR is over held-out states of the float model's own sampling, with the residual stream in bf16. "
        "Eager bfloat16 is diffusers' own model as it is. It is not the strongest baseline: a compiled model with CUDA "
        "graphs has not been measured for PixArt.",
        "",
        table([run["shape"], "measured"], rows),
        "",
    ]


def before_after(run: Mapping[str, Any]) -> list[str]:
    """DiT-XL/2 before and after the redesign."""
    rounds = run["rounds"]
    rows = [
        [name, *(_range([found[version][name] for found in rounds], 2) for version in ("before", "after")),
         f"{ratio:.3f}", _range([found["after"][name] / found["before"][name] for found in rounds], 3)]
        for name, ratio in run["ratio"].items()
    ]  # fmt: skip
    return [
        "## Before and after the redesign for many architectures",
        "",
        f"`bench/before_after.py` on {environment(run['environment'])}: {run['shape']} {run['bits'].upper()} `plus`, "
        f"revision {run['before']} beside the one that came after it, {len(rounds)} rounds in turn, each version in a "
        "process of its own. Milliseconds are the median of a round's calls, from the fastest round to the slowest; a "
        "ratio above 1 means that the new version is slower. With 2 samples the rounds differ more than the versions.",
        "",
        table(["workload", "before (ms)", "after (ms)", "after / before, median", "least to most"], rows),
        "",
    ]


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
