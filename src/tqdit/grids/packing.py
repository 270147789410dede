"""Pack the bits of weight codes: 8 codes of k bits in k bytes, lowest bits first, so 6-bit codes take 4 in 3 bytes."""

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from tqdit.errors import InputError


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int8 codes of any shape into uint8 (packed_size,), a little-endian bit stream of two's-complement codes."""
    flat = codes.reshape(-1).contiguous().cpu().view(torch.uint8)
    if bits == 8:
        return flat.clone()
    count, size = _group(bits)
    groups = F.pad(flat, (0, -len(flat) % count)).view(-1, count) & (1 << bits) - 1
    packed = torch.zeros(len(groups), size, dtype=torch.uint8)
    for code, byte, shift in _places(bits):
        packed[:, byte] |= groups[:, code] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= groups[:, code] >> 8 - shift
    return packed.view(-1)[: packed_size(len(flat), bits)].clone()


def unpack(packed: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the int8 codes of `shape` that `pack` packed. Raises `InputError` for sizes that do not fit the bytes."""
    if not 1 <= bits <= 8 or any(size < 0 for size in shape):
        raise InputError(f"codes of shape {tuple(shape)} at {bits} bits do not exist")
    total = math.prod(shape)
    if packed.dtype is not torch.uint8 or packed.numel() != packed_size(total, bits):
        raise InputError(
            f"packed codes are {packed.numel()} bytes of {packed.dtype}; shape {tuple(shape)} at {bits} bits "
            f"takes {packed_size(total, bits)} bytes of uint8"
        )
    if bits == 8:
        return packed.view(torch.int8).reshape(shape)  # no copy
    count, size = _group(bits)
    flat = packed.cpu().reshape(-1)
    groups = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    codes = torch.empty(len(groups), count, dtype=torch.uint8)
    half = 1 << (bits - 1)
    for code, byte, shift in _places(bits):
        value = groups[:, byte] >> shift
        if shift + bits > 8:
            value |= groups[:, byte + 1] << 8 - shift
        codes[:, code] = ((value & 2 * half - 1) ^ half) - half  # the highest bit is the sign
    return codes.view(torch.int8).view(-1)[:total].reshape(shape)


def _group(bits: int) -> tuple[int, int]:
    """Return the fewest codes that take whole bytes, and the number of those bytes."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Return where each code of a group lies: its number, the byte in which it begins, and the bit of that byte."""
    for code in range(_group(bits)[0]):
        yield code, *divmod(code * bits, 8)
