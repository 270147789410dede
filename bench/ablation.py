"""What each idea of the method gives on the bundled model: SQNR, PSNR, FD-fashion, calibration time and memory.

    python bench/ablation.py --device cuda --json bench/results/ablation.json

Calibrates once with published settings, solves every variant from the same records, and runs each in integers
(`ops.reference`). FD-fashion uses --num images per model; the float model is sampled with several seeds, so that its
seed-to-seed spread says which differences mean something. The result file is rewritten after every row; rows that an
earlier run with the same settings and environment left there are kept, unless this run measures them again. Runs of
different variants may go side by side; --join makes one file of theirs.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tqdit import workflow
from tqdit.artifact import folder as artifact
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.imaging import generate
from tqdit.quality import fidelity, metrics
from tqdit.quality.comparison import HELD_OUT_SEED, fd_fashion, held_out
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sources.sizes import float_sizes
from tqdit.system.environment import environment
from tqdit.system.files import write_text

HELD_OUT = 16  # states per time group
SHOWN = ("bits", "variant", "eps_sqnr_db", "psnr_db", "fd_fashion", "calibration_seconds")
UNIFORM = {"softmax_grid": "uniform", "gelu_grid": "uniform"}
# The preset plus as it was before it had scales of rows; the next variants add its parts one by one, in this order.
FORMER = {
    "preset": "plus", "input_grid": "uniform", "softmax_grid": "best", "gelu_channels": "one", "ends": "codes",
    "hessian": "published", "rounding": "nearest",
}  # fmt: skip
PARTS: dict[str, str] = {
    "image objective": "hessian",
    "rows of inputs": "input_grid",
    "rows of softmax": "softmax_grid",
    "float ends": "ends",
    "second-order rounding": "rounding",
    "channels after GELU": "gelu_channels",
}


def _added(count: int) -> dict[str, Any]:
    """Return the former plus with the first `count` parts of today's."""
    return {key: value for key, value in FORMER.items() if key not in list(PARTS.values())[:count]}


VARIANTS: dict[str, dict[str, Any]] = {
    "round-to-nearest (min-max)": {"rounds": 0, "hessian": "none", "time_grouped": "none", **UNIFORM},
    "search, squared error": {"hessian": "none", "time_grouped": "none", **UNIFORM},
    "search + HO": {"time_grouped": "none", **UNIFORM},
    "search + MRQ": {"hessian": "none", "time_grouped": "none"},
    "search + TGQ": {"hessian": "none", **UNIFORM},
    "paper (HO + MRQ + TGQ)": {},
    "former plus": FORMER,
    **{f"... + {name}": _added(count + 1) for count, name in enumerate(list(PARTS)[:-1])},
    "plus": {"preset": "plus"},
    **{f"plus without {name}": {"preset": "plus", field: FORMER[field]} for name, field in PARTS.items()},
    "plus, squared error alone": {"preset": "plus", "hessian": "none"},
    "plus, all rows weighed": {"preset": "plus", "mix": 1.0},
    "plus, no row weighed": {"preset": "plus", "mix": 0.0},
    "plus, rows after attention": {"preset": "plus", "attended_grid": "row"},
    "plus, rows after attention and GELU": {"preset": "plus", "attended_grid": "row", "gelu_grid": "row"},
    "plus, two products after GELU": {"preset": "plus", "gelu_products": "two"},
    "plus, uniform after GELU": {"preset": "plus", "gelu_grid": "uniform"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=list(VARIANTS),
        metavar="VARIANT",
        help="; ".join(VARIANTS),
    )
    parser.add_argument("--missing", action="store_true", help="measure only rows that the result file lacks")
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--num", type=int, default=2560, help="images per model for FD-fashion")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of those images")
    parser.add_argument("--seeds", type=int, default=4, help="float runs that measure the spread of FD-fashion")
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", help="the backend that runs the variants")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--join", type=Path, nargs="+", help="only join result files of the same settings, as --json")
    args = parser.parse_args()
    if args.join:
        join(args.join, args.json)
    else:
        ablate(args)


def join(paths: list[Path], out: Path) -> None:
    """Write the rows of runs with the same settings, environment and float images as one file."""
    first, *others = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        for key in ("environment", "settings", "float_fd_fashion"):
            if other[key] != first[key]:
                raise SystemExit(f"{path} has another {key} than {paths[0]}")
        first["rows"] += other["rows"]
    first["records_seconds"] = max(run["records_seconds"] for run in (first, *others))
    first["rows"] = _in_order(first["rows"])
    write_text(out, json.dumps(first, indent=1) + "\n")


