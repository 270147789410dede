"""Images from a float or quantized model. Image i depends on (seed, i) and its condition alone."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.architectures.registry import config_of
from tqdit.errors import InputError
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.sampling.trajectory import Progress, noise_generators, trajectory
from tqdit.sources.components import check_vae
from tqdit.system.distributed import batches
from tqdit.system.files import CONFIG, read_json, write_bytes
from tqdit.system.reading import check_regular

MOST_LAYERS, MOST_CHANNELS = 64, 2**14  # of a block of a decoder; published ones have 2 to 4, and 512


def sample_batches(
    model: nn.Module,
    scheduler: Mapping[str, Any] | None,
    classes: Sequence[int] | Mapping[int, int],
    sampling: Sampling,
    seed: int,
    members: Sequence[range],
    progress: Progress = lambda _: None,
    conditions: Conditions | None = None,
) -> Iterator[torch.Tensor]:
    """x_0 of every batch in `members`, as it is finished: (len(batch), C, H, W), fp32 on the CPU.

    A batch is the indices of its images; `classes[i]` is the index of image i's condition, which is a class of the
    model where no `conditions` are given. `progress` is told the finished fraction.
    """
    device = next(iter(model.buffers())).device
    config = config_of(model)
    conditions, sample = conditions or registry.conditions(config), registry.sample(config)
    total, done = sum(map(len, members)), 0
    for indices in members:
        labels = torch.tensor([classes[i] for i in indices], device=device)
        generators = noise_generators(seed, indices)
        states = trajectory(model, scheduler, sampling, labels, generators, conditions, sample)
        for step, (_, x) in enumerate(states):
            progress((done + len(indices) * step / sampling.steps) / total)
            state = x
        done += len(indices)
        yield finite(state, indices)


def finite(state: torch.Tensor, indices: range) -> torch.Tensor:
    """The finished states on the CPU; `InputError` if one is NaN or Inf, of which an image would be made in silence."""
    state = state.cpu()
    broken = [i for i, x in zip(indices, state, strict=True) if not x.isfinite().all()]
    if broken:
        raise InputError(
            f"sampling gave NaN or Inf in {len(broken)} of {len(state)} images, first in image {broken[0]}; check the "
            "guidance and scheduler_config.json"
        )
    return state


def sample_latents(
    model: nn.Module,
    scheduler: Mapping[str, Any] | None,
    classes: list[int],
    sampling: Sampling,
    seed: int,
    progress: Progress = lambda _: None,
    batch: int = 16,
    conditions: Conditions | None = None,
) -> torch.Tensor:
    """x_0 for each entry of `classes`, (len, C, H, W), fp32 on the CPU; as `sample_batches`."""
    members = batches(len(classes), batch)
    return torch.cat(list(sample_batches(model, scheduler, classes, sampling, seed, members, progress, conditions)))


def check_decodable(channels: int, vae_folder: Path | None) -> None:
    """Raise `InputError` if `to_pixels` cannot make images of latents with so many channels; called before sampling."""
    if vae_folder is None and channels not in (1, 3):
        raise InputError(
            f"the model makes {channels} channels, which are no image without a decoder; give the pipeline folder "
            "with its vae"
        )
    if vae_folder is not None:
        check_vae(vae_folder, channels)


def decoder(vae_folder: Path | None, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents to images in [-1, 1], both on the CPU: by the pipeline's VAE on `device`, or as they are without one."""
    if vae_folder is None:
        return lambda latents: latents.clamp(-1, 1)
    vae = _autoencoder(vae_folder).eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        images = [vae.decode(x[None].to(device) / vae.config.scaling_factor).sample.cpu() for x in latents]
        return torch.cat(images).clamp(-1, 1)

    return decode


def _autoencoder(folder: Path) -> Any:
    """Return the decoder of a folder, loaded by diffusers.

    Raises `InputError` naming the folder for what diffusers refuses, and for weights that are missing or of another
    shape: diffusers would draw them at random. What is no regular file is not waited for.
    """
    from diffusers import AutoencoderKL

    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            check_regular(path)
    _check_depth(folder)
    try:
        vae, notes = AutoencoderKL.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # whatever diffusers runs into when a config has another type than it expects
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder} is no decoder that diffusers can load: {reason}") from None
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(map(str, notes[problem])):
            raise InputError(f"{folder}: weights and config do not fit: {problem.replace('_', ' ')}: {keys[0]}")
    return vae


def _check_depth(folder: Path) -> None:
    """`InputError` for a config of more layers or channels than any decoder has: building them could take for ever."""
    config = read_json(folder / CONFIG)
    layers, channels = config.get("layers_per_block", 1), config.get("block_out_channels", [])
    if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
        raise InputError(f"{folder / CONFIG} has layers_per_block = {layers!r}; it must be from 1 to {MOST_LAYERS}")
    if not isinstance(channels, list) or any(type(c) is not int or not 1 <= c <= MOST_CHANNELS for c in channels):
        raise InputError(f"{folder / CONFIG} has block_out_channels that are not from 1 to {MOST_CHANNELS}")


def to_pixels(latents: torch.Tensor, vae_folder: Path | None) -> torch.Tensor:
    """Images in [-1, 1]: decoded by the pipeline's VAE, or the model's own output where there is none.

    Raises `InputError` as `check_decodable` does.
    """
    check_decodable(latents.shape[1], vae_folder)
    return decoder(vae_folder, latents.device)(latents)


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


def to_pil(pixels: torch.Tensor) -> list[Any]:
    """A PIL image for each of (N, C, H, W) pixels in [-1, 1], in its own size."""
    return [image_grid(image[None], columns=1, scale=1) for image in pixels]


def save_grid(pixels: torch.Tensor, path: str | Path, columns: int = 8) -> None:
    """Write `image_grid` of (N, C, H, W) pixels in [-1, 1] as a PNG, whole or not at all."""
    save_picture(image_grid(pixels, columns=min(len(pixels), columns)), Path(path))


def save_image(pixels: torch.Tensor, path: Path) -> None:
    """Write one image (C, H, W) in [-1, 1] as a PNG in its own size, whole or not at all."""
    save_picture(image_grid(pixels[None], columns=1, scale=1), path)


def save_picture(image: Any, path: Path) -> None:
    """Write a PIL image as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
