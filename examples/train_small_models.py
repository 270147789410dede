"""Train a small model of a published architecture, FLUX or Z-Image, on Fashion-MNIST by flow matching.

    python examples/train_small_models.py flux --data .data/fashion --minutes 3.5 --out build/small-flux
    python examples/train_small_models.py z-image --data .data/fashion --minutes 3.5 --out build/small-z-image

Meant for one GPU, which needs about half a minute more than `--minutes`. `--out` gets the model as diffusers saves it
in float16 (`transformer`), its scheduler, the prompts of the classes (`prompts.safetensors`), `training.json` with the
settings and the quality of samples, and a picture of samples. `examples/small_models.py` says what the models are and
loads them. cuDNN's attention is switched off: under torch 2.11 its backward pass fails on FLUX's shapes on an H200.

`--steps 2 --tiny` is a rehearsal on a CPU. With `--steps`, not `--minutes`, a training can be repeated, up to the order
in which a GPU adds.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from dit_training import TIMESTEPS, Schedule, some_dropped, where
from small_models import CLASSES, FAMILIES, NULL_CLASS, TOKENS, WIDTH, Family, SmallPipeline
from tqdit.quality import features
from train_fashion_dit import read_split, save_grid

SCHEDULE = Schedule(batch=256, rate=4e-4, warmup=300, ema_decay=0.999)
SAMPLING_BATCH, STEPS, GUIDANCE = 250, 20, 2.0
REPORTED = 500  # training steps between two readings of the loss, which wait for the device


class Student(nn.Module):
    """A transformer and the prompts of its classes [11, 16, 64], which are trained together."""

    def __init__(self, family: Family, tiny: bool) -> None:
        super().__init__()
        self.family = family
        self.transformer = family.transformer(**{**family.config, **(family.tiny if tiny else {})})
        self.prompts = nn.Parameter(torch.randn(CLASSES + 1, TOKENS, WIDTH))
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear):
                initialise(module, zero=name.endswith(family.zeros))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error of the velocity from the image to the noise, at uniform sigmas."""
        sigma, noise = torch.rand(len(images), device=images.device), torch.randn_like(images)
        state = torch.lerp(images, noise, sigma[:, None, None, None])
        prompts = self.prompts[some_dropped(labels, NULL_CLASS)]
        with torch.autocast(images.device.type, torch.bfloat16):
            velocity = self.family.velocity(self.transformer, state, sigma, prompts)
        return (velocity.float() - (noise - images)).square().mean()

    def prepare(self, device: torch.device, eager: bool = False) -> None:
        """Move the model to the device, where its blocks are compiled if that is a GPU, unless `eager` is asked for."""
        self.to(device).train()
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails on FLUX's shapes (torch 2.11, H200)
        # Nearly clean images carry noise of 0.01 at pixels of -1, about bfloat16's spacing there.
        embedder = self.transformer.get_submodule(self.family.embedder)
        embedder.forward = torch.autocast(device.type, enabled=False)(embedder.forward)
        if device.type == "cuda" and not eager:
            torch._dynamo.config.suppress_errors = True  # a block that does not compile runs uncompiled
            for block in (block for name in self.family.blocks for block in getattr(self.transformer, name)):
                block.compile()


def initialise(layer: nn.Linear, zero: bool) -> None:
    """Start a layer at 0, or with Xavier's uniform weights and no bias."""
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def progress(steps: int | None, seconds: float) -> Iterator[tuple[int, float]]:
    """Yield the number and the share of each training step: of `steps`, or of what fits into `seconds`."""
    started, step, share = time.perf_counter(), 0, 0.0
    while share < 1:
        yield step, share
        step += 1
        share = step / steps if steps else (time.perf_counter() - started) / seconds


def train(
    student: Student, data: tuple[Tensor, Tensor], schedule: Schedule, steps: int | None, seconds: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train on images [N, 1, 32, 32] and labels [N]; return the averaged parameters by name, and what it took."""
    images, labels = data
    named = dict(student.named_parameters())
    parameters, average = list(named.values()), [value.detach().clone() for value in named.values()]
    optimizer = torch.optim.AdamW(parameters, schedule.rate, (0.9, 0.99), weight_decay=0, fused=images.is_cuda)
    started, taken, losses = time.perf_counter(), 0, []
    for step, share in progress(steps, seconds):
        optimizer.param_groups[0]["lr"] = schedule.rate * min(1.0, (step + 1) / schedule.warmup) * (1 - share)
        index = torch.randint(0, len(images), (schedule.batch,), device=images.device)
        loss = student(images[index], labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        taken = step + 1
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(schedule.ema_decay, taken / (taken + 10)))
        if taken % REPORTED == 0:
            losses.append({"step": taken, "velocity": round(loss.item(), 5)})
            print(f"{losses[-1]}, {time.perf_counter() - started:.0f} s", flush=True)
    figures = {"steps": taken, "seconds": round(time.perf_counter() - started, 1), "losses": losses}
    return dict(zip(named, average, strict=True)), figures


def save(family: Family, tiny: bool, average: dict[str, Tensor], out: Path) -> None:
    """Write the averaged model in float16 as diffusers does, its scheduler and its prompts."""
    finished = Student(family, tiny)
    finished.load_state_dict(average)
    scheduler = FlowMatchEulerDiscreteScheduler(TIMESTEPS, shift=1.0)
    SmallPipeline(finished.transformer.half(), scheduler, finished.prompts.data).save(out)


def sampled(pipe: SmallPipeline, number: int, picture: Path) -> dict[str, Any]:
    """Return the quality of so many samples of equally frequent classes, and draw the first of them."""
    device, started = pipe.prompts.device, time.perf_counter()
    labels = torch.arange(number) % CLASSES
    parts = [pipe(part, STEPS, GUIDANCE, seed) for seed, part in enumerate(labels.split(SAMPLING_BATCH))]
    images, classifier = torch.cat(parts), features.load_fashion_classifier(device)
    save_grid(images, picture)
    return {
        "sampler": "Euler",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "images": number,
        "seconds": round(time.perf_counter() - started, 1),
        "class_agreement": features.class_agreement(images, labels, classifier),
        "fd_fashion": features.fd_fashion(images),
    }


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("--data", type=Path, default=Path("build/fashion-mnist"), help="folder of the four .gz files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.5, help="of training, unless --steps is given")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--batch", type=int, default=SCHEDULE.batch)
    parser.add_argument("--tiny", action="store_true", help="a model of few parameters, for a rehearsal")
    parser.add_argument("--samples", type=int, default=1000, help="images that measure the quality; a multiple of 10")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks on a GPU")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = arguments()
    torch.manual_seed(args.seed)
    family, device = FAMILIES[args.model], torch.device(args.device)
    schedule = Schedule(**{**asdict(SCHEDULE), "batch": args.batch})
    data = read_split(args.data, "train", args.device)
    student = Student(family, args.tiny)
    student.prepare(device, args.eager)
    torch.set_float32_matmul_precision("high")
    average, taken = train(student, data, schedule, args.steps, 60 * args.minutes)
    save(family, args.tiny, average, args.out)
    torch.set_float32_matmul_precision("highest")  # the samples are those of the model in float32
    report = {
        **where(args.seed),
        "model": args.model,
        "parameters": sum(parameter.numel() for parameter in student.transformer.parameters()),
        **asdict(schedule),
        **taken,
    }
    if args.samples:
        pipe = SmallPipeline.from_pretrained(args.out, device)
        report["samples"] = sampled(pipe, args.samples, args.out / "samples.png")
        print(report["samples"], flush=True)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
