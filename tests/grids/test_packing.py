"""Bit packing: exact bytes and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqdit.errors import InputError
from tqdit.grids.packing import pack, packed_size, unpack


@given(st.integers(2, 8), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_round_trip(bits: int, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packed_size(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, tuple(shape)), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits, tuple(codes.shape)), codes)


def test_non_contiguous_codes_are_packed_in_logical_order() -> None:
    codes = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4).t()
    assert torch.equal(unpack(pack(codes, 5), 5, (4, 3)), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "stored"),
    [
        # 000001 | 000010 << 6 | 111111 << 12 | 100000 << 18 = 0x83F081
        (6, [1, 2, -1, -32], [0x81, 0xF0, 0x83]),
        (4, [1, -1, 7, -8], [0xF1, 0x87]),
        (4, [3], [0x03]),
        (2, [0, 1, -2, -1], [0b11100100]),
        (8, [-128, 127], [0x80, 0x7F]),
    ],
)
def test_known_bytes(bits: int, codes: list[int], stored: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.int8), bits)
    assert packed.tolist() == stored
    assert unpack(packed, bits, (len(codes),)).tolist() == codes


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_wrong_size_is_an_error(bits: int, wrong: int) -> None:
    packed = torch.zeros(packed_size(20, bits) + wrong, dtype=torch.uint8)
    with pytest.raises(InputError, match=rf"\(4, 5\) at {bits} bits"):
        unpack(packed, bits, (4, 5))


def test_packed_bytes_of_any_shape() -> None:
    codes = torch.arange(-20, 20, dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, 6).reshape(5, 6), 6, (40,)), codes)


def test_wrong_dtype_is_an_error() -> None:
    with pytest.raises(InputError, match="int8"):
        unpack(torch.zeros(15, dtype=torch.int8), 6, (4, 5))


@pytest.mark.parametrize(
    ("count", "bits", "size"), [(0, 6, 0), (1, 2, 1), (4, 2, 1), (5, 2, 2), (3, 3, 2), (8, 3, 3), (11, 3, 5), (3, 8, 3)]
)
def test_packed_size_is_the_fewest_whole_bytes(count: int, bits: int, size: int) -> None:
    """Three codes of 3 bits are 9 bits, so they take two bytes."""
    assert packed_size(count, bits) == size


@pytest.mark.parametrize("bits", [6, 8])
def test_packed_codes_have_memory_of_their_own_and_no_more(bits: int) -> None:
    """A packed tensor that kept the codes' memory, or a longer one, would take more than its bytes."""
    codes = torch.arange(-14, 15, dtype=torch.int8)  # no whole number of groups
    packed = pack(codes, bits)
    assert packed.untyped_storage().nbytes() == packed.numel() == packed_size(29, bits)
    packed.zero_()
    assert codes.tolist() == list(range(-14, 15))


def test_unpacked_8_bit_codes_are_a_view_of_the_stored_bytes() -> None:
    """They may be in a mapped file, which is then not read before the codes are used."""
    stored = torch.arange(12, dtype=torch.uint8)
    assert unpack(stored, 8, (3, 4)).data_ptr() == stored.data_ptr()
