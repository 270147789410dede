r"""Evaluate the bundled model and artifacts of it under one protocol, and time the scores.

    python bench/evaluation.py models --num 10000 --device cuda --batch 1000 --work build/evaluation \
        --real build/fashion-mnist --json bench/results/evaluation-h200.json

makes artifacts with the presets `paper` and `plus` at W8A8, W6A6 and W4A8, draws the images of all of them and of the
float model, and scores them with the bundled classifier's features. `--work` keeps artifacts and images; the same
command goes on there. Every image is flushed to the disk, so a folder in memory is faster. `--real`: Fashion-MNIST's
folder or its file of test images, whose features are then computed; by default the bundled features of it.

    python bench/evaluation.py scores --json bench/results/evaluation-scores-cpu.json

times all scores of 10,000 x 2,048 random features (and 2,023 spatial ones) on the CPU, after the features.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tqdit
from tqdit.evaluation import scores
from tqdit.evaluation.moments import Gaussian, Moments, joined
from tqdit.evaluation.reference import FASHION_TEST
from tqdit.quality import fashion
from tqdit.system.environment import environment, peak_memory_bytes
from tqdit.system.files import write_text

MODEL, NETWORK = "fashion-dit", "fashion"
PRESETS, BITS = ("paper", "plus"), ("w8a8", "w6a6", "w4a8")
POOLED, SPATIAL, CLASSES, BLOCK = 2048, 2023, 1008, 1000  # the Inception network's widths; rows of a block


def main() -> None:
    args = arguments()
    result = {"command": command(), **(models(args) if args.part == "models" else timed(args))}
    write_text(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    whole, alone = parts.add_parser("models"), parts.add_parser("scores")
    whole.add_argument("--num", type=int, default=10_000, help="images of each model")
    whole.add_argument("--steps", type=int, default=50)
    whole.add_argument("--sampler", default="ddim")
    whole.add_argument("--guidance", type=float, default=1.5)
    whole.add_argument("--seed", type=int, default=0)
    whole.add_argument("--batch", type=int, default=100, help="images drawn at a time")
    whole.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the recipes")
    whole.add_argument("--real", type=Path, help="Fashion-MNIST's folder or its IDX file of test images")
    whole.add_argument("--work", type=Path, required=True, help="folder of artifacts and images")
    whole.add_argument("--device", default="auto")
    alone.add_argument("--num", type=int, default=10_000)
    for part in (whole, alone):
        part.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def models(args: argparse.Namespace) -> dict[str, Any]:
    """The evaluation of the float model and all artifacts, and how the artifacts were made."""
    made = {f"{preset}-{bits}": artifact(args, preset, bits) for preset in PRESETS for bits in BITS}
    reference = FASHION_TEST if args.real is None else real_images(args.real, args.work / "fashion-test.npz")
    found = tqdit.evaluate(
        [MODEL, *(args.work / name for name in made)], reference, args.work / "results.json",
        network=NETWORK, num=args.num, sampling=tqdit.Sampling(args.sampler, args.steps, args.guidance),
        seed=args.seed, batch=args.batch, device=args.device, report=printed(),
    )  # fmt: skip
    return {"artifacts": made, "evaluation": json.loads(found.to_json())}


def artifact(args: argparse.Namespace, preset: str, bits: str) -> dict[str, Any]:
    """Make an artifact that is not there yet; returns its size and the seconds that it took, if it was made now."""
    out = args.work / f"{preset}-{bits}"
    row: dict[str, Any] = {"preset": preset, "bits": bits}
    if not out.exists():
        settings = {name: json.loads(value) for name, _, value in (text.partition("=") for text in args.set)}
        start = time.perf_counter()
        tqdit.quantize(MODEL, out, tqdit.Recipe(preset, bits, **settings), device=args.device)
        row["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{out.name}: {row['seconds']} s", flush=True)
    return row


def real_images(path: Path, out: Path) -> Path:
    """Write Fashion-MNIST's test images as an ADM batch of one channel: what the data set's file has, padded."""
    pixels = ((fashion.read_test_images(path) + 1) * 127.5).round().to(torch.uint8)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        np.savez(out, pixels.permute(0, 2, 3, 1).numpy())
    return out


def printed() -> Callable[[str, float], None]:
    """A report that prints every stage once."""
    shown: set[str] = set()

    def report(stage: str, _: float) -> None:
        if stage not in shown:
            shown.add(stage)
            print(stage, flush=True)

    return report


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every score of random features, and the peak memory of the process with its imports.

    Beside the seconds on the wall there are those of the processor, over all threads: other programs that share the
    machine lengthen the first alone.
    """
    (real, drawn), (real_maps, drawn_maps) = (
        [features(args.num, width, seed) for seed in (0, 1)] for width in (POOLED, SPATIAL)
    )
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    def lap(name: str, work: Callable[[], Any]) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        found = work()
        seconds[name] = round(time.perf_counter() - start, 2)
        cpu_seconds[name] = round(time.process_time() - cpu_start, 2)
        print(f"{name}: {seconds[name]} s, {cpu_seconds[name]} s of the processor", flush=True)
        return found

    def moments(rows: torch.Tensor) -> Gaussian:
        found = None
        for block in rows.split(BLOCK):
            found = joined(found, Moments.of(block))
        return Gaussian.of(found)

    gaussians = lap("moments", lambda: [moments(rows) for rows in (real, drawn, real_maps, drawn_maps)])
    values = {
        "frechet_distance": lap("frechet_distance", lambda: scores.frechet_distance(*gaussians[:2])),
        "spatial_frechet_distance": lap("spatial_frechet_distance", lambda: scores.frechet_distance(*gaussians[2:])),
        "precision_recall": lap("precision_recall", lambda: scores.precision_recall(real, drawn)),
        "kernel_distance": lap("kernel_distance", lambda: scores.kernel_distance(real, drawn).mean),
        "inception_score": lap("inception_score", lambda: inception_score(drawn)),
    }
    return {
        "environment": environment(),
        "settings": {"num": args.num, "pooled": POOLED, "spatial": SPATIAL, "classes": CLASSES},
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "total_seconds": round(sum(seconds.values()), 2),
        "total_cpu_seconds": round(sum(cpu_seconds.values()), 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "values": values,
    }


def features(count: int, width: int, seed: int) -> torch.Tensor:
    """Features that are correlated and never negative, as those of a network after ReLU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 256, generator=generator)
    mixing = torch.randn(256, width, generator=torch.Generator().manual_seed(9)) / 16
    return (hidden @ mixing + 0.5 * torch.randn(count, width, generator=generator)).relu()


def inception_score(drawn: torch.Tensor) -> float:
    """The score of probabilities that are made of the features."""
    score = scores.InceptionScore()
    for block in drawn.split(BLOCK):
        score.add((block[:, :CLASSES] * 4).softmax(1))
    return score.value


def command() -> str:
    """The command as a line that can be pasted, without the places of absolute paths."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", "bench/evaluation.py", *words])


if __name__ == "__main__":
    main()
