"""Train the bundled model: a Fashion-MNIST classifier and `fashion-dit`, a small class-conditional DiT.

    python examples/train_fashion_dit.py --minutes 7

writes both models and the test set's feature statistics below `--out`, then samples the saved model, writes
what it measured to `bench/results` and a picture to `docs/images`. Meant for one GPU.

    python examples/train_fashion_dit.py --shape DiT-B/2 --minutes 2.5 --out build/dit-b

trains a model of a published shape with the published timestep frequencies instead, and writes it and `training.json`
into `--out`, nothing else: what `bench/full_size.py` takes. `training.json` has the settings, the seed and the steps.

    python examples/train_fashion_dit.py --objective flow --minutes 3 --out build/fashion-sit

trains the bundled model's shape by flow matching, which makes it a SiT, and also writes it into `--out` alone; with
`--shape SiT-S/2` a published shape. Its folder has diffusers' scheduler of flow matching and its conventions: a state
is (1 - sigma) data + sigma noise, the timestep is 1000 sigma, the output is noise - data.

With `--steps`, not `--minutes`, a training can be repeated, up to the order in which a GPU adds.
"""

import argparse
import gzip
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from dit_training import (
    TIMESTEPS,
    Schedule,
    augmented,
    draw,
    loss_of,
    save_classifier,
    save_dit,
    train_classifier,
    train_dit,
    where,
)
from tqdit.architectures.dit_checkpoint import AS_PUBLISHED
from tqdit.architectures.shapes import shape_config, shape_name
from tqdit.quality import features
from tqdit.sources.labels import LABELS

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER = "fashion-classifier"
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
NULL_CLASS = 10  # the label of an unconditional image
OUTPUTS = {"diffusion": 2, "flow": 1}  # eps and the variance's place between its two bounds; a velocity
SAMPLING_BATCH = 1000
SAMPLINGS = (("DDIM", 50, 1.5), ("DDIM", 50, 1.0), ("DDPM", 100, 1.5), ("DDIM", 50, 2.0))
IMAGES = {
    "in_channels": 1,
    "out_channels": OUTPUTS["diffusion"],
    "sample_size": 32,  # pixels
    "num_embeds_ada_norm": NULL_CLASS,
}
MODEL = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "num_layers": 6,
    "patch_size": 2,
    "norm_eps": 1e-6,
    **IMAGES,
}
BUNDLED = Schedule(batch=512, rate=8e-4, warmup=500, ema_decay=0.999)
# Velocities: at 8e-4 a run diverged after 8000 steps.
FLOW = Schedule(batch=512, rate=4e-4, warmup=500, ema_decay=0.999)
# For a wider model and about a thousand steps: a lower rate, reached sooner, and an average over the last hundred.
SHORT = Schedule(batch=256, rate=4e-4, warmup=100, ema_decay=0.99)


