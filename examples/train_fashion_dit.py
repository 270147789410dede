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
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tqdit.architectures.building import new_model
from tqdit.architectures.dit_checkpoint import AS_PUBLISHED
from tqdit.architectures.shapes import shape_config, shape_name
from tqdit.quality import features
from tqdit.sources.labels import LABELS

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER = Path("fashion-classifier", features.CLASSIFIER_FILE.name)
STATISTICS = Path("fashion-classifier", features.STATISTICS_FILE.name)
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
NULL_CLASS, DROPPED_LABELS = 10, 0.1  # the label of an unconditional image, and its share of the training
CLASSIFIER_BATCH, CLASSIFIER_RATE = 512, 2e-3
SETTLE, MEASURE = 40, 80  # steps left out of, and then taken into, the measured throughput
TIMESTEPS, BETAS = 1000, (1e-4, 0.02)
OUTPUTS = {"diffusion": 2, "flow": 1}  # eps and the variance's place between its two bounds; a velocity
SAMPLING_BATCH = 1000
SAMPLINGS = (("DDIM", 50, 1.5), ("DDIM", 50, 1.0), ("DDPM", 100, 1.5), ("DDIM", 50, 2.0))
IMAGES = {
    "in_channels": 1,
    "out_channels": OUTPUTS["diffusion"],
    "sample_size": 32,  # pixels
    "num_embeds_ada_norm": 10,
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


@dataclass(frozen=True)
class Schedule:
    """How a model is trained. `warmup` steps up to `rate`, from where it falls to 0 in a line; `ema_decay` a step."""

    batch: int
    rate: float
    warmup: int
    ema_decay: float


BUNDLED = Schedule(batch=512, rate=8e-4, warmup=500, ema_decay=0.999)
# The losses of a batch by name, which are added; of the model, images [B, 1, 32, 32] and labels [B].
Loss = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
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


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> features.FashionClassifier:
    """Classifier after `epochs` passes over mirrored and shifted images."""
    device = images.device
    model = features.FashionClassifier().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), CLASSIFIER_RATE, weight_decay=0.02)
    for epoch in range(epochs):
        order = torch.randperm(len(images), device=device).split(CLASSIFIER_BATCH)
        for i, index in enumerate(order):
            done = epoch + i / len(order)
            optimizer.param_groups[0]["lr"] = CLASSIFIER_RATE * min(1.0, done, 1.01 - done / epochs)
            mirrored = torch.rand(len(index), 1, 1, 1, device=device) < 0.5
            batch = torch.where(mirrored, images[index].flip(3), images[index])
            # The padding makes a shift by up to two pixels a plain roll.
            batch = batch.roll(torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(batch)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), labels[index]).backward()
            optimizer.step()
    return model.eval()


def save_classifier(model: nn.Module, test: Tensor, out: Path) -> features.FashionClassifier:
    """Write the classifier in float16 and its statistics of the test images; the classifier as reloaded."""
    state = {name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    (out / CLASSIFIER).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out / CLASSIFIER)
    classifier = features.load_fashion_classifier(test.device, out / CLASSIFIER)
    mean, covariance = features.feature_statistics(test, classifier)
    save_file({"mean": mean, "covariance": covariance}, out / STATISTICS)
    return classifier


def diffusion_table(device: torch.device) -> Tensor:
    """[5, 1000]: signal and noise scale of x_t, reverse mean's error per error of eps, two log-variances."""
    beta = torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64)
    kept = (1 - beta).cumprod(dim=0)
    posterior = beta[1:] * (1 - kept[:-1]) / (1 - kept[1:])
    # At t = 0 the posterior has no variance; the next one stands in, so that its logarithm stays finite.
    log_posterior = torch.cat([posterior[:1], posterior]).log()
    error_scale = beta / ((1 - beta) * (1 - kept)).sqrt()
    rows = kept.sqrt(), (1 - kept).sqrt(), error_scale, beta.log(), log_posterior
    return torch.stack(rows).float().to(device)


def some_dropped(labels: Tensor) -> Tensor:
    """Labels of which a random share is the null class, for guidance."""
    return labels.masked_fill(torch.rand(len(labels), device=labels.device) < DROPPED_LABELS, NULL_CLASS)