@dataclass(frozen=True)
class Bench:
    """What every row is measured against: the float model's epsilon and images of the same noise."""

    prepared: workflow.Prepared
    data: CalibrationSet
    labels: list[int]
    sampling: Sampling
    args: argparse.Namespace

    def epsilon(self, module: torch.nn.Module) -> torch.Tensor:
        return fidelity.predict_epsilon(module, self.data, batch=self.args.batch)

    def images(self, module: torch.nn.Module, seed: int) -> torch.Tensor:
        scheduler = self.prepared.source.scheduler
        latents = generate.sample_latents(module, scheduler, self.labels, self.sampling, seed, batch=self.args.batch)
        return generate.to_pixels(latents, None)


def ablate(args: argparse.Namespace) -> None:
    _reset_peak(args.device)
    prepared = workflow.prepare(args.model, Recipe("plus", samples=args.samples), device=args.device)
    records_peak = _peak(args.device)
    source, model = prepared.source, prepared.model
    data = held_out(source, model, 10, HELD_OUT, HELD_OUT_SEED)
    bench = Bench(prepared, data, [i % 10 for i in range(args.num)], Sampling("ddim", args.steps, 1.5), args)
    float_epsilon, float_images = bench.epsilon(model), [bench.images(model, seed) for seed in range(args.seeds)]
    result: dict[str, Any] = {
        "environment": environment(args.device),
        "settings": {
            "images": args.num, "steps": args.steps, "guidance": 1.5, "held_out_per_group": HELD_OUT,
            "calibration": prepared.recipe.model_dump(mode="json"),
        },
        "records_seconds": prepared.seconds,
        "float_fd_fashion": [fd_fashion(source, pixels) for pixels in float_images],
        "rows": [],
    }  # fmt: skip
    result["rows"] = _kept_rows(args.json, result)
    print(f"records {prepared.seconds:.1f} s; float FD-fashion {result['float_fd_fashion']}", flush=True)
    for bits, name in itertools.product(args.bits, args.variants):
        if args.missing and any(_same(row, {"variant": name, "bits": bits}) for row in result["rows"]):
            continue
        row = measure(bench, name, bits, float_epsilon, float_images[0])
        row["peak_memory_bytes"] = max(records_peak or 0, row["peak_memory_bytes"] or 0) or None
        result["rows"] = _in_order([old for old in result["rows"] if not _same(old, row)] + [row])
        write_text(args.json, json.dumps(result, indent=1) + "\n")
        print(
            " ".join(f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in SHOWN), flush=True
        )


def measure(
    bench: Bench, name: str, bits: str, float_epsilon: torch.Tensor, float_images: torch.Tensor
) -> dict[str, Any]:
    """Solve one variant, run it in integers, and score it."""
    device = bench.args.device
    settings = {"preset": "paper", "bits": bits, "samples": bench.args.samples, **VARIANTS[name]}
    _reset_peak(device)
    solution, seconds = workflow.solve_prepared(bench.prepared, Recipe(**settings))
    peak = _peak(device)
    with tempfile.TemporaryDirectory() as folder:
        artifact.write(solution, Path(folder))
        size = artifact.size_bytes(Path(folder))
    module = convert(solution, bench.args.backend, device=device)
    eps = fidelity.compare_epsilon(float_epsilon, bench.epsilon(module), bench.data)
    pixels = bench.images(module, 0)
    return {
        "variant": name,
        "bits": bits,
        "eps_sqnr_db": eps.overall,
        "eps_sqnr_db_by_group": eps.by_group,
        "psnr_db": metrics.psnr_db(float_images, pixels),
        "fd_fashion": fd_fashion(bench.prepared.source, pixels),
        "calibration_seconds": bench.prepared.seconds + seconds,
        "peak_memory_bytes": peak,
        "size_ratio": size / float_sizes(bench.prepared.source, bench.prepared.model).float32_bytes,
    }


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int | None:
    """Largest allocation on the GPU since the reset; a CPU has no such counter within one process."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (a["variant"], a["bits"]) == (b["variant"], b["bits"])


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By weight bits, activation bits (most first), then the order of VARIANTS."""
    names = list(VARIANTS)
    return sorted(rows, key=lambda row: (-int(row["bits"][1]), -int(row["bits"][3]), names.index(row["variant"])))


def _kept_rows(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    same = all(earlier[key] == result[key] for key in ("environment", "settings"))
    return earlier["rows"] if same else []


if __name__ == "__main__":
    main()
