"""Exact products of unsigned activation codes and signed weight codes, through the oneDNN operations inside torch.

They are private operations of torch: `reason` probes them once, for existence and for exactness (without VNNI oneDNN's
sums of two products saturate at 16 bits). Where they do not serve, the products run in exact pieces of fp32.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple, NoReturn, Self

import torch

from tqdit.ops.holders import FixedDtype, per_output
from tqdit.ops.reference import column_sums, int_matmul
from tqdit.ops.schema import OperandParams, WeightParams
from tqdit.ops.tables import ZERO

SIGN = 128  # unsigned code = signed code + 128


class Packed:
    """A weight in oneDNN's blocked layout. It is opaque and read-only, so copies of a model share it."""

    def __init__(self, codes: torch.Tensor) -> None:
        self.tensor = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        self._digest: torch.Tensor | None = None

    def digest(self, unpacked: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the sha256 of the codes, uint8 (32,).

        It is computed once, from the codes that `unpacked` returns.
        """
        if self._digest is None:
            data = hashlib.sha256(unpacked().numpy().tobytes()).digest()
            self._digest = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self._digest

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("weights packed by oneDNN cannot be pickled; keep the artifact and load it")


class PackedWeight(NamedTuple):
    """A linear layer as tensors: codes, fp32 scale and bias (out,).

    The codes are packed by oneDNN, or plain and with their sums.
    """

    packed: torch.Tensor | None
    codes: torch.Tensor | None
    colsum: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor
    shape: tuple[int, int]  # (out, in)


class PackedLinear(FixedDtype):
    """A linear layer for integer products: packed codes, fp32 scale and bias (out,).

    The plain codes are not kept; `unpacked` gives them back.
    """

    scale: torch.Tensor
    bias: torch.Tensor
    codes: torch.Tensor | None
    colsum: torch.Tensor | None

    def __init__(self, weight: WeightParams, bias: torch.Tensor | None) -> None:
        super().__init__()
        columns = len(weight.codes)
        self.shape: tuple[int, int] = (columns, weight.codes.shape[1])
        self.packed = None if reason() else Packed(weight.codes)
        self.hold("codes", weight.codes.clone() if self.packed is None else None)
        self.hold("colsum", column_sums(weight.codes) if self.packed is None else None)
        self.hold("scale", per_output(weight.scale, weight))
        self.hold("bias", per_output(bias, weight))

    @property
    def weight(self) -> PackedWeight:
        """Return the layer as tensors."""
        packed = None if self.packed is None else self.packed.tensor
        return PackedWeight(packed, self.codes, self.colsum, self.scale, self.bias, self.shape)

    def product(self, codes: torch.Tensor, zero: int) -> torch.Tensor:
        """Return the int32 sums of (codes - zero) W^T, each rounded once to fp32 (M, out).

        `codes`: uint8 (M, in), contiguous.
        """
        return _product(codes, zero, self.weight)

    def get_extra_state(self) -> torch.Tensor:
        """Return a hash of codes that are packed: a state dict has no tensor of them."""
        if self.packed is None:
            return torch.empty(0, dtype=torch.uint8)
        return self.packed.digest(self.unpacked)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Do nothing: a loaded state was already compared and is equal."""

    def unpacked(self) -> torch.Tensor:
        """Return the codes, int8 (out, in).

        Their layout is oneDNN's secret, so they are read as the product with an identity matrix.
        """
        if self.codes is not None:
            return self.codes
        return self.product(torch.eye(self.shape[1], dtype=torch.uint8), 0).t().to(torch.int8).contiguous()


def zero_points(source: OperandParams) -> torch.Tensor:
    """Return the zero points of an operand's unsigned codes, or of each of its planes: int32 (1,) or (B,)."""
    if source.grid.per_row:
        return torch.full((1,), SIGN, dtype=torch.int32)
    if not source.grid.two_region:
        return source.selected()[:, 0, ZERO].to(torch.int32) + SIGN
    half = 1 << (source.bits - 1) if source.merged else 0
    return torch.full((1,), half, dtype=torch.int32)


def product(codes: torch.Tensor, zeros: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return the int32 sums of (codes - zero) W^T, each rounded once to fp32 (B, N, out).

    codes: uint8 (B, N, in), contiguous. zeros: int32, one that the batch shares or one per sample.
    """
    batch, tokens, depth = codes.shape
    if len(zeros) == 1:
        return _product(codes.view(-1, depth), int(zeros), weight).view(batch, tokens, -1)
    return torch.stack([_product(x, zero, weight) for x, zero in zip(codes, zeros.tolist(), strict=True)])


def _product(codes: torch.Tensor, zero: int, weight: PackedWeight) -> torch.Tensor:
    if weight.packed is not None:
        return _qlinear(codes, zero, weight.packed)
    assert weight.codes is not None
    assert weight.colsum is not None
    signed = (codes ^ SIGN).view(torch.int8)
    return (int_matmul(signed, weight.codes.t()) - (zero - SIGN) * weight.colsum).float()


def _qlinear(codes: torch.Tensor, zero: int, packed: torch.Tensor) -> torch.Tensor:
    one, none = _constants()
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero, packed, one, none, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def _constants() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight scale of 1 and a weight zero point of 0."""
    return torch.ones(1), torch.zeros(1, dtype=torch.int32)


@functools.cache
def reason() -> str | None:
    """Return why oneDNN's integer matmul cannot be used here, or None."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (33, 520), generator=generator).to(torch.uint8)
    weight = torch.randint(-128, 128, (50, 520), generator=generator).to(torch.int8)
    codes[:8], weight[:8], weight[8:16] = 255, 127, -128
    try:
        found = _qlinear(codes, 77, torch.ops.onednn.qlinear_prepack(weight, None))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"torch has no oneDNN integer matmul here: {str(error).strip().partition(chr(10))[0]}"
    exact = (codes.long() - 77) @ weight.long().t()
    return None if torch.equal(found, exact.float()) else "oneDNN's integer sums saturate on this processor (no VNNI)"
