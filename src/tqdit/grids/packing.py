"""Bit packing of weight codes: 8 codes of k bits in k bytes, lowest bits first, so 6-bit codes take 4 in 3 bytes."""

import numpy as np
import torch

from tqdit.errors import InputError


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes of any shape -> uint8 (packed_size,), little-endian bit stream of two's-complement codes."""
    flat = codes.reshape(-1).contiguous().cpu().numpy().view(np.uint8)
    if bits == 8:
        return torch.from_numpy(flat.copy())
    stream = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack(packed: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `pack`: int8 codes of `shape`. Raises `InputError` if the byte count does not fit the shape."""
    count = int(np.prod(shape, dtype=np.int64))
    if packed.dtype is not torch.uint8 or packed.numel() != packed_size(count, bits):
        raise InputError(
            f"packed codes are {packed.numel()} bytes of {packed.dtype}; shape {tuple(shape)} at {bits} bits "
            f"takes {packed_size(count, bits)} bytes of uint8"
        )
    if bits == 8:
        return packed.view(torch.int8).reshape(shape)  # no copy
    data = packed.cpu().numpy()
    stream = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    unsigned = np.packbits(stream, axis=1, bitorder="little")[:, 0].astype(np.int16)
    signed = np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned)
    return torch.from_numpy(signed.astype(np.int8)).reshape(shape)