def flow_loss(model: nn.Module, x0: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Squared error of the velocity from the image to the noise, at a uniform sigma."""
    sigma, noise = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)
    x = torch.lerp(x0, noise, sigma[:, None, None, None])
    with torch.autocast(x0.device.type, torch.bfloat16):
        output = model(x, timestep=TIMESTEPS * sigma, class_labels=some_dropped(labels)).sample
    return {"velocity": (output.float() - (noise - x0)).square().mean()}


def hybrid_loss(table: Tensor, model: nn.Module, x0: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Squared error of eps, and the variational bound's term in bits per pixel, which trains the variance."""
    t = torch.randint(0, TIMESTEPS, (len(x0),), device=x0.device)
    signal, noise, error_scale, log_beta, log_posterior = table[:, t, None, None, None]
    eps = torch.randn_like(x0)
    labels = some_dropped(labels)
    with torch.autocast(x0.device.type, torch.bfloat16):
        output = model(signal * x0 + noise * eps, timestep=t, class_labels=labels).sample
    estimate, v = output.float().chunk(2, dim=1)
    log_variance = log_posterior + (v + 1) / 2 * (log_beta - log_posterior)
    offset = error_scale * (eps - estimate.detach())
    ratio = log_posterior - log_variance
    divergence = (ratio.exp() - 1 - ratio + offset.square() * (-log_variance).exp()) / 2
    # The last step is scored by the probability of the pixel's own 8-bit bin; the outer bins have open ends.
    width = (-log_variance / 2).exp()
    upper = torch.special.ndtr((1 / 255 - offset) * width).masked_fill(x0 > 0.999, 1.0)
    lower = torch.special.ndtr((-1 / 255 - offset) * width).masked_fill(x0 < -0.999, 0.0)
    surprise = -(upper - lower).clamp(min=1e-12).log()
    bound = torch.where(t.view(-1, 1, 1, 1) == 0, surprise, divergence).mean() / math.log(2)
    return {"eps": (eps - estimate).square().mean(), "bound": bound}


def loss_of(objective: str, device: torch.device) -> Loss:
    """The training loss of "diffusion" or "flow"."""
    return flow_loss if objective == "flow" else partial(hybrid_loss, diffusion_table(device))


def tied_model(config: Mapping[str, Any], device: torch.device) -> DiTTransformer2DModel:
    """A fresh adaLN-Zero model whose blocks share one timestep and class embedder, as in published DiT."""
    model = new_model(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is embedded by a matrix
            nn.init.zeros_(module.bias)
    shared = model.transformer_blocks[0].norm1.emb
    time_mlp = shared.timestep_embedder
    for layer in (shared.class_embedder.embedding_table, time_mlp.linear_1, time_mlp.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    for block in model.transformer_blocks:
        block.norm1.emb = shared
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    # Nearly clean images carry noise of 0.01 at pixels of -1, about bfloat16's spacing there.
    model.pos_embed.forward = torch.autocast(device.type, enabled=False)(model.pos_embed.forward)
    # In training mode every embedder call would drop labels of its own; nothing else depends on the mode.
    return model.eval().to(device)


def untied_model(config: Mapping[str, Any], parameters: dict[str, Tensor]) -> DiTTransformer2DModel:
    """The standard model, each block with its own copy of the shared embedder, in float16."""
    model, owner = new_model(config), r"^transformer_blocks\.\d+\.norm1\.emb\."
    sources = {name: re.sub(owner, "transformer_blocks.0.norm1.emb.", name) for name in model.state_dict()}
    model.load_state_dict({name: parameters[source] for name, source in sources.items()})
    return model.half()


def train_dit(
    config: Mapping[str, Any],
    schedule: Schedule,
    loss: Loss,
    data: tuple[Tensor, Tensor],
    steps: int | None,
    seconds: float,
) -> tuple[DiTTransformer2DModel, dict[str, Any]]:
    """Averaged model and what its training took: `steps`, or as many as fit into `seconds`.

    `data`: images [N, 1, 32, 32] and labels [N].
    """
    images, labels = data
    device = images.device
    model = tied_model(config, device)
    named = dict(model.named_parameters())
    parameters, average = list(named.values()), [value.detach().clone() for value in named.values()]
    optimizer = torch.optim.AdamW(parameters, schedule.rate, (0.9, 0.99), weight_decay=0, fused=device.type == "cuda")
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True  # a block that does not compile runs uncompiled
        for block in model.transformer_blocks:
            block.compile()
    total, step, settled = steps or 10**9, 0, 0.0
    started = time.perf_counter()
    while step < total:
        rate = schedule.rate * min(1.0, (step + 1) / schedule.warmup) * (1 - step / total)
        optimizer.param_groups[0]["lr"] = rate
        index = torch.randint(0, len(images), (schedule.batch,), device=device)
        losses = loss(model, images[index], labels[index])
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), start=torch.zeros((), device=device)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(schedule.ema_decay, step / (step + 10)))
        if step in (SETTLE, SETTLE + MEASURE, total) or step % 1000 == 0:
            # Reading the losses waits for the device, so the clock below covers finished work.
            said = " ".join(f"{name} {value.item():.5f}" for name, value in losses.items())
            spent = time.perf_counter() - started
            if step == SETTLE:
                settled = spent
            elif step == SETTLE + MEASURE and steps is None:
                total = step + max(1, int((seconds - spent) * MEASURE / (spent - settled)))
            print(f"step {step}/{total}: {said}, {spent:.0f} s", flush=True)
    spent = round(time.perf_counter() - started, 1)
    return untied_model(config, dict(zip(named, average, strict=True))), {"steps": total, "seconds": spent}


def save_sit(model: DiTTransformer2DModel, folder: Path) -> None:
    """A diffusers transformer and its scheduler of flow matching, for which diffusers has no pipeline."""
    model.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(TIMESTEPS, shift=1.0).save_pretrained(folder / "scheduler")
    (folder / LABELS).write_text(json.dumps(dict(enumerate(NAMES)), indent=2) + "\n")


def save_dit(model: DiTTransformer2DModel, folder: Path) -> None:
    """A standard diffusers pipeline folder without a VAE."""
    model.save_pretrained(folder / "transformer")
    # DDIM has no use for the variance's type, but keeps it for a DDPMScheduler made from its configuration.
    # It must not clip: diffusers then clips x_0 but not eps, and the disagreement shows as debris in samples.
    ddpm = DDPMScheduler(TIMESTEPS, *BETAS, "linear", variance_type="learned_range", clip_sample=False)
    DDIMScheduler.from_config(ddpm.config).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(i): name for i, name in enumerate(NAMES)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.inference_mode()
def draw(model: DiTTransformer2DModel, scheduler: Any, guidance: float, labels: Tensor, seed: int) -> Tensor:
    """Images [N, 1, 32, 32] of `labels`, with the eps estimate null + guidance * (class - null)."""
    generator, images = torch.Generator(labels.device).manual_seed(seed), []
    for part in labels.split(SAMPLING_BATCH):
        x = torch.randn((len(part), 1, 32, 32), generator=generator, device=labels.device)
        for step in scheduler.timesteps.tolist():
            t = torch.full_like(part, step)
            eps, v = model(x, timestep=t, class_labels=part).sample.chunk(2, dim=1)
            if guidance != 1.0:
                null = model(x, timestep=t, class_labels=torch.full_like(part, NULL_CLASS)).sample[:, :1]
                eps = null + guidance * (eps - null)
            output = torch.cat([eps, v], dim=1) if isinstance(scheduler, DDPMScheduler) else eps
            x = scheduler.step(output, step, x, generator=generator).prev_sample
        images.append(x.clamp(-1, 1))
    return torch.cat(images)


def save_grid(images: Tensor, path: Path) -> None:
    """The first eight samples of every class, a class a row, at twice their size."""
    rows = images[:80].view(-1, 10, 32, 32).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    picture = Image.fromarray(((rows + 1) * 127.5).round().byte().cpu().numpy())
    picture.resize((512, 640), Image.Resampling.NEAREST).save(path, optimize=True)


def where(args: argparse.Namespace) -> dict[str, Any]:
    """What a training depends on besides its settings."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "seed": args.seed,
    }


def train_alone(args: argparse.Namespace, data: tuple[Tensor, Tensor]) -> None:
    """A model into `--out` and nothing else: of the bundled shape, or of a published one in the published form."""
    config, schedule = MODEL, FLOW if args.objective == "flow" else BUNDLED
    if args.shape:
        config, schedule = {**shape_config(args.shape), **IMAGES, **AS_PUBLISHED}, SHORT
    config = {**config, "out_channels": OUTPUTS[args.objective]}
    loss = loss_of(args.objective, data[0].device)
    model, taken = train_dit(config, schedule, loss, data, args.steps, 60 * args.minutes)
    (save_sit if args.objective == "flow" else save_dit)(model, args.out)
    settings = {"objective": args.objective, "shape": args.shape or shape_name(config)}
    report = {**where(args), **settings, **asdict(schedule), **taken}
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
    classifier = save_classifier(train_classifier(train, train_labels, args.classifier_epochs), test, args.out)

    def distance(images: Tensor) -> float:
        real = features.load_real_statistics(args.out / STATISTICS)
        return features.frechet_distance(*features.feature_statistics(images, classifier), *real)

    report: dict[str, Any] = {
        **where(args),
        "classifier_epochs": args.classifier_epochs,
        "classifier_seconds": round(time.perf_counter() - started, 1),
        "classifier_accuracy": features.class_agreement(test, test_labels, classifier),
        "fd_fashion_of_training_images": distance(train[: args.samples]),
    }
    folder = args.out / "fashion-dit"
    if args.steps != 0:
        loss, data = loss_of("diffusion", train.device), (train, train_labels)
        model, taken = train_dit(MODEL, BUNDLED, loss, data, args.steps, 60 * args.minutes)
        report["training"] = {"batch": BUNDLED.batch, **taken}
        save_dit(model, folder)
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
        images = draw(model, scheduler, guidance, wanted, args.seed)
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
