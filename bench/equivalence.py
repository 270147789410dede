r"""Whether anybody can tell quantized images of the bundled model from the float model's: two tests and their figures.

    python bench/equivalence.py --artifacts build/w8a8 build/w4a8 --num 10000 --steps 50 --sampler ddim --guidance 1.5 \
        --also ddpm:250:1.5 ddim:20:1.5 ddim:50:4 --real build/fashion-mnist --device cuda \
        --json bench/results/equivalence.json

The rules are those of `tqdit.quality.equivalence`, and nothing about them can be chosen here but how images are drawn.
Every seed but the last is a repeat of the whole test; the float model's other images are drawn with the seed that comes
next. Further settings of `--also` take fewer images. `--real`: Fashion-MNIST's folder or its file of test images; by
default the bundled features of it. The result file is rewritten after every repeat, and a run with the same settings,
artifacts and environment goes on where an earlier one ended.

    python bench/equivalence.py --real build/fashion-mnist --bundle

writes the bundled features and does nothing else.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tqdit.calibration.trajectories import InBfloat16
from tqdit.imaging.images import Images
from tqdit.imaging.request import chosen_classes
from tqdit.quality import fashion, features, metrics
from tqdit.quality.artifacts import ComparedArtifact, load_artifact
from tqdit.quality.comparison import fd_fashion
from tqdit.quality.equivalence import ALPHA, BLOCKS, MARGIN, Drawn, Yardstick, verdicts
from tqdit.quality.trial import Trial
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sources.conditions import suitable
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.sources.source import ModelSource
from tqdit.system.environment import environment
from tqdit.system.files import write_text
from tqdit.system.isolation import isolated

MODEL = "fashion-dit"
FLOAT, BF16 = "float32", "bfloat16"


def main() -> None:
    args = arguments()
    torch.backends.cudnn.allow_tf32 = False  # convolutions in fp32: patch embedding and classifier
    with isolated():  # matrix products in fp32, too
        if args.bundle:
            fashion.write_real_features(fashion.read_test_images(args.real).to(args.device))
            print(f"wrote {fashion.FEATURES_FILE.name}: {fashion.FEATURES_FILE.stat().st_size} bytes")
        else:
            measure(args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, nargs="+", default=[], help="folders made from the bundled model")
    parser.add_argument("--num", type=int, default=10_000, help=f"images of every set, a multiple of {BLOCKS}")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--also", nargs="*", type=setting, default=[], metavar="SAMPLER:STEPS:GUIDANCE")
    parser.add_argument("--also-num", type=int, default=1000, help="images of every set for --also")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002], help="repeats, and one seed more")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--real", type=Path, help="Fashion-MNIST's folder or its IDX file of test images")
    parser.add_argument("--bundle", action="store_true", help="write the bundled features of --real, nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.bundle and not args.real:
        parser.error("--bundle needs --real")
    if not args.bundle and not (args.json and args.artifacts):
        parser.error("--json and --artifacts are needed")
    if len(set(args.seeds)) != len(args.seeds) or len(args.seeds) < 2:
        parser.error("--seeds needs two or more different seeds")
    if len({path.resolve().name for path in args.artifacts}) != len(args.artifacts):
        parser.error("--artifacts need different names")
    return args


def setting(text: str) -> Sampling:
    """A further setting, such as ddpm:250:1.5."""
    sampler, steps, guidance = text.split(":")
    return Sampling(sampler, int(steps), float(guidance))


@dataclass
class Lab:
    """The models, what features are taken with, and the float model's images of one setting by seed."""

    source: ModelSource
    model: nn.Module
    artifacts: dict[str, ComparedArtifact]
    quantized: dict[str, nn.Module]
    classifier: features.FashionClassifier
    real: Tensor
    batch: int
    seconds: dict[str, float] = field(default_factory=dict)
    floats: dict[tuple[Sampling, int, int], Drawn] = field(default_factory=dict)

    def trial(self, sampling: Sampling, num: int, seed: int, other: int) -> Trial:
        classes = chosen_classes(self.source, suitable(self.source.config, None))
        wanted = Images(self.source, classes, num, sampling, seed, self.batch)
        return Trial(wanted, other, lambda pixels: features.image_features(pixels, self.classifier), self.real)

    def drawn(self, trial: Trial, model: nn.Module, name: str, seed: int | None = None) -> Drawn:
        """Images and features of a model, whose seconds are kept."""
        start = time.perf_counter()
        found = trial.draw(model, name, seed)
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f"  {len(found.pixels)} images of {name}: {self.seconds[name]} s", flush=True)
        return found

    def float_images(self, trial: Trial, seed: int) -> Drawn:
        """The float model's images of a seed, drawn once: one repeat's other seeds are the next one's own."""
        key = (trial.wanted.sampling, trial.wanted.num, seed)
        if key not in self.floats:
            self.floats = {known: kept for known, kept in self.floats.items() if known[:2] == key[:2]}
            self.floats[key] = self.drawn(trial, self.model, f"{FLOAT}, seed {seed}", seed)
        return self.floats[key]


