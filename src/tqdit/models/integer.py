"""The class of a converted model; a module of its own because it imports diffusers."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel


class IntegerDiT(DiTTransformer2DModel):
    """diffusers' transformer, its call run by the `runtime` that it owns."""

    runtime: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        run: Any = super()
        return self.runtime.call(run.forward, hidden_states, timestep, class_labels, return_dict)
