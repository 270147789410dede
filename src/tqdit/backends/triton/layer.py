"""`TritonLinear`: a linear layer's weight in the layout of the kernels, as int8 or packed."""

import torch

from tqdit.ops.holders import FixedDtype, per_output
from tqdit.ops.reference import column_sums
from tqdit.ops.schema import WeightParams

ALIGN = 16  # bytes between rows of a bulk copy
PACK = 128  # codes along the depth that are packed together: one block of the kernels


class TritonLinear(FixedDtype):
    """A linear layer's weight codes (N, K), fp32 scale and bias (N,), and int32 sums of codes (N,).

    8 bits: `codes` int8 (N, K rounded up to 16). Packed, K rounded up to 128, for each 128 codes along K:
    4 bits: 64 bytes `codes`, code j in the low half, code j + 64 in the high half of byte j.
    6 bits: 64 bytes `codes` with the low four bits: of quarter 0 (low half) and 2 in the first 32 bytes, of 1 and 3 in
    the others; 32 bytes `high` with the upper two bits of the four quarters, the first one lowest.
    """

    codes: torch.Tensor
    high: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor
    sums: torch.Tensor

    def __init__(self, weight: WeightParams, bias: torch.Tensor | None, bits: int = 8) -> None:
        """Lay the codes out at `bits`, which is 8, 6 or 4 and at least the bits of the codes."""
        super().__init__()
        n, k = weight.codes.shape
        self.shape = n, k
        self.bits = bits
        block = ALIGN if bits == 8 else PACK
        padded = torch.nn.functional.pad(weight.codes, (0, -k % block))
        low, high = (padded.clone(), None) if bits == 8 else _packed(padded, bits)
        self.hold("codes", low)
        self.hold("high", high)
        self.hold("scale", per_output(weight.scale, weight))
        self.hold("bias", per_output(bias, weight))
        self.hold("sums", column_sums(weight.codes))

    def unpacked(self) -> torch.Tensor:
        """Return the codes as they came, int8 (N, K)."""
        n, k = self.shape
        if self.bits == 8:
            return self.codes[:, :k].contiguous()
        low = self.codes.view(n, -1, 2, 32)
        parts = [low & 15, low >> 4 & 15]  # (N, blocks, 2, 32): quarters 0, 1 and 2, 3
        codes = torch.cat(parts, dim=2)
        if self.bits == 6:
            assert self.high is not None
            high = self.high.view(n, -1, 1, 32)
            codes = codes | torch.cat([(high >> 2 * quarter & 3) << 4 for quarter in range(4)], dim=2)
        half = 1 << (self.bits - 1)
        return ((codes ^ half) - half).flatten(1)[:, :k].contiguous()


def _packed(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the planes of a weight whose depth is whole blocks, each int8 (N, bytes)."""
    quarters = codes.unflatten(1, (-1, 4, 32))
    nibble = quarters & 15
    low = (nibble[:, :, :2] | nibble[:, :, 2:] << 4).flatten(1)
    if bits == 4:
        return low, None
    top = quarters >> 4 & 3
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    return low, high.flatten(1)