def prepare(args: argparse.Namespace) -> Lab:
    source = resolve(MODEL)
    model = load_float(source).to(args.device)
    digest = weights_hash(model)
    artifacts = {path.resolve().name: load_artifact(path, source, digest) for path in args.artifacts}
    quantized = {name: convert(entry.solution, device=args.device) for name, entry in artifacts.items()}
    classifier = features.load_fashion_classifier(args.device)
    if args.real:
        images = fashion.read_test_images(args.real)
        real = features.image_features(images[: len(images) // BLOCKS * BLOCKS], classifier)
    else:
        real = fashion.load_real_features()
    return Lab(source, model, artifacts, quantized, classifier, real.to(args.device), args.batch)


def measure(args: argparse.Namespace) -> None:
    lab = prepare(args)
    result: dict[str, Any] = {
        "command": command(),
        "environment": environment(args.device),
        "settings": {
            "model": MODEL, "blocks": BLOCKS, "alpha": ALPHA, "margin_standard_errors": MARGIN, "batch": args.batch,
            "seeds": args.seeds, "real_images": len(lab.real), "real_features": "computed" if args.real else "bundled",
            "artifacts": {name: described(entry) for name, entry in lab.artifacts.items()},
        },
        "trials": [],
    }  # fmt: skip
    kept = kept_trials(args.json, result)
    settings = [(Sampling(args.sampler, args.steps, args.guidance), args.num)]
    settings += [(sampling, args.also_num) for sampling in args.also]
    pairs = list(zip(args.seeds[:-1], args.seeds[1:], strict=True))
    plan = [(*chosen, *pair) for chosen in settings for pair in pairs]
    for chosen in plan:  # every setting is checked before any image is drawn
        lab.trial(*chosen)
    for sampling, num, seed, other in plan:
        head = {**asdict(sampling), "num": num, "seed": seed, "other_seed": other}
        print(json.dumps(head), flush=True)
        earlier = [row for row in kept if all(row[key] == value for key, value in head.items())]
        result["trials"].append(earlier[0] if earlier else head | repeat(lab, lab.trial(sampling, num, seed, other)))
        write_text(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")


def repeat(lab: Lab, trial: Trial) -> dict[str, Any]:
    """The whole test for one setting and one seed."""
    lab.seconds.clear()
    first = lab.float_images(trial, trial.wanted.seed)
    other = lab.float_images(trial, trial.other_seed)
    bf16 = lab.drawn(trial, InBfloat16(lab.model), BF16)
    models = {name: lab.drawn(trial, module, name) for name, module in lab.quantized.items()}
    yardstick = Yardstick(first, bf16.pixels, other.features, lab.real)
    # bf16 is no candidate, so it is judged alone: it shows what the test says about rounding that nobody minds.
    judged = verdicts(models, yardstick) | verdicts({BF16: bf16}, yardstick)
    rows = {name: row(lab, first, drawn) for name, drawn in ({FLOAT: first, BF16: bf16} | models).items()}
    for name, verdict in judged.items():
        rows[name]["verdict"] = verdict.figures()
        decided = {"equivalent": verdict.equivalent, "closer_than_bf16": verdict.closer_than_bf16}
        print(f"  {name}: {decided}, kid {verdict.kid}, margin {verdict.margin:.3g}", flush=True)
    return {"seconds": dict(lab.seconds), "models": rows}


def row(lab: Lab, first: Drawn, drawn: Drawn) -> dict[str, Any]:
    """Figures beside the verdict. The float model has no PSNR to itself."""
    psnr = None if drawn is first else metrics.psnr_db(first.pixels, drawn.pixels)
    return {"psnr_db": psnr, "fd_fashion": fd_fashion(lab.source, drawn.pixels)}


def described(entry: ComparedArtifact) -> dict[str, Any]:
    """Return bits and preset of an artifact, and the hash of its weights."""
    digest = hashlib.sha256()
    for file in sorted(entry.folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    provenance = entry.solution.provenance
    return {"bits": provenance.bits, "preset": provenance.preset_name, "weights_sha256": digest.hexdigest()}


def command() -> str:
    """The command as a line that can be pasted, without the places of absolute paths."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", "bench/equivalence.py", *words])


def kept_trials(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The repeats of an earlier run that measured the same things on the same machine."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    same = all(earlier.get(key) == result[key] for key in ("environment", "settings"))
    return list(earlier["trials"]) if same else []


if __name__ == "__main__":
    main()
