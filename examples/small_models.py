"""Two small models of published architectures, `flux` and `z-image`, that make Fashion-MNIST's images.

They are diffusers' own classes at 25 to 30 million parameters. A label's prompt is a learned sequence of tokens, so no
text encoder is needed. `SmallPipeline` calls the transformer as diffusers' FluxPipeline and ZImagePipeline do.

    pipe = SmallPipeline.from_pretrained("build/small-flux", device="cuda")
    images = pipe(torch.tensor([3, 8]), steps=20, guidance=2.0, seed=0)  # [2, 1, 32, 32] in [-1, 1]

`examples/train_small_models.py` trains them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE, PATCH = 32, 2  # pixels of an image, and of a patch
GRID = SIDE // PATCH  # patches a side
CLASSES, NULL_CLASS = 10, 10  # the last prompt is that of an unconditional image
TOKENS, WIDTH = 16, 64  # of a prompt
SEQUENCE = 32  # Z-Image fills a prompt up to a multiple of so many tokens
PROMPTS, TIMESTEPS = "prompts.safetensors", 1000

# Transformer, images [B, 1, 32, 32], sigma [B] and prompts [B, 16, 64] -> velocity [B, 1, 32, 32], noise - image.
Velocity = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
# The same with the prompts of the null class and the guidance g: null + g (prompt - null).
Guided = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def patches(images: Tensor) -> Tensor:
    """Return the patches [B, 256, 4] of images [B, 1, 32, 32], as both families order them."""
    return images.view(-1, GRID, PATCH, GRID, PATCH).transpose(2, 3).reshape(len(images), GRID**2, PATCH**2)


def unpatched(sequence: Tensor) -> Tensor:
    """Return the images [B, 1, 32, 32] of patches [B, 256, 4]."""
    return sequence.view(-1, GRID, GRID, PATCH, PATCH).transpose(2, 3).reshape(-1, 1, SIDE, SIDE)


def flux_call(transformer: nn.Module, sequence: Tensor, timestep: Tensor, prompts: Tensor) -> Tensor:
    """Return what the transformer makes of patches [B, 256, 4]: one call as in FluxPipeline, the timestep in [0, 1]."""
    rows = torch.arange(GRID, device=sequence.device, dtype=sequence.dtype)
    places = torch.stack([torch.zeros(GRID, GRID).to(rows), *torch.meshgrid(rows, rows, indexing="ij")], dim=-1)
    return transformer(
        hidden_states=sequence,
        timestep=timestep,
        guidance=None,
        pooled_projections=prompts.mean(dim=1),
        encoder_hidden_states=prompts,
        txt_ids=sequence.new_zeros(TOKENS, 3),
        img_ids=places.flatten(0, 1),
        joint_attention_kwargs={},
        return_dict=False,
    )[0]


def flux_velocity(transformer: nn.Module, images: Tensor, sigma: Tensor, prompts: Tensor) -> Tensor:
    """Return a FLUX transformer's velocity."""
    return unpatched(flux_call(transformer, patches(images), sigma, prompts))


def flux_guided(
    transformer: nn.Module, images: Tensor, t: Tensor, prompts: Tensor, null: Tensor, guidance: float
) -> Tensor:
    """Return the guided velocity from two calls; FluxPipeline calls `guidance` the true CFG scale."""
    sequence, timestep = patches(images), t.to(images.dtype) / TIMESTEPS
    velocity = flux_call(transformer, sequence, timestep, prompts)
    if guidance > 1:
        other = flux_call(transformer, sequence, timestep, null)
        velocity = other + guidance * (velocity - other)
    return unpatched(velocity)


def z_image_guided(
    transformer: nn.Module, images: Tensor, t: Tensor, prompts: Tensor, null: Tensor, guidance: float
) -> Tensor:
    """Return the guided velocity from one call of both halves; ZImagePipeline's guidance scale is `guidance` - 1.

    The transformer takes 1 - sigma, and its output is the negative velocity.
    """
    timestep, dtype = (TIMESTEPS - t) / TIMESTEPS, prompts.dtype
    states, texts = images.to(dtype), list(prompts.unbind())
    if guidance > 1:
        states, timestep, texts = states.repeat(2, 1, 1, 1), timestep.repeat(2), texts + list(null.unbind())
    listed = list(states.unsqueeze(2).unbind())
    output = transformer(listed, timestep, texts, joint_attention_kwargs=None, return_dict=False)[0]
    made = torch.stack([part.float() for part in output]).squeeze(2)
    if guidance > 1:
        prompted, other = made.chunk(2)
        made = prompted + (guidance - 1) * (prompted - other)
    return -made


