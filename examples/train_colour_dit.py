"""Train a colour model: a DiT-S/2 for emoji of 32 x 32 pixels, and a classifier whose features measure its samples.

    python examples/train_colour_dit.py --data .data/colour/emoji.npz --minutes 7 --out build/colour

`examples/colour_data.py` makes the file and says where its pictures come from. Meant for one GPU, which needs about a
minute more than `--minutes`. Below `--out` it writes the model as a diffusers pipeline without a VAE in float16
(`dit`), the classifier with the statistics of the held-out images (`classifier`), `training.json` and a grid of
samples.
The model is a second one on which methods are tried that were chosen on another: no default is set by its figures.
"""

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from PIL import Image
from torch import Tensor, nn

import colour_data
from colour_data import Colours
from dit_training import (
    Loss,
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
from tqdit.architectures.shapes import shape_config, shape_name
from tqdit.quality import features

SHAPE = "DiT-S/2"
SCHEDULE = Schedule(batch=256, rate=4e-4, warmup=500, ema_decay=0.999)
CHANNELS = 3
STEPS, GUIDANCE, SAMPLING_BATCH, COLUMNS = 50, 1.5, 500, 8


def augment(mirrors: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Images mirrored where their class allows it, and shifted by up to the border."""
    return augmented(images, mirrors[labels], colour_data.BORDER)


def augmented_loss(loss: Loss, mirrors: Tensor, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A loss of augmented images."""
    return loss(model, augment(mirrors, images, labels), labels)


def config_for(colours: Colours, shape: str) -> dict[str, Any]:
    """The diffusers config of a model for these images, of a published shape."""
    images = {"in_channels": CHANNELS, "out_channels": 2 * CHANNELS, "sample_size": colour_data.SIDE}
    return {**shape_config(shape), **images, "num_embeds_ada_norm": len(colours.names), "norm_eps": 1e-6}


def train_colour_classifier(colours: Colours, epochs: int, out: Path) -> tuple[features.FashionClassifier, dict]:
    """Write a classifier of the images below `out`; returns it with the figures of its training."""
    started = time.perf_counter()
    model = features.FashionClassifier(CHANNELS, len(colours.names))
    trained = train_classifier(model, *colours.train, epochs, partial(augment, colours.mirrors))
    classifier = save_classifier(trained, colours.test[0], out / "classifier")
    figures = {
        "epochs": epochs,
        "seconds": round(time.perf_counter() - started, 1),
        "train_accuracy": features.class_agreement(*colours.train, classifier),
        "test_accuracy": features.class_agreement(*colours.test, classifier),
    }
    return classifier, figures


def sampled(args: argparse.Namespace, classifier: features.FashionClassifier, colours: Colours) -> dict[str, Any]:
    """Figures of samples of the model as saved, whose classes are as frequent as those of the training images."""
    model = DiTTransformer2DModel.from_pretrained(args.out / "dit/transformer", torch_dtype=torch.float32)
    model = model.to(args.device).eval()
    scheduler = DDIMScheduler.from_pretrained(args.out / "dit/scheduler")
    scheduler.set_timesteps(args.sampling_steps)
    real = features.load_real_statistics(args.out / "classifier" / features.STATISTICS_FILE.name)
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(colours.train[1]), generator=generator)[: args.samples].to(args.device)
    labels = colours.train[1][chosen]
    started = time.perf_counter()

    def distance(images: Tensor) -> float:
        return features.frechet_distance(*features.feature_statistics(images, classifier), *real)

    images = draw(model, scheduler, GUIDANCE, labels, args.seed, SAMPLING_BATCH)
    rows = torch.arange(len(colours.names), device=args.device).repeat_interleave(COLUMNS)
    save_grid(draw(model, scheduler, GUIDANCE, rows, args.seed, SAMPLING_BATCH), args.out / "samples.png")
    return {
        "sampler": "DDIM",
        "steps": args.sampling_steps,
        "guidance": GUIDANCE,
        "images": len(images),
        "seconds": round(time.perf_counter() - started, 1),
        "class_agreement": features.class_agreement(images, labels, classifier),
        "fd": distance(images),
        "fd_of_training_images": distance(colours.train[0][chosen]),
    }


def save_grid(images: Tensor, path: Path) -> None:
    """A picture of the images, `COLUMNS` a row."""
    side = colour_data.SIDE
    tiles = images.view(-1, COLUMNS, CHANNELS, side, side).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(((tiles + 1) * 127.5).round().byte().cpu().numpy()).save(path, optimize=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/colour/emoji.npz"))
    parser.add_argument("--out", type=Path, default=Path("build/colour"))
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--classifier-epochs", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=7.0, help="training of the DiT, unless --steps is given")
    parser.add_argument("--steps", type=int, help="training steps of the DiT")
    parser.add_argument("--samples", type=int, default=1000, help="images drawn for the Fréchet distance")
    parser.add_argument("--sampling-steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="also write training.json here, such as bench/results/...")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = arguments()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False  # the classifier's features shall be those of a CPU
    colours = colour_data.load(args.data, args.device)
    config = config_for(colours, args.shape)
    classifier, figures = train_colour_classifier(colours, args.classifier_epochs, args.out)
    print(figures, flush=True)
    loss = loss_of("diffusion", len(colours.names), colours.mirrors.device)
    loss = partial(augmented_loss, loss, colours.mirrors)
    model, taken = train_dit(config, SCHEDULE, loss, colours.train, args.steps, 60 * args.minutes)
    save_dit(model, args.out / "dit", colours.names)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.set_float32_matmul_precision("high")
    report = {
        **where(args.seed),
        "shape": shape_name(config),
        "parameters": parameters,
        "data_sha256": colours.sha256,
        "images_train_test": colours.counts(),
        "classifier": figures,
        "training": {**asdict(SCHEDULE), **taken},
        "samples": sampled(args, classifier, colours),
    }
    for file in filter(None, (args.out / "training.json", args.report)):
        file.write_text(json.dumps(report, indent=1) + "\n")
    print(report["samples"], flush=True)


if __name__ == "__main__":
    main()
