"""Methods that were chosen on the bundled model, on a second one: a DiT-S/2 for colour images, quantized and compared.

    python bench/colour.py bench/results/colour-h200.json --model build/colour

`--model`: the folder that `examples/train_colour_dit.py` writes. One calibration with the published settings serves all
recipes, which differ in the search alone. Images of every model have the same seeds, and classes as frequent as those
of the held-out images; `fd` is the Fréchet distance to these over features of the classifier that was trained on the
same data. It is biased upwards for few images: `fd_other_seeds` of the float model says how far chance moves it.
`--device cpu --quick` rehearses it. Rows are written one by one.
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
from tqdit.calibration.trajectories import CalibrationSet, InBfloat16
from tqdit.imaging import generate
from tqdit.prepared import Prepared
from tqdit.quality import features, fidelity, metrics
from tqdit.quality.comparison import HELD_OUT_SEED, STATE_GROUPS, held_out
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sources.sizes import float_sizes
from tqdit.system.environment import environment
from tqdit.system.files import read_json, write_text

PRESETS, BITS = ("paper", "plus"), ("w8a8", "w6a6", "w4a8")
GUIDANCE, HELD_OUT_PER_GROUP = 1.5, 8
QUICK = {"samples": 1, "steps": 10, "rounds": 0, "rows": 64, "queries": 64}


@dataclass(frozen=True)
class Bench:
    """The states, images and classifier that every model is measured with. `labels`: the class of each image."""

    prepared: Prepared
    data: CalibrationSet
    labels: list[int]
    sampling: Sampling
    classifier: features.FashionClassifier
    real: tuple[torch.Tensor, torch.Tensor]
    args: argparse.Namespace

    def epsilon(self, module: torch.nn.Module) -> torch.Tensor:
        """Epsilon at the held-out states."""
        return fidelity.predict_epsilon(module, self.data, batch=self.args.batch)

    def images(self, module: torch.nn.Module, seed: int = 0) -> torch.Tensor:
        """Images (num, 3, H, W) in [-1, 1]."""
        scheduler = self.prepared.source.scheduler
        latents = generate.sample_latents(module, scheduler, self.labels, self.sampling, seed, batch=self.args.batch)
        return generate.to_pixels(latents, None)

    def fd(self, pixels: torch.Tensor) -> float:
        """Fréchet distance of images to the held-out ones."""
        return features.frechet_distance(*features.feature_statistics(pixels, self.classifier), *self.real)

    def figures(self, pixels: torch.Tensor) -> dict[str, float]:
        """Return the figures of images that need no other images to compare with."""
        agreement = features.class_agreement(pixels, torch.tensor(self.labels), self.classifier)
        return {"fd": self.fd(pixels), "class_agreement": agreement}


def main() -> None:
    """Run the command line."""
    args = arguments()
    torch.backends.cudnn.allow_tf32 = False  # features as on a CPU
    quick = QUICK if args.quick else {}
    prepared = workflow.prepare(args.model / "dit", Recipe("plus", **quick), device=args.device)
    bench, training = made(args, prepared), read_json(args.model / "training.json")
    expected, images = bench.epsilon(prepared.model), bench.images(prepared.model)
    sizes = float_sizes(prepared.source, prepared.model)
    reference = {"bits": "float32", "size_bytes": sizes.float32_bytes, **bench.figures(images)}
    reference["fd_other_seeds"] = bench.fd(bench.images(prepared.model, seed=1))
    yardstick = compared(bench, InBfloat16(prepared.model), expected, images)
    result: dict[str, Any] = {
        "environment": environment(args.device),
        "settings": {
            "images": args.num, "steps": args.steps, "guidance": GUIDANCE, "batch": args.batch,
            "states": len(bench.data),
            "calibration": prepared.recipe.model_dump(mode="json"),
        },
        "training": training,
        "calibration_seconds": round(prepared.seconds, 1),
        "reference": reference,
        "bfloat16": yardstick,
        "models": [],
    }  # fmt: skip
    print(f"calibration {prepared.seconds:.1f} s; float {reference}; in bf16 {yardstick}", flush=True)
    for preset, bits in itertools.product(args.presets, args.bits):
        row = measured(bench, Recipe(preset, bits, **quick), expected, images)
        row["size_ratio"] = row["size_bytes"] / sizes.float32_bytes
        result["models"].append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
        print({name: value for name, value in row.items() if name != "eps_sqnr_db_by_group"}, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--model", type=Path, default=Path("build/colour"), help="what train_colour_dit.py wrote")
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--bits", nargs="+", default=BITS)
    parser.add_argument("--num", type=int, default=512, help="images of every model")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of an image")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto", help="the backend that runs the integer models")
    parser.add_argument("--quick", action="store_true", help="a small calibration without a search: a rehearsal")
    return parser.parse_args()


def made(args: argparse.Namespace, prepared: Prepared) -> Bench:
    """The held-out states, the classifier and the labels."""
    groups = min(STATE_GROUPS, prepared.source.num_timesteps)
    data = held_out(prepared.source, prepared.model, groups, HELD_OUT_PER_GROUP, HELD_OUT_SEED)
    folder = args.model / "classifier"
    classifier = features.load_fashion_classifier(args.device, folder / features.CLASSIFIER_FILE.name)
    real = features.load_real_statistics(folder / features.STATISTICS_FILE.name)
    counts = read_json(args.model / "training.json")["images_train_test"]
    labels = drawn_labels([counts[name][1] for _, name in sorted(prepared.source.labels.items())], args.num)
    return Bench(prepared, data, labels, Sampling("ddim", args.steps, GUIDANCE), classifier, real, args)


def drawn_labels(counts: list[int], num: int) -> list[int]:
    """`num` classes, each as often as its count says, up to one."""
    edges = torch.tensor(counts).cumsum(0)
    places = (torch.arange(num) + 0.5) * (int(edges[-1]) / num)
    return torch.bucketize(places, edges, right=True).tolist()


def measured(bench: Bench, recipe: Recipe, expected: torch.Tensor, images: torch.Tensor) -> dict[str, Any]:
    """Solve one recipe, run it in integers, and compare it with the float model."""
    solution, seconds = workflow.solve_prepared(bench.prepared, recipe)
    with tempfile.TemporaryDirectory() as folder:
        artifact.write(solution, Path(folder))
        size = artifact.size_bytes(Path(folder))
    module = convert(solution, bench.args.backend, bench.args.device)
    scores = compared(bench, module, expected, images)
    made = {"search_seconds": round(seconds, 1), "size_bytes": size}
    return {"preset": recipe.preset, "bits": recipe.bits, **scores, **made}


def compared(bench: Bench, module: torch.nn.Module, expected: torch.Tensor, images: torch.Tensor) -> dict[str, Any]:
    """Compare a model with the float model, whose outputs are `expected` and whose images are `images`."""
    eps = fidelity.compare_epsilon(expected, bench.epsilon(module), bench.data)
    pixels = bench.images(module)
    return {
        "eps_sqnr_db": eps.overall,
        "eps_sqnr_db_by_group": eps.by_group,
        "psnr_db": metrics.psnr_db(images, pixels),
        **bench.figures(pixels),
    }


if __name__ == "__main__":
    main()
