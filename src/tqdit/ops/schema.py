"""What an operation is: the operands every backend receives and the functions it must have.

`ops.reference` defines the results; another integer backend must produce the same codes and the same accumulators. A
block of a DiT is seven calls: norm_quantize, qkv, attention, linear_residual; norm_quantize, linear_gelu,
linear_residual. Between them only codes travel, in a layout of the backend's own.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from tqdit.spec import Grid


class OperandParams(NamedTuple):
    """Parameters of one activation site, already selected for a batch, so that they broadcast to the tensor.

    Uniform: `scale`, `zero_point`. Two-region: `scale` = s1, `coarse` = s2; `shift` where s2 = s1 2^shift and both
    regions fit one 8-bit operand, so that one product is enough. Shapes (B or 1, [H or 1, 1,] 1, 1).

    With a `table` nothing is selected yet: it is `ops.tables.parameter_table` of all time groups, `group` the row of
    each sample, (1,) or (B,), None if there is one row. A kernel that reads it needs no gather per site.
    """

    grid: Grid
    bits: int
    scale: torch.Tensor
    zero_point: torch.Tensor
    coarse: torch.Tensor
    shift: torch.Tensor | None = None
    table: torch.Tensor | None = None
    group: torch.Tensor | None = None


class WeightParams(NamedTuple):
    """A quantized weight: `codes` int8 (out, in), `scale` fp32 (out,) or (1,).

    `colsum`: int32 (out,) sums of codes, for those who correct zero points themselves.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    colsum: torch.Tensor | None = None


class AttentionParams(NamedTuple):
    """The operands of the two attention matmuls; query, key and value are per head."""

    query: OperandParams
    key: OperandParams
    value: OperandParams
    softmax: OperandParams
    heads: int

    @property
    def projections(self) -> tuple[OperandParams, OperandParams, OperandParams]:
        return self.query, self.key, self.value


class Backend(Protocol):
    """The operations of a quantized DiT. x: hidden states (B, N, C), fp32 or bf16; shift, scale, gate: (B, C) fp32.

    A `layer` argument is what `prepare` or `prepare_float_input` returned.
    """

    NAME: str
    INTEGER: bool  # False: simulated in float, for checking only, never to be timed
    TABLES: bool  # whether operands come with their `table`, not selected
    GRAPHS: bool  # whether whole calls on a GPU are to be captured as CUDA graphs

    def kernel(self, operation: str) -> str:
        """What runs an operation, for reports, such as "int8" or "onednn u8 x s8"."""

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        """A linear layer in the backend's own layout, its input quantized. `unpacked()` of it: the codes (out, in)."""

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        """The same for a layer whose input stays in float."""

    def norm_quantize(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, target: OperandParams
    ) -> torch.Tensor:
        """Codes (B, N, C) of LayerNorm(x) (1 + scale) + shift."""

    def qkv(self, codes: torch.Tensor, source: OperandParams, layer: Any, params: AttentionParams) -> Any:
        """Codes (B, N, 3 C) of q, k and v, each with heads of one scale, as `attention` takes them."""

    def attention(self, qkv: Any, params: AttentionParams, target: OperandParams) -> torch.Tensor:
        """Codes (B, N, C) of softmax(Q K^T / sqrt(head_dim)) V, the probabilities quantized on the way."""

    def linear_gelu(
        self, codes: torch.Tensor, source: OperandParams, layer: Any, target: OperandParams
    ) -> torch.Tensor:
        """Codes (B, N, out) of GELU(x W^T + bias)."""

    def linear_residual(
        self, codes: torch.Tensor, source: OperandParams, layer: Any, gate: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """x + gate (y W^T + bias) for the codes of y: (B, N, C), in fp32, then rounded once to the dtype of x."""

    def float_input_linear(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """x W^T + bias for float x: (..., in) -> (..., out), fp32."""
