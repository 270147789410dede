"""Rotate the channels of an operand by blocks of a regular Hadamard matrix, which spreads what is large in one channel.

A block of 4 channels is multiplied by H4, whose rows are (1, 1, 1, -1) / 2 and its permutations:

    y_i = s - x_(3 - i)  with  s = ((x_0 + x_1) + (x_2 + x_3)) / 2

H4 is orthonormal and symmetric, and regular: all its rows have the same sum. So are its Kronecker powers, H64 and H256.
A vector of equal values stays one, where Sylvester's matrix would put all of it into one channel. H128 is H2 with H64
in each quarter, H2 = ((1, 1), (1, -1)) / sqrt(2), so equal values stay equal in each half, and half of them become 0.

Every stage adds fp32 numbers in the order above, so every device gives the same bits: a factor of 1/2 is exact, and
H128 multiplies once, at the end. A kernel that follows the stages gives these bits too.
"""

import torch

from tqdit.errors import InputError

SIZES = (128, 256)
INVERSE_ROOT = 0.5**0.5  # rounded to fp32 where it multiplies


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return x R for R of blocks of `size` channels, fp32 in the shape of x (..., C). R is its own inverse.

    A weight (out, C) that reads rotated inputs is rotated alike: (x R) (W R)^T = x W^T.
    Raises `InputError` for another size than those of `SIZES`, and for channels that are no multiple of it.
    """
    if size not in SIZES:
        raise InputError(f"channels are rotated in blocks of {' or '.join(map(str, SIZES))}, not of {size}")
    if x.shape[-1] % size:
        raise InputError(f"{x.shape[-1]} channels cannot be rotated in blocks of {size}: they are no multiple of it")
    values = x.float()
    for stride in (1, 4, 16) if size == 128 else (1, 4, 16, 64):
        values = _quarters(values, stride)
    return _halves(values, 64).mul_(INVERSE_ROOT) if size == 128 else values


def _quarters(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Return the stage of H4 for channels that are `stride` apart."""
    parts = x.unflatten(-1, (-1, 4, stride))
    a, b, c, d = parts.unbind(-2)
    total = ((a + b) + (c + d)) * 0.5
    return (total[..., None, :] - parts.flip(-2)).flatten(-3)


def _halves(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Return the stage of H2, less its factor, for channels that are `stride` apart."""
    a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
    return torch.stack([a + b, a - b], -2).flatten(-3)
