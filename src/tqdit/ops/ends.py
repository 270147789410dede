"""The operations around the blocks of a transformer on patches that a backend may have kernels for.

They are verbs as those of `ops.schema.Backend`, but a backend may leave any of them out: it returns None, and the model
runs the modules of diffusers with torch's operations. So `Ends` is the default of all backends.
"""

from typing import Any, ClassVar, NamedTuple

import torch


class EndLayer(NamedTuple):
    """A layer at an end of a model, y = x W^T + b, whose W is in float or in codes.

    `weight`: fp32 (out, in), and `bias`: fp32 (out,) or None. Or `codes`: what a backend's `prepare_float_input` made,
    which has both.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    codes: Any = None


class Lookup(NamedTuple):
    """Rows of a table: `table` fp32 (rows, C), `rows` (M,) of any integer dtype."""

    table: torch.Tensor
    rows: torch.Tensor


class Ends:
    """The default of a backend: no kernels for what is around the blocks.

    `ENDS_EVERYWHERE`: whether `embed` and `unembed` also serve models in a graph of torch, and models whose tensors
    accelerate moves, so that these have the same results bit for bit.
    """

    ENDS_EVERYWHERE: ClassVar[bool] = False

    def embed(
        self, x: torch.Tensor, layer: EndLayer, position: torch.Tensor, side: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Return the residual stream (B, N, D) of `dtype` for latents x (B, C, H, W), or None.

        It is W times the patches, `side` wide, plus bias and `position` fp32 (N, D), computed in fp32 and rounded once.
        A patch is (C, side, side), as in `layer`, D outputs. The result of a sample does not depend on the batch.
        """
        return None

    def unembed(
        self, stream: torch.Tensor, shift_scale: torch.Tensor, eps: float, layer: EndLayer, x: torch.Tensor, side: int
    ) -> torch.Tensor | None:
        """Return latents (B, C', H, W) in the dtype of x (B, C, H, W), or None, for the residual stream (B, N, D).

        The pixels of a token are `layer`, D to (side, side, C'), of LayerNorm(stream) (1 + scale) + shift, computed in
        fp32. `shift_scale`: fp32 (B, 2 D). A sample with a number that is not finite is NaN.
        """
        return None

    def activated(self, x: torch.Tensor | Lookup, layer: Any, added: Lookup | None = None) -> torch.Tensor | None:
        """Return SiLU(x W^T + bias + added), fp32 (M, out), or None, for fp32 x (M, in) or rows of a table.

        `layer`: of `prepare_float_input`. Rows that a table does not have are NaN.
        """
        return None