def read_split(folder: Path, split: str, device: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] in [-1, 1], padded with -1, and labels [N]; `split` is "train" or "t10k"."""
    arrays = []
    for name, header in ((f"{split}-images-idx3-ubyte.gz", 16), (f"{split}-labels-idx1-ubyte.gz", 8)):
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is missing: --data must hold Fashion-MNIST's four .gz files")
        content = gzip.decompress((folder / name).read_bytes())
        arrays.append(torch.tensor(np.frombuffer(content, np.uint8, offset=header), device=device))
    images = arrays[0].view(-1, 1, 28, 28).float() / 127.5 - 1
    return F.pad(images, (2, 2, 2, 2), value=-1.0), arrays[1].long()


def mirrored_and_shifted(images: Tensor, labels: Tensor) -> Tensor:
    """Images as the classifier is trained on them; the padding is two pixels."""
    return augmented(images, torch.ones_like(labels, dtype=torch.bool), shift=2)


def save_sit(model: DiTTransformer2DModel, folder: Path) -> None:
    """A diffusers transformer and its scheduler of flow matching, for which diffusers has no pipeline."""
    model.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(TIMESTEPS, shift=1.0).save_pretrained(folder / "scheduler")
    (folder / LABELS).write_text(json.dumps(dict(enumerate(NAMES)), indent=2) + "\n")


def save_grid(images: Tensor, path: Path) -> None:
    """The first eight samples of every class, a class a row, at twice their size."""
    rows = images[:80].view(-1, 10, 32, 32).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    picture = Image.fromarray(((rows + 1) * 127.5).round().byte().cpu().numpy())
    picture.resize((512, 640), Image.Resampling.NEAREST).save(path, optimize=True)


def train_alone(args: argparse.Namespace, data: tuple[Tensor, Tensor]) -> None:
    """A model into `--out` and nothing else: of the bundled shape, or of a published one in the published form."""
    config, schedule = MODEL, FLOW if args.objective == "flow" else BUNDLED
    if args.shape:
        config, schedule = {**shape_config(args.shape), **IMAGES, **AS_PUBLISHED}, SHORT
    config = {**config, "out_channels": OUTPUTS[args.objective]}
    loss = loss_of(args.objective, NULL_CLASS, data[0].device)
    model, taken = train_dit(config, schedule, loss, data, args.steps, 60 * args.minutes)
    save_sit(model, args.out) if args.objective == "flow" else save_dit(model, args.out, NAMES)
    settings = {"objective": args.objective, "shape": args.shape or shape_name(config)}
    report = {**where(args.seed), **settings, **asdict(schedule), **taken}
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train fashion-dit and its classifier, or another model alone.")
    parser.add_argument("--data", type=Path, default=Path("build/fashion-mnist"), help="folder with its four files")
    parser.add_argument("--shape", help="train this published shape, such as DiT-B/2 or SiT-S/2, and nothing else")
    parser.add_argument("--objective", choices=OUTPUTS, help="default: that of the shape; flow trains a SiT alone")
    parser.add_argument("--out", type=Path, help="default: where the bundled models are; needed with --shape or flow")
    parser.add_argument("--classifier-epochs", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=12.0, help="training of the model, unless --steps is given")
    parser.add_argument("--steps", type=int, help="training steps of the model; 0 measures the DiT in --out")
    parser.add_argument("--samples", type=int, default=10_000, help="per sampler; a multiple of 10")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=ROOT / "bench/results/fashion-dit-training.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/fashion-dit.png")
    args = parser.parse_args()
    args.objective = args.objective or ("flow" if (args.shape or "").startswith("SiT") else "diffusion")
    if (args.shape or args.objective == "flow") and not args.out:
        parser.error("--shape and --objective flow need --out: the bundled model is another")
    args.out = args.out or features.CLASSIFIER_FILE.parents[1]
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False  # the classifier's features shall be those of a CPU
    train, train_labels = read_split(args.data, "train", args.device)
    if args.shape or args.objective == "flow":
        train_alone(args, (train, train_labels))
        return
    test, test_labels = read_split(args.data, "t10k", args.device)
    started = time.perf_counter()
    epochs = args.classifier_epochs
    trained = train_classifier(features.FashionClassifier(), train, train_labels, epochs, mirrored_and_shifted)
    classifier = save_classifier(trained, test, args.out / CLASSIFIER)

    def distance(images: Tensor) -> float:
        real = features.load_real_statistics(args.out / CLASSIFIER / features.STATISTICS_FILE.name)
        return features.frechet_distance(*features.feature_statistics(images, classifier), *real)

    report: dict[str, Any] = {
        **where(args.seed),
        "classifier_epochs": epochs,
        "classifier_seconds": round(time.perf_counter() - started, 1),
        "classifier_accuracy": features.class_agreement(test, test_labels, classifier),
        "fd_fashion_of_training_images": distance(train[: args.samples]),
    }
    folder = args.out / "fashion-dit"
    if args.steps != 0:
        loss, data = loss_of("diffusion", NULL_CLASS, train.device), (train, train_labels)
        model, taken = train_dit(MODEL, BUNDLED, loss, data, args.steps, 60 * args.minutes)
        report["training"] = {"batch": BUNDLED.batch, "steps": taken["steps"], "seconds": taken["seconds"]}
        save_dit(model, folder, NAMES)
    # What is measured is the model as saved, in float32 with TF32 products where the GPU has them.
    torch.set_float32_matmul_precision("high")
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    model = model.to(args.device).eval()
    labels = torch.arange(args.samples, device=args.device) % 10
    for file in (args.report, args.picture):
        file.parent.mkdir(parents=True, exist_ok=True)
    for name, steps, guidance in SAMPLINGS:
        scheduler = getattr(diffusers, f"{name}Scheduler").from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(steps)
        wanted = labels if name == "DDIM" else labels[:SAMPLING_BATCH]
        images = draw(model, scheduler, guidance, wanted, args.seed, SAMPLING_BATCH)
        if "samples" not in report:
            save_grid(images, args.picture)
        result = {"sampler": name, "steps": steps, "guidance": guidance, "images": len(images)}
        result["class_agreement"] = features.class_agreement(images, wanted, classifier)
        result["fd_fashion"] = distance(images)
        print(result, flush=True)
        report.setdefault("samples", []).append(result)
        args.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
