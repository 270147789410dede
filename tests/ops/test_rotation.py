"""Rotation by regular Hadamard blocks: the matrix that it is of, its inverse, and what it is for."""

import pytest
import torch

from tqdit.errors import InputError
from tqdit.grids import uniform
from tqdit.grids.row import row_scales
from tqdit.ops.rotation import SIZES, rotate

H2 = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64) / 2**0.5
H4 = (torch.ones(4, 4) - 2 * torch.eye(4).flip(1)).double() / 2


def matrix(size: int) -> torch.Tensor:
    """The definition: a Kronecker product of H4's, with H2 in front for 128."""
    h = H4
    for _ in range(2 if size == 128 else 3):
        h = torch.kron(H4, h)
    return torch.kron(H2, h) if size == 128 else h


@pytest.mark.parametrize("size", SIZES)
def test_a_block_is_multiplied_by_the_matrix(size: int) -> None:
    h, x = matrix(size), torch.randn(3, 5, 3 * size)
    assert torch.allclose(h @ h, torch.eye(size, dtype=torch.float64))
    expected = (x.double().unflatten(-1, (3, size)) @ h).flatten(-2)
    found = rotate(x, size)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_regular(size: int) -> None:
    """256: all sums alike. 128: alike in each half, and none is larger than the root of the block's size."""
    sums = matrix(size).sum(1)
    assert sums.abs().max().item() == pytest.approx({256: 1, 128: 2**0.5}[size])
    constant = rotate(torch.full((1, size), 3.0), size)
    assert constant.abs().max() <= 3.0 * 1.42


@pytest.mark.parametrize("size", SIZES)
def test_it_is_its_own_inverse_and_leaves_products_alone(size: int) -> None:
    x, w = torch.randn(7, 2 * size), torch.randn(9, 2 * size)
    assert torch.allclose(rotate(rotate(x, size), size), x, rtol=0, atol=2e-6)
    assert torch.allclose(rotate(x, size) @ rotate(w, size).t(), x @ w.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_fp32(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, size).to(dtype)
    assert torch.equal(rotate(x, size), rotate(x.float(), size))


def test_bits_do_not_depend_on_shape_or_memory() -> None:
    """Each number is a fixed sum: batching, strides and a compiled or threaded loop change nothing."""
    x = torch.randn(64, 512)
    whole = rotate(x, 256)
    assert torch.equal(torch.cat([rotate(row[None], 256) for row in x]), whole)
    assert torch.equal(rotate(x.t().contiguous().t(), 256), whole)
    assert torch.equal(rotate(x.reshape(4, 16, 2, 256), 256).reshape(64, 512), whole)


@pytest.mark.parametrize("size", SIZES)
def test_one_large_channel_costs_less(size: int) -> None:
    """A row's scale follows its largest channel; spread over the block, all others keep their digits."""
    x = torch.randn(256, 2 * size)
    x[:, 5] *= 100

    def error(values: torch.Tensor) -> torch.Tensor:
        fraction = torch.full((1, 1), 1 / 127)
        return (uniform.fake_quantize(values, row_scales(values, fraction), torch.zeros(1), 8) - values).square().sum()

    assert error(rotate(x, size)) < 0.1 * error(x)


@pytest.mark.parametrize(("size", "channels"), [(64, 64), (0, 128), (256, 128), (128, 192)])
def test_other_blocks_are_refused(size: int, channels: int) -> None:
    with pytest.raises(InputError, match=str(size)):
        rotate(torch.zeros(1, channels), size)
