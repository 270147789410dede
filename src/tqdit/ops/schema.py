"""What an operation is: the operands every backend receives and the functions it must have.

A backend is a module with the functions of `Backend`. `ops.reference` defines the results; another integer backend
must produce the same codes and the same accumulators.
"""

from typing import NamedTuple, Protocol

import torch

from tqdit.spec import Grid


class OperandParams(NamedTuple):
    """Parameters of one activation site, already selected for a batch, so that they broadcast to the tensor.

    Uniform: `scale`, `zero_point`. Two-region: `scale` = s1, `coarse` = s2. Shapes (B or 1, [H or 1, 1,] 1, 1).
    """

    grid: Grid
    bits: int
    scale: torch.Tensor
    zero_point: torch.Tensor
    coarse: torch.Tensor


class WeightParams(NamedTuple):
    """A quantized weight: `codes` int8 (out, in), `scale` fp32 (out,) or (1,), `colsum` int32 (out,) sums of codes."""

    codes: torch.Tensor
    scale: torch.Tensor
    colsum: torch.Tensor


class Backend(Protocol):
    """The operations of a quantized DiT. Activations: (B, N, C); attention operands: (B, H, N, head_dim)."""

    NAME: str
    INTEGER: bool  # False: simulated in float, for checking only, never to be timed

    def quantize(self, x: torch.Tensor, params: OperandParams) -> torch.Tensor:
        """Codes of x, int8, same shape."""

    def linear(
        self, codes: torch.Tensor, params: OperandParams, weight: WeightParams, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x W^T + bias in fp32: (B, N, in) -> (B, N, out)."""

    def scores(
        self,
        q: torch.Tensor,
        q_params: OperandParams,
        k: torch.Tensor,
        k_params: OperandParams,
        factor: float,
    ) -> torch.Tensor:
        """factor * Q K^T in fp32: (B, H, N, N)."""

    def values(
        self, p: torch.Tensor, p_params: OperandParams, v: torch.Tensor, v_params: OperandParams
    ) -> torch.Tensor:
        """P V in fp32: (B, H, N, head_dim)."""

    def weight_only_linear(self, x: torch.Tensor, weight: WeightParams, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + bias for float x: (..., in) -> (..., out)."""
