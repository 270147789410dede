"""Make the arguments of one call of a published transformer, with random latents and prompt embeddings.

Every function takes `draw`, which returns normal numbers of a shape, the model's config, and the size of the call.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Draw = Callable[..., torch.Tensor]  # of a shape: normal numbers
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """The size of a call of one sample: patches as (frames, rows, columns), each of which is a token, and text."""

    patches: tuple[int, int, int]
    text: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the image or video."""
        return math.prod(self.patches)

    def reduced(self, tokens: int | None) -> "Size":
        """Return a size of at most `tokens` image or video tokens, fewer frames first; None keeps the size."""
        _, rows, columns = self.patches
        if tokens is None or tokens >= self.tokens:
            return self
        if tokens >= rows * columns:
            return Size((tokens // (rows * columns), rows, columns), self.text)
        rows = min(rows, math.isqrt(tokens))
        return Size((1, rows, min(columns, tokens // rows)), min(self.text, tokens))


def _time(scale: float = 1.0) -> torch.Tensor:
    return torch.full((1,), 0.5 * scale)


def _flux(draw: Draw, config: Config, size: Size, axes: int) -> dict[str, Any]:
    _, rows, columns = size.patches
    ids = torch.zeros(size.tokens, axes)
    ids[:, 1], ids[:, 2] = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return {
        "hidden_states": draw(1, size.tokens, config["in_channels"]),
        "encoder_hidden_states": draw(1, size.text, config["joint_attention_dim"]),
        "timestep": _time(),
        "img_ids": ids,
        "txt_ids": torch.zeros(size.text, axes),
    }


def flux1(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of FLUX.1."""
    pooled = draw(1, config["pooled_projection_dim"])
    return {**_flux(draw, config, size, 3), "pooled_projections": pooled, "guidance": torch.full((1,), 3.5)}


def flux2(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of FLUX.2."""
    return _flux(draw, config, size, 4)


def qwen(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of Qwen-Image."""
    return {
        "hidden_states": draw(1, size.tokens, config["in_channels"]),
        "encoder_hidden_states": draw(1, size.text, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": None,
        "timestep": _time(),
        "img_shapes": [[size.patches]],
    }


def z_image(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of Z-Image."""
    frames, rows, columns = size.patches
    return {
        "x": [draw(config["in_channels"], frames, 2 * rows, 2 * columns)],
        "t": _time(),
        "cap_feats": [draw(size.text, config["cap_feat_dim"])],
    }


def _image(draw: Draw, config: Config, size: Size, text_width: int) -> dict[str, Any]:
    _, rows, columns = size.patches
    return {
        "hidden_states": draw(1, config["in_channels"], 2 * rows, 2 * columns),
        "encoder_hidden_states": draw(1, size.text, text_width),
        "timestep": _time(1000),
    }


def sd3(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of Stable Diffusion 3."""
    pooled = draw(1, config["pooled_projection_dim"])
    return {**_image(draw, config, size, config["joint_attention_dim"]), "pooled_projections": pooled}


def pixart(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of PixArt."""
    none = {"resolution": None, "aspect_ratio": None}
    return {**_image(draw, config, size, config["caption_channels"]), "added_cond_kwargs": none}


def video(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of Wan."""
    frames, rows, columns = size.patches
    return {
        "hidden_states": draw(1, config["in_channels"], frames, 2 * rows, 2 * columns),
        "encoder_hidden_states": draw(1, size.text, config.get("text_dim") or config["text_embed_dim"]),
        "timestep": _time(1000),
    }


def hunyuan_video(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of HunyuanVideo."""
    return {
        **video(draw, config, size),
        "encoder_attention_mask": torch.ones(1, size.text),
        "pooled_projections": draw(1, config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 6000.0),
    }


def ltx(draw: Draw, config: Config, size: Size) -> dict[str, Any]:
    """Return the arguments of LTX-Video."""
    frames, rows, columns = size.patches
    return {
        "hidden_states": draw(1, size.tokens, config["in_channels"]),
        "encoder_hidden_states": draw(1, size.text, config["caption_channels"]),
        "timestep": _time(1000),
        "encoder_attention_mask": torch.ones(1, size.text),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }
