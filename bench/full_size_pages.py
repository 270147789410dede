"""The section on whole runs at full size, from the files of `bench/full_size.py` that there are."""

from collections.abc import Mapping, Sequence
from typing import Any

from pages import RESULTS, environment, read, table

NAMES = ("full-size-h200", "full-size-cpu")
RECIPE = ("groups", "samples", "steps", "guidance", "rounds", "candidates", "rows", "queries")
GIB, MB = 2**30, 1e6
STAGE = {  # header -> key, what its unit is divided by, decimals
    "seconds": ("seconds", 1, 1),
    "process at most so far (GiB)": ("peak_rss_bytes", GIB, 1),
    "GPU memory at most (GiB)": ("peak_gpu_bytes", GIB, 1),
}
ONCE = ("checkpoint", "convert", "calibration", "compare")  # stages that are not of one bit-width
COLUMNS = {  # the same of a row
    "size (MB)": ("size_bytes", MB, 1),
    "of fp32": ("size_ratio", 1, 3),
    "search (s)": ("search_seconds", 1, 1),
    "load (s)": ("load_seconds", 1, 1),
    "first call (s)": ("first_call_seconds", 1, 1),
    "images/s": ("images_per_second", 1, 3),
    "GPU memory, loaded (GiB)": ("resident_gpu_bytes", GIB, 2),
    "at most (GiB)": ("peak_gpu_bytes", GIB, 2),
    "ε SQNR (dB)": ("eps_sqnr_db", 1, 1),
    "PSNR (dB)": ("psnr_db", 1, 1),
    "FD-fashion": ("fd_fashion", 1, 2),
}


def full_size() -> list[str]:
    runs = [run for name in NAMES if (RESULTS / f"{name}.json").is_file() for run in read(name)["runs"]]
    return section(runs) if runs else []


def section(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "## At full size",
        "",
        "`bench/full_size.py`: a training checkpoint with the published names goes through `tqdit convert`, one "
        "calibration, a search per bit-width, `DiTPipeline.from_pretrained` with a decoder of random weights, and "
        "`tqdit compare`, which compares a model's own pixels without it. Sizes are over the checkpoint's weights in "
        "fp32; the float row's is that of its folder in diffusers' format. Images per second are of the median call of "
        "the pipeline, decoding included; the first call captures the CUDA graph, compiles kernels that Triton's cache "
        "lacks and, for shapes without committed configurations, all their candidates, which it times. The float row "
        "is diffusers' own model, eager: the strongest baselines are [below](#speed-on-an-h200). GPU memory is what "
        "torch's allocator gave out, for the decoder too; `at most` includes a first call, in which "
        "candidates that compile at once each hold an output.",
        "",
        *(line for run in runs for line in _run(run)),
    ]


def _run(run: Mapping[str, Any]) -> list[str]:
    recipe, sampling, stages = run["recipe"], run["sampling"], run["stages"]
    settings = ", ".join(f"{name} {recipe[name]}" for name in RECIPE)
    lines = [
        f"### {run['model']}, {run['weights']} weights, {run['environment']['device']}",
        "",
        f"`{run['command']}`",
        "",
        f"on {environment(run['environment'])}. {run['parameters'] / 1e6:.0f} M parameters; `{recipe['preset']}` with "
        f"{settings}. A call draws {_images(sampling['batch'])}, DDIM {sampling['steps']} steps, guidance "
        f"{sampling['guidance']}.{_origin(run)}",
        "",
        _filled("stage", STAGE, {name: stages[name] for name in ONCE if name in stages}),
        "",
    ]
    return [*lines, _filled("model", COLUMNS, {_name(row): row for row in run["rows"]}), "", *_compared(run)]


def _filled(first: str, columns: Mapping[str, tuple[str, float, int]], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table without the columns of which no row has anything."""
    columns = {name: how for name, how in columns.items() if any(row.get(how[0]) is not None for row in rows.values())}
    return table(
        [first, *columns], [[name, *(_figure(row, *how) for how in columns.values())] for name, row in rows.items()]
    )


def _origin(run: Mapping[str, Any]) -> str:
    if run["weights"] == "random":
        return " Errors of random weights say that the way works, not how good a trained model is."
    if (training := run["training"]) is None:
        return ""
    return (
        f" {training['shape']} for Fashion-MNIST, trained by `examples/train_fashion_dit.py` for {training['steps']} "
        f"steps of {training['batch']} images in {training['seconds']:.0f} s on {training['device']}, seed "
        f"{training['seed']}; not shipped."
    )


def _compared(run: Mapping[str, Any]) -> list[str]:
    if "comparison" not in run:
        return ["This run ended before `tqdit compare`: its errors were not measured.", ""]
    settings = run["comparison"]
    return [
        f"Compared: {_images(settings['num'])} of the same seeds; held-out states per time group: "
        f"{settings['samples_per_group']}. The loaded checkpoint's ε differs from its model's by at most "
        f"{run['eps_difference_of_checkpoint']:.1g}.",
        "",
    ]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row.get('dtype', 'float')}, eager" if row["bits"] == "float" else row["bits"].upper()


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _figure(row: Mapping[str, Any], key: str, unit: float, decimals: int) -> str:
    """A run that was cut, and a CPU, lack some."""
    value = row.get(key)
    return "–" if value is None else f"{value / unit:.{decimals}f}"
