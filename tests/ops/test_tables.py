"""The table of an operand: every column, from solved parameters."""

import pytest
import torch

from tqdit.ops.tables import COLUMNS, operand
from tqdit.spec import Grid, GridParams, Role, SiteSpec


def columns_of(params: GridParams) -> list[torch.Tensor]:
    made = operand(params)
    assert made.table.dtype is torch.float32
    assert made.table.is_contiguous()
    assert made.table.shape == (params.spec.groups, params.spec.units, COLUMNS)
    assert (made.grid, made.bits, made.group, made.shared) == (params.spec.grid, params.spec.bits, None, None)
    return list(made.table.unbind(-1))


def test_columns_of_a_uniform_site() -> None:
    spec = SiteSpec("s", Role.QUERY, 6, groups=3, units=2)
    scale, zero = torch.rand(3, 2) + 0.01, torch.randint(-32, 32, (3, 2), dtype=torch.int32)
    columns = columns_of(GridParams(spec, scale, zero))
    nothing, ones = torch.zeros(3, 2), torch.ones(3, 2)
    expected = [scale, ones, zero.float(), nothing, 1 / scale, ones, nothing, nothing]
    assert all(map(torch.equal, columns, expected))
    assert not operand(GridParams(spec, scale, zero)).merged


def test_a_site_without_zero_points_has_zeros() -> None:
    spec = SiteSpec("s", Role.KEY, 8, groups=2)
    assert not columns_of(GridParams(spec, torch.rand(2, 1) + 0.01))[2].any()


@pytest.mark.parametrize("grid", [Grid.MRQ_GELU, Grid.MRQ_SOFTMAX])
def test_columns_of_two_regions(grid: Grid) -> None:
    spec = SiteSpec("s", Role.GELU, 8, grid, groups=3, units=2)
    scale = torch.rand(3, 2, 2) + torch.tensor([0.001, 1.0])
    columns = columns_of(GridParams(spec, scale))
    nothing, (s1, s2) = torch.zeros(3, 2), scale.unbind(-1)
    assert all(map(torch.equal, columns, [s1, s2, nothing, nothing, 1 / s1, 1 / s2, nothing, nothing]))
    assert not operand(GridParams(spec, scale)).merged


@pytest.mark.parametrize(("grid", "zero"), [(Grid.MRQ_GELU, 32 - 128), (Grid.MRQ_SOFTMAX, 0)])
def test_columns_of_merged_regions(grid: Grid, zero: int) -> None:
    """The factor is 2^shift, by group; the lowest integer after GELU, -2^(k-1), is the code -128."""
    spec = SiteSpec("s", Role.GELU, 6, grid, groups=3)
    shift = torch.tensor([[0], [2], [1]])
    s1 = torch.full((3, 1), 0.0123)
    columns = columns_of(GridParams(spec, torch.stack([s1, s1 * 2.0**shift], -1)))
    nothing = torch.zeros(3, 1)
    expected = [s1, s1 * 2.0**shift, nothing + zero, 2.0**shift, 1 / s1, 1 / (s1 * 2.0**shift), nothing, nothing]
    assert all(map(torch.equal, columns, expected))


@pytest.mark.parametrize(
    ("exponents", "bits", "grid", "factor", "merged"),
    [
        ([0, 2], 6, Grid.MRQ_GELU, 1.0, True),
        ([0, 3], 6, Grid.MRQ_GELU, 1.0, False),
        ([3, 1], 6, Grid.MRQ_SOFTMAX, 1.0, True),
        ([4], 6, Grid.MRQ_SOFTMAX, 1.0, False),
        ([1], 8, Grid.MRQ_SOFTMAX, 1.0, True),
        ([2], 8, Grid.MRQ_SOFTMAX, 1.0, False),
        ([1], 6, Grid.MRQ_GELU, 1.0001, False),
        ([-1], 6, Grid.MRQ_GELU, 1.0, False),
    ],
)
def test_merging_regions_are_found(exponents: list[int], bits: int, grid: Grid, factor: float, merged: bool) -> None:
    """s2 = s1 2^i in every group, and both regions in one byte: 6-bit codes after GELU merge up to i = 2."""
    spec = SiteSpec("a", Role.GELU, bits, grid, groups=len(exponents))
    s1 = torch.full((len(exponents), 1), 0.0123)
    s2 = s1 * 2.0 ** torch.tensor(exponents)[:, None] * factor
    made = operand(GridParams(spec, torch.stack([s1, s2], -1)))
    assert made.merged is merged
    assert made.two_products is not merged
    assert made.table[:, 0, 3].tolist() == [2.0**i if merged else 0.0 for i in exponents]
