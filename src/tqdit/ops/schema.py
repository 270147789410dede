"""Define an operation: the operands that every backend receives, and the verbs that every backend has.

`ops.reference` defines the results: another integer backend must give the same codes and the same accumulators. Codes
travel between the verbs in a layout of the backend's own. `ops.composed` gives a backend every verb out of four
primitive operations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from tqdit.spec import Grid


class OperandParams(NamedTuple):
    """The parameters of one activation operand in a call. The table is their only form.

    `table`: fp32 (time groups, units, `ops.tables.COLUMNS`); units are heads, or 1. `group`: int64 (1,) or (B,), the
    row of each sample; None if the table has one row. `shared`: the row of the whole batch where the host knows it.
    `merged`: both regions of a two-region grid fit one 8-bit operand, so that one integer product is enough.
    `channels`: fp32 (C,), by which the channels of an activation are multiplied before it is coded, or None.
    """

    grid: Grid
    bits: int
    table: torch.Tensor
    merged: bool = False
    group: torch.Tensor | None = None
    shared: int | None = None
    channels: torch.Tensor | None = None

    @property
    def two_products(self) -> bool:
        """Say whether an integer product with this operand takes two products, one for each region."""
        return self.grid.two_region and not self.merged

    def selected(self) -> torch.Tensor:
        """Return the rows of the batch: fp32 (1 or B, units, COLUMNS), a view where no gather is needed."""
        if self.group is None or len(self.table) == 1:
            return self.table
        if self.shared is not None:
            return self.table[self.shared : self.shared + 1]
        return self.table.index_select(0, self.group)


class RowCodes(NamedTuple):
    """Codes on the grid of rows, with the scale of each row: `scale` fp32 (B, N).

    A backend may keep the scales elsewhere; the verbs take what `quantize` returned.
    """

    codes: torch.Tensor
    scale: torch.Tensor


Codes = torch.Tensor | RowCodes


class WeightParams(NamedTuple):
    """A quantized weight: `codes` int8 (out, in) of `bits` bits, `scale` fp32 (out,) or (1,).

    `colsum`: int32 (out,) sums of codes, for backends that correct zero points by themselves.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int
    colsum: torch.Tensor | None = None


class AttentionParams(NamedTuple):
    """The operands of the two attention matmuls. Query, key and value have one table entry per head."""

    query: OperandParams
    key: OperandParams
    value: OperandParams
    softmax: OperandParams
    heads: int

    @property
    def projections(self) -> tuple[OperandParams, OperandParams, OperandParams]:
        """Return the operands to which a self-attention projects its input: query, key and value."""
        return self.query, self.key, self.value


class Norm(NamedTuple):
    """LayerNorm without parameters, then modulation: LayerNorm(x) (1 + scale) + shift.

    `shift` and `scale` are fp32 (B, C).
    """

    shift: torch.Tensor
    scale: torch.Tensor
    eps: float


class Activation(NamedTuple):
    """The step after a product that makes codes of an activation function. "gelu_tanh" is the only function yet."""

    target: OperandParams
    function: str = "gelu_tanh"


class Residual(NamedTuple):
    """The step after a product y that adds it: x + gate y, in fp32, rounded once to the dtype of x.

    x: (B, N, C) fp32, fp16 or bf16. `gate`: (B, C) fp32, or None for x + y.
    """

    x: torch.Tensor
    gate: torch.Tensor | None = None


class Float(NamedTuple):
    """The step after a product y that returns y itself, computed in fp32 and rounded once to `dtype`.

    `dtype`: fp32, fp16 or bf16.
    """

    dtype: torch.dtype


Then = Activation | Residual | Float


class Backend(Protocol):
    """The verbs of a quantized transformer. Hidden states x: (B, N, C), fp32, fp16 or bf16.

    A `layer` argument is what `prepare` or `prepare_float_input` returned; `source` says what its codes mean.
    """

    NAME: str
    INTEGER: bool  # False: the backend simulates in float, to check results; it is never timed
    GRAPHS: bool  # whether whole calls on a GPU are captured as CUDA graphs

    def kernel(self, operation: str) -> str:
        """Return the name of the kernel that runs an operation, for reports, such as "int8" or "onednn u8 x s8"."""

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        """Return a linear layer in the backend's own layout; its input is quantized.

        The layer's `unpacked()` returns its codes, int8 (out, in).
        """

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        """Return a linear layer whose input stays in float."""

    def quantize(self, x: torch.Tensor, target: OperandParams, norm: Norm | None = None) -> Any:
        """Return the codes (B, N, C) of x, or of its modulated LayerNorm.

        They are a tensor, or `RowCodes` on the grid of rows.
        """

    def project(
        self, codes: Any, source: OperandParams, layer: Any, targets: Sequence[OperandParams], heads: int
    ) -> Any:
        """Return the codes of a layer's outputs as heads, for `attend`: a tensor, or a named tuple of tensors and ints.

        Three targets: query, key and value of a self-attention; two: key and value of a context; one: query of a
        cross-attention. The layer has as many equal parts. Codes of a context may be kept for many calls.
        """

    def attend(
        self,
        projected: Any,
        attention: AttentionParams,
        target: OperandParams,
        context: Any = None,
        bias: torch.Tensor | None = None,
    ) -> Any:
        """Return the codes (B, N, C) of softmax(Q K^T / sqrt(head_dim) + bias) V, with quantized probabilities.

        `context`: key and value of M tokens; None: `projected` has them. `bias`: fp32 (B, M), such as 0 and -10000.
        """

    def linear(self, codes: Any, source: OperandParams, layer: Any, then: Then | None = None) -> Any:
        """Return what `then` makes of y = x W^T + bias for the codes of x, whatever B and N are.

        Without `then` the result is y itself, fp32 (B, N, out), as with `Float(torch.float32)`. With an `Activation` it
        is what `quantize` returns.
        """

    def float_input_linear(self, x: torch.Tensor, layer: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return x W^T + bias for float x: (..., in) -> (..., out), fp32.

        With a `dtype` the result is rounded to it, and a backend may multiply in the dtype of x.
        """
