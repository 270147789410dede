"""Arguments of one call of the tiny models of `zoo`: small latents, short prompts, times in each one's units.

Every function takes `draw`, which returns normal numbers of a shape, and the number of samples.
"""

from collections.abc import Callable
from typing import Any

import torch

TEXT, LATENT = 16, 8  # tokens of a prompt, latents on a side of an image
Draw = Callable[..., torch.Tensor]  # of a shape: normal numbers


def times(batch: int, scale: float = 1.0) -> torch.Tensor:
    """One time of a batch, as a pipeline passes it: between 0 and `scale`."""
    return torch.full((batch,), 0.5 * scale)


def flux(draw: Draw, batch: int, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, LATENT**2, 4),
        "encoder_hidden_states": draw(batch, TEXT, 32),
        "timestep": times(batch),
        "img_ids": torch.stack([torch.arange(LATENT**2) // LATENT] * axes, -1),
        "txt_ids": torch.zeros(TEXT, axes),
    }


def flux1(draw: Draw, batch: int) -> dict[str, Any]:
    return {**flux(draw, batch), "pooled_projections": draw(batch, 32), "guidance": torch.full((batch,), 3.5)}


def flux2(draw: Draw, batch: int) -> dict[str, Any]:
    return {**flux(draw, batch, 4), "guidance": torch.full((batch,), 3.5)}


def qwen(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, LATENT**2, 16),
        "encoder_hidden_states": draw(batch, TEXT, 32),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "timestep": times(batch),
        "img_shapes": [(1, LATENT, LATENT)] * batch,
    }


def krea2(draw: Draw, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, TEXT // 2 :] = False
    ids = torch.zeros(TEXT + LATENT**2, 3)
    ids[TEXT:, 1], ids[TEXT:, 2] = torch.arange(LATENT**2) // LATENT, torch.arange(LATENT**2) % LATENT
    return {
        "hidden_states": draw(batch, LATENT**2, 16),
        "encoder_hidden_states": draw(batch, TEXT, 2, 32),
        "timestep": times(batch),
        "position_ids": ids,
        "encoder_attention_mask": mask,
    }


def image(draw: Draw, batch: int, channels: int = 4, side: int = 2 * LATENT) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, channels, side, side),
        "encoder_hidden_states": draw(batch, TEXT, 32),
        "timestep": times(batch, 1000),
    }


def sd3(draw: Draw, batch: int) -> dict[str, Any]:
    return {**image(draw, batch), "pooled_projections": draw(batch, 32)}


def pixart(draw: Draw, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    mask[-1, TEXT // 2 :] = 0
    none = {"resolution": None, "aspect_ratio": None}
    return {**image(draw, batch), "encoder_attention_mask": mask, "added_cond_kwargs": none}


def sana(draw: Draw, batch: int) -> dict[str, Any]:
    return {**image(draw, batch, side=LATENT), "encoder_attention_mask": torch.ones(batch, TEXT)}


def lumina2(draw: Draw, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    return {**image(draw, batch), "encoder_attention_mask": mask, "timestep": times(batch)}


def dit(draw: Draw, batch: int) -> dict[str, Any]:
    labels = torch.arange(batch) % 10
    states = draw(batch, 4, 2 * LATENT, 2 * LATENT)
    return {"hidden_states": states, "timestep": torch.full((batch,), 500), "class_labels": labels}


def video(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, 2, 2 * LATENT, 2 * LATENT),
        "encoder_hidden_states": draw(batch, TEXT, 32),
        "timestep": times(batch, 1000),
    }


def hunyuan_video(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        **video(draw, batch),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "pooled_projections": draw(batch, 32),
        "guidance": torch.full((batch,), 6000.0),
    }


def cogvideox(draw: Draw, batch: int) -> dict[str, Any]:
    states = draw(batch, 2, 4, 2 * LATENT, 2 * LATENT)
    return {**video(draw, batch), "hidden_states": states, "timestep": torch.full((batch,), 500)}


def ltx(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 2 * LATENT**2, 8),
        "encoder_hidden_states": draw(batch, TEXT, 32),
        "timestep": times(batch, 1000),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "num_frames": 2,
        "height": LATENT,
        "width": LATENT,
    }


def z_image(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        "x": [draw(4, 1, 2 * LATENT, 2 * LATENT) for _ in range(batch)],
        "t": times(batch),
        "cap_feats": [draw(TEXT + index, 32) for index in range(batch)],
    }


def hunyuan_dit(draw: Draw, batch: int) -> dict[str, Any]:
    return {
        **image(draw, batch),
        "text_embedding_mask": torch.ones(batch, TEXT),
        "encoder_hidden_states_t5": draw(batch, TEXT, 32),
        "text_embedding_mask_t5": torch.ones(batch, TEXT),
        "image_meta_size": draw(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (draw(LATENT**2, 32), draw(LATENT**2, 32)),
    }
