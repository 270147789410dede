"""What the examples that train a model share: the losses, the training loop, the classifier and the sampling."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from tqdit.architectures.building import new_model
from tqdit.quality import features

DROPPED_LABELS = 0.1  # the share of the training with the label of an unconditional image
CLASSIFIER_BATCH, CLASSIFIER_RATE = 512, 2e-3
OVERTIME = 1.03  # a training ends there although its speed has promised more steps
SETTLE, MEASURE = 40, 80  # steps left out of, and then taken into, the measured throughput
TIMESTEPS, BETAS = 1000, (1e-4, 0.02)


@dataclass(frozen=True)
class Schedule:
    """How a model is trained. `warmup` steps up to `rate`, from where it falls to 0 in a line; `ema_decay` a step."""

    batch: int
    rate: float
    warmup: int
    ema_decay: float


# The losses of a batch by name, which are added; of the model, images [B, C, 32, 32] and labels [B].
Loss = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
Augment = Callable[[Tensor, Tensor], Tensor]  # images [B, C, H, W] and labels [B] to images


def augmented(images: Tensor, mirrors: Tensor, shift: int) -> Tensor:
    """Half of the images that `mirrors` [N] allows, mirrored; all moved by up to `shift` pixels, their border."""
    mirrored = mirrors.view(-1, 1, 1, 1) & (torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5)
    batch = torch.where(mirrored, images.flip(3), images)
    # The border makes a shift a plain roll.
    return batch.roll(torch.randint(-shift, shift + 1, (2,)).tolist(), dims=(2, 3))


def train_classifier(
    model: features.FashionClassifier, images: Tensor, labels: Tensor, epochs: int, augment: Augment
) -> features.FashionClassifier:
    """The classifier after `epochs` passes over augmented images."""
    device = images.device
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), CLASSIFIER_RATE, weight_decay=0.02)
    for epoch in range(epochs):
        order = torch.randperm(len(images), device=device).split(CLASSIFIER_BATCH)
        for i, index in enumerate(order):
            done = epoch + i / len(order)
            optimizer.param_groups[0]["lr"] = CLASSIFIER_RATE * min(1.0, done, 1.01 - done / epochs)
            batch = augment(images[index], labels[index])
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(batch)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), labels[index]).backward()
            optimizer.step()
    return model.eval()


def save_classifier(model: nn.Module, test: Tensor, folder: Path) -> features.FashionClassifier:
    """Write the classifier in float16 and its statistics of the test images; the classifier as reloaded."""
    state = {name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / features.CLASSIFIER_FILE.name
    save_file(state, file)
    classifier = features.load_fashion_classifier(test.device, file)
    mean, covariance = features.feature_statistics(test, classifier)
    save_file({"mean": mean, "covariance": covariance}, folder / features.STATISTICS_FILE.name)
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


def some_dropped(labels: Tensor, null: int) -> Tensor:
    """Labels of which a random share is the null class, for guidance."""
    return labels.masked_fill(torch.rand(len(labels), device=labels.device) < DROPPED_LABELS, null)


def flow_loss(null: int, model: nn.Module, x0: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Squared error of the velocity from the image to the noise, at a uniform sigma."""
    sigma, noise = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)
    x = torch.lerp(x0, noise, sigma[:, None, None, None])
    with torch.autocast(x0.device.type, torch.bfloat16):
        output = model(x, timestep=TIMESTEPS * sigma, class_labels=some_dropped(labels, null)).sample
    return {"velocity": (output.float() - (noise - x0)).square().mean()}


def hybrid_loss(table: Tensor, null: int, model: nn.Module, x0: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Squared error of eps, and the variational bound's term in bits per pixel, which trains the variance."""
    t = torch.randint(0, TIMESTEPS, (len(x0),), device=x0.device)
    signal, noise, error_scale, log_beta, log_posterior = table[:, t, None, None, None]
    eps = torch.randn_like(x0)
    labels = some_dropped(labels, null)
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


def loss_of(objective: str, null: int, device: torch.device) -> Loss:
    """The training loss of "diffusion" or "flow"; `null` is the label of an unconditional image."""
    return partial(flow_loss, null) if objective == "flow" else partial(hybrid_loss, diffusion_table(device), null)


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

    `data`: images [N, C, 32, 32] and labels [N].
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
    total, step, settled, history = steps or 10**9, 0, 0.0, []
    started = time.perf_counter()
    while step < total and (steps is not None or time.perf_counter() - started < OVERTIME * seconds):
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
            read = {name: round(value.item(), 5) for name, value in losses.items()}
            history.append({"step": step, **read})
            spent = time.perf_counter() - started
            if step == SETTLE:
                settled = spent
            elif step == SETTLE + MEASURE and steps is None:
                total = step + max(1, int((seconds - spent) * MEASURE / (spent - settled)))
            print(f"step {step}/{total}: {read}, {spent:.0f} s", flush=True)
    spent = round(time.perf_counter() - started, 1)
    return untied_model(config, dict(zip(named, average, strict=True))), {
        "steps": step,
        "seconds": spent,
        "losses": history,
    }


def save_dit(model: DiTTransformer2DModel, folder: Path, names: Sequence[str]) -> None:
    """A standard diffusers pipeline folder without a VAE."""
    model.save_pretrained(folder / "transformer")
    # DDIM has no use for the variance's type, but keeps it for a DDPMScheduler made from its configuration.
    # It must not clip: diffusers then clips x_0 but not eps, and the disagreement shows as debris in samples.
    ddpm = DDPMScheduler(TIMESTEPS, *BETAS, "linear", variance_type="learned_range", clip_sample=False)
    DDIMScheduler.from_config(ddpm.config).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.inference_mode()
def draw(
    model: DiTTransformer2DModel, scheduler: Any, guidance: float, labels: Tensor, seed: int, batch: int
) -> Tensor:
    """Images [N, C, H, W] of `labels`, with the eps estimate null + guidance * (class - null)."""
    generator, images, config = torch.Generator(labels.device).manual_seed(seed), [], model.config
    shape = config.in_channels, config.sample_size, config.sample_size
    for part in labels.split(batch):
        x = torch.randn((len(part), *shape), generator=generator, device=labels.device)
        null_labels = torch.full_like(part, config.num_embeds_ada_norm)
        for step in scheduler.timesteps.tolist():
            t = torch.full_like(part, step)
            eps, v = model(x, timestep=t, class_labels=part).sample.chunk(2, dim=1)
            if guidance != 1.0:
                null = model(x, timestep=t, class_labels=null_labels).sample[:, : config.in_channels]
                eps = null + guidance * (eps - null)
            output = torch.cat([eps, v], dim=1) if isinstance(scheduler, DDPMScheduler) else eps
            x = scheduler.step(output, step, x, generator=generator).prev_sample
        images.append(x.clamp(-1, 1))
    return torch.cat(images)


def where(seed: int) -> dict[str, Any]:
    """What a training depends on besides its settings."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "seed": seed,
    }
