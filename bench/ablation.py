"""What each idea of the method gives on the bundled model: SQNR, PSNR, FD-fashion, calibration time and memory.

    python bench/ablation.py --device cuda --json bench/results/ablation.json

Calibrates once with published settings, solves every variant from the same records, and runs each in integers
(`ops.reference`). FD-fashion uses --num images per model; the float model is sampled with several seeds, so that its
seed-to-seed spread says which differences mean something. The result file is rewritten after every row; rows that an
earlier run with the same settings and environment left there are kept, unless this run measures them again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from tqdit import artifact, workflow
from tqdit.comparison import fd_fashion, held_out
from tqdit.convert import convert
from tqdit.environment import environment, peak_memory_bytes
from tqdit.evaluation import fidelity, generate, metrics
from tqdit.files import replacing, write_text
from tqdit.models.sampler import Sampling
from tqdit.recipe import Recipe

UNIFORM = {"softmax_grid": "uniform", "gelu_grid": "uniform"}
VARIANTS: dict[str, dict[str, Any]] = {
    "round-to-nearest (min-max)": {"rounds": 0, "hessian": False, "time_grouped": "none", **UNIFORM},
    "search, squared error": {"hessian": False, "time_grouped": "none", **UNIFORM},
    "search + HO": {"time_grouped": "none", **UNIFORM},
    "search + MRQ": {"hessian": False, "time_grouped": "none"},
    "search + TGQ": {"hessian": False, **UNIFORM},
    "paper (HO + MRQ + TGQ)": {},
    "paper, per-channel weights": {"weight_granularity": "per_channel"},
    "plus, epsilon loss": {"preset": "plus", "loss": "epsilon"},
    "plus": {"preset": "plus"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="measure only rows that the result file lacks")
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--num", type=int, default=2560, help="images per model for FD-fashion")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of those images")
    parser.add_argument("--seeds", type=int, default=4, help="float runs that measure the spread of FD-fashion")
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    ablate(args)


def ablate(args: argparse.Namespace) -> None:
    prepared = workflow.prepare(args.model, Recipe.build(samples=args.samples), device=args.device)
    print(f"calibration data and statistics: {prepared.seconds:.1f} s", flush=True)
    source, model = prepared.source, prepared.model
    data = held_out(source, model, 10, 16, seed=20_000)
    expected = fidelity.predict_epsilon(model, data, batch=args.batch)
    labels = [i % 10 for i in range(args.num)]
    sampling = Sampling("ddim", args.steps, 1.5)

    def images(module: torch.nn.Module, seed: int) -> torch.Tensor:
        latents = generate.sample_latents(module, source.scheduler, labels, sampling, seed, batch=args.batch)
        return generate.to_pixels(latents, None)

    start = time.perf_counter()
    float_images = [images(model, seed) for seed in range(args.seeds)]
    result: dict[str, Any] = {
        "environment": environment(args.device),
        "settings": {"images": args.num, "steps": args.steps, "guidance": 1.5, "held_out_per_group": 16},
        "records_seconds": prepared.seconds,
        "float_fd_fashion": [fd_fashion(source, pixels) for pixels in float_images],
        "rows": [],
    }
    result["rows"] = _kept_rows(args.json, result)
    print(f"float FD-fashion: {result['float_fd_fashion']}, {time.perf_counter() - start:.1f} s", flush=True)
    for bits in args.bits:
        for name, settings in VARIANTS.items():
            if args.missing and any(_same(row, {"variant": name, "bits": bits}) for row in result["rows"]):
                continue
            recipe = Recipe.build(**{"preset": "paper", "bits": bits, "samples": args.samples, **settings})
            solution, seconds = workflow.solve_prepared(prepared, recipe)
            scratch = args.json.parent / ".ablation-artifact"
            with replacing(scratch, overwrite=True) as folder:
                artifact.write(solution, folder)
            module = convert(solution).to(args.device)
            eps = fidelity.compare_epsilon(expected, fidelity.predict_epsilon(module, data, batch=args.batch), data)
            pixels = images(module, 0)
            row = {
                "variant": name,
                "bits": bits,
                "eps_sqnr_db": eps.overall,
                "eps_sqnr_db_by_group": eps.by_group,
                "psnr_db": metrics.psnr_db(float_images[0], pixels),
                "fd_fashion": fd_fashion(source, pixels),
                "calibration_seconds": prepared.seconds + seconds,
                "size_ratio": artifact.size_bytes(scratch) / workflow.float32_bytes(model),
                "peak_memory_bytes": peak_memory_bytes(),
            }
            result["rows"] = _in_order([old for old in result["rows"] if not _same(old, row)] + [row])
            write_text(args.json, json.dumps(result, indent=1) + "\n")
            print(
                f"{bits} {name:28} SQNR {row['eps_sqnr_db']:.2f} PSNR {row['psnr_db']:.2f} "
                f"FD {row['fd_fashion']:.3f} search {seconds:.1f} s",
                flush=True,
            )


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
