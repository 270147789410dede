"""The class of a converted model; a module of its own because it imports diffusers."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn import functional as F


class IntegerDiT(DiTTransformer2DModel):
    """diffusers' transformer, its blocks, conditioning and call in integers; `convert` makes it."""

    runtime: Any
    conditioning: Any
    config: Any
    out_channels: int

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        output = self.runtime.call(self._denoised, hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _denoised(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C or 2C, H, W), as diffusers' own forward, for the call that clock and conditioning are
        set to.

        Each step takes the name of the one before, whose tensor is freed: the last LayerNorm would have four of (B, N,
        D) alive otherwise, more than any block.
        """
        side, channels = self.config.patch_size, self.out_channels
        rows, columns = (size // side for size in x.shape[-2:])
        layers: Any = self
        x = layers.pos_embed(x)
        for block in layers.transformer_blocks:
            x = block(x)
        embedded = self.conditioning.embedding(0).to(x.dtype)
        shift, scale = layers.proj_out_1(F.silu(embedded)).chunk(2, dim=1)
        x = layers.norm_out(x)
        x = x * (1 + scale[:, None])
        x = layers.proj_out_2(x + shift[:, None])
        patches = x.reshape(-1, rows, columns, side, side, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * side, columns * side)
