"""`OperandParams`: the rows of its table that a call selects, and how many products it takes."""

import pytest
import torch

from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import COLUMNS, parameters
from tqdit.spec import Grid


@pytest.fixture
def table() -> torch.Tensor:
    """4 time groups of 2 heads."""
    return torch.rand(4, 2, COLUMNS)


def test_each_sample_has_the_row_of_its_group(table: torch.Tensor) -> None:
    selected = OperandParams(Grid.UNIFORM, 8, table, group=torch.tensor([3, 0, 3])).selected()
    assert torch.equal(selected, torch.stack([table[3], table[0], table[3]]))


def test_one_group_of_the_batch_is_one_row(table: torch.Tensor) -> None:
    """Such as under torch.compile, where no host knows the group."""
    selected = OperandParams(Grid.UNIFORM, 8, table, group=torch.tensor([2])).selected()
    assert torch.equal(selected, table[2:3])


def test_a_shared_row_is_a_view(table: torch.Tensor) -> None:
    selected = OperandParams(Grid.UNIFORM, 8, table, group=torch.tensor([2, 2, 2]), shared=2).selected()
    assert torch.equal(selected, table[2:3])
    assert selected.data_ptr() == table[2].data_ptr()


@pytest.mark.parametrize("group", [None, torch.tensor([0, 0]), torch.tensor([3, 1])])
def test_a_table_of_one_row_is_taken_as_it_is(table: torch.Tensor, group: torch.Tensor | None) -> None:
    """Whatever the groups of the call: the values of a prompt do not depend on its timestep."""
    params = OperandParams(Grid.UNIFORM, 8, table[:1], group=group)
    assert torch.equal(params.selected(), table[:1])
    assert params.selected().data_ptr() == table.data_ptr()


@pytest.mark.parametrize(
    ("grid", "merged", "two"),
    [
        (Grid.UNIFORM, False, False),
        (Grid.MRQ_GELU, False, True),
        (Grid.MRQ_GELU, True, False),
        (Grid.MRQ_SOFTMAX, False, True),
        (Grid.MRQ_SOFTMAX, True, False),
    ],
)
def test_two_regions_take_two_products_unless_they_merge(
    table: torch.Tensor, grid: Grid, merged: bool, two: bool
) -> None:
    assert OperandParams(grid, 8, table, merged).two_products is two


@pytest.mark.parametrize(("ndim", "shape"), [(3, (3, 1, 1)), (4, (3, 2, 1, 1))])
def test_parameters_broadcast_to_a_tensor(table: torch.Tensor, ndim: int, shape: tuple[int, ...]) -> None:
    table[..., 2] = torch.tensor([[-128.0, 127.0], [5, -7], [0, 1], [3, 4]])
    table[..., 3] = 4.0
    group = torch.tensor([1, 3, 0])
    rows = table[group] if ndim == 4 else table[group][:, :1]
    params = OperandParams(Grid.UNIFORM, 8, table, group=group)
    broadcast = parameters(params, ndim)
    for index, values in enumerate(broadcast):
        assert values.shape == shape
        assert torch.equal(values.flatten(), rows[..., index].flatten().to(values.dtype))
    assert [values.dtype for values in broadcast] == [torch.float32, torch.float32, torch.int32, torch.int32]
    of_regions = parameters(params._replace(grid=Grid.MRQ_GELU), ndim)
    assert not of_regions.zero_point.any(), "the codes of regions have none"
    assert torch.equal(of_regions.scale, broadcast.scale)