def z_image_velocity(model: nn.Module, images: Tensor, sigma: Tensor, prompts: Tensor) -> Tensor:
    """Return a Z-Image transformer's velocity for images of one size, computed by batches.

    The model's own forward prepares one image after another; in training that would take longer than the blocks.
    """
    x = model.all_x_embedder["2-1"](patches(images))
    one = model.patchify_and_embed([images[0].unsqueeze(1)], [prompts[0]], PATCH, 1)
    image_places, text_places = (
        model.rope_embedder(one[i][0])[:length] for i, length in ((3, len(x[0])), (4, SEQUENCE))
    )
    condition = model.t_embedder((1 - sigma) * model.t_scale).type_as(x)
    for block in model.noise_refiner:
        x = block(x, None, image_places[None], condition)
    padding = model.cap_pad_token.expand(len(x), SEQUENCE - TOKENS, -1)
    text = torch.cat([model.cap_embedder(prompts).type_as(x), padding.type_as(x)], dim=1)
    for block in model.context_refiner:
        text = block(text, None, text_places[None])
    both, places = torch.cat([x, text], dim=1), torch.cat([image_places, text_places])[None]
    for block in model.layers:
        both = block(both, None, places, condition)
    return -unpatched(model.all_final_layer["2-1"](both, c=condition)[:, : GRID**2])


@dataclass(frozen=True)
class Family:
    """A diffusers class at a small size, and how it is called.

    `tiny` changes the config for a test. `zeros`: name endings of the layers that start at 0. `blocks`: attributes that
    hold the blocks. `embedder`: the layer of the patches. `typed`: whether the state takes the transformer's dtype.
    """

    transformer: type
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    velocity: Velocity
    guided: Guided
    zeros: tuple[str, ...]
    blocks: tuple[str, ...]
    embedder: str
    typed: bool


FAMILIES = {
    "flux": Family(
        FluxTransformer2DModel,
        {
            "in_channels": PATCH**2,
            "num_layers": 3,
            "num_single_layers": 6,
            "attention_head_dim": 64,
            "num_attention_heads": 6,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": [8, 28, 28],
        },
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
        flux_velocity,
        flux_guided,
        ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out"),
        ("transformer_blocks", "single_transformer_blocks"),
        "x_embedder",
        True,
    ),
    "z-image": Family(
        ZImageTransformer2DModel,
        {
            "in_channels": 1,
            "dim": 384,
            "n_layers": 8,
            "n_refiner_layers": 2,
            "n_heads": 6,
            "n_kv_heads": 6,
            "cap_feat_dim": WIDTH,
            "axes_dims": [16, 24, 24],
            "axes_lens": [64, 32, 32],
        },
        {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1},
        z_image_velocity,
        z_image_guided,
        ("adaLN_modulation.0", "all_final_layer.2-1.linear", "adaLN_modulation.1"),
        ("noise_refiner", "context_refiner", "layers"),
        "all_x_embedder.2-1",
        False,
    ),
}


def family_of(transformer: nn.Module) -> Family:
    """Return the family of a transformer, which may be quantized. Raises `ValueError` for any other model."""
    names = {base.__name__ for base in type(transformer).__mro__}
    for family in FAMILIES.values():
        if family.transformer.__name__ in names:
            return family
    raise ValueError(f"{type(transformer).__name__} is none of {', '.join(FAMILIES)}")


class SmallPipeline:
    """A transformer, its scheduler and its prompts [11, 16, 64]: a diffusers pipeline without text encoder and VAE."""

    def __init__(self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, prompts: Tensor) -> None:
        self.transformer, self.scheduler, self.prompts = transformer, scheduler, prompts

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a folder that `save` wrote, of either family."""
        folder = Path(folder)
        name = FluxTransformer2DModel.load_config(folder / "transformer")["_class_name"]
        (family,) = (family for family in FAMILIES.values() if family.transformer.__name__ == name)
        transformer = family.transformer.from_pretrained(folder / "transformer", torch_dtype=dtype)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        prompts = load_file(folder / PROMPTS)["tokens"].float()
        return cls(transformer.to(device).eval().requires_grad_(False), scheduler, prompts.to(device))

    def save(self, folder: Path) -> None:
        """Write transformer/, scheduler/ and prompts.safetensors."""
        self.transformer.save_pretrained(folder / "transformer")
        self.scheduler.save_pretrained(folder / "scheduler")
        save_file({"tokens": self.prompts.detach().cpu().contiguous()}, folder / PROMPTS)

    def with_transformer(self, transformer: nn.Module) -> "SmallPipeline":
        """Return the pipeline around another transformer, such as a quantized one."""
        return SmallPipeline(transformer, self.scheduler, self.prompts)

    @torch.no_grad()
    def __call__(self, labels: Tensor, steps: int = 20, guidance: float = 2.0, seed: int = 0) -> Tensor:
        """Return images [N, 1, 32, 32] in [-1, 1] of `labels` [N], by Euler steps from noise of a CPU's generator."""
        device, dtype, family = self.prompts.device, self.transformer.dtype, family_of(self.transformer)
        noise = torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        state = noise.to(device, dtype if family.typed else torch.float32)
        prompts = self.prompts.to(dtype)[labels.to(device)]
        null = self.prompts.to(dtype)[NULL_CLASS].expand_as(prompts)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
        self.scheduler.set_begin_index(0)
        for t in self.scheduler.timesteps:
            velocity = family.guided(self.transformer, state, t.expand(len(state)), prompts, null, guidance)
            state = self.scheduler.step(velocity, t, state, return_dict=False)[0]
        return state.float().clamp(-1, 1)
