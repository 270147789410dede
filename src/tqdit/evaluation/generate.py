"""Images from a float or quantized model. Image i depends on (seed, i) and its class alone."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.files import write_bytes
from tqdit.models.sampler import Progress, Sampling, noise_generators, trajectory


def sample_latents(
    model: nn.Module,
    scheduler: Mapping[str, Any] | None,
    classes: list[int],
    sampling: Sampling,
    seed: int,
    progress: Progress = lambda _: None,
    batch: int = 16,
    first: int = 0,
) -> torch.Tensor:
    """x_0 for each entry of `classes`, (len, C, H, W), fp32 on the CPU. Image i has the index `first` + i."""
    device = next(iter(model.buffers())).device
    images = []
    for start in range(0, len(classes), batch):
        labels = torch.tensor(classes[start : start + batch], device=device)
        generators = noise_generators(seed, range(first + start, first + start + len(labels)))
        for step, (_, x) in enumerate(trajectory(model, scheduler, sampling, labels, generators)):
            progress((start + len(labels) * step / sampling.steps) / len(classes))
            state = x
        images.append(state.cpu())
    return torch.cat(images)


def check_decodable(channels: int, vae_folder: Path | None) -> None:
    """Raise `InputError` if `to_pixels` cannot make images of latents with so many channels; called before sampling."""
    if vae_folder is None and channels not in (1, 3):
        raise InputError(
            f"the model makes {channels} channels, which are no image without a decoder; give the pipeline folder "
            "with its vae"
        )
    if vae_folder is not None and not any(vae_folder.glob("*.safetensors")):
        raise InputError(f"{vae_folder} has no .safetensors weights")


def to_pixels(latents: torch.Tensor, vae_folder: Path | None) -> torch.Tensor:
    """Images in [-1, 1]: decoded by the pipeline's VAE, or the model's own output where there is none.

    Raises `InputError` as `check_decodable` does.
    """
    check_decodable(latents.shape[1], vae_folder)
    if vae_folder is None:
        return latents.clamp(-1, 1)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True).eval().requires_grad_(False)
    with torch.inference_mode():
        decoded = [vae.decode(x[None] / vae.config.scaling_factor).sample for x in latents]
    return torch.cat(decoded).clamp(-1, 1)


def image_grid(pixels: torch.Tensor, columns: int, scale: int = 2) -> Any:
    """A PIL image of (N, C, H, W) pixels in [-1, 1], row by row, enlarged `scale` times without smoothing."""
    from PIL import Image

    n, c, h, w = pixels.shape
    rows = -(-n // columns)
    canvas = torch.full((rows * columns, c, h, w), 1.0)
    canvas[:n] = pixels
    sheet = canvas.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    array = ((sheet + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    image = Image.fromarray(array[..., 0] if c == 1 else array[..., :3])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_grid(pixels: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Write `image_grid` as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    image_grid(pixels, columns=min(len(pixels), columns)).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
