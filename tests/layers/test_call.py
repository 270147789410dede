"""`Call` and the time groups in it: looked up once a call, kept in no module."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from tqdit.errors import InputError
from tqdit.layers.call import Call, GroupLookup
from tqdit.timegroups import TimeGroups


@pytest.mark.parametrize(
    ("timestep", "group", "shared"),
    [
        (torch.tensor([0, 250, 999]), [0, 1, 3], None),
        (torch.tensor([700]), [2], 2),
        (torch.tensor([260, 499, 300]), [1, 1, 1], 1),
        (torch.tensor([0, 0]), [0, 0], 0),
        (torch.tensor([249.9, 250.0, 250.1]), [0, 1, 1], None),
        (torch.tensor([249.999999, 250.0], dtype=torch.float64), [0, 1], None),
        (torch.tensor([0, 250, 999], dtype=torch.int32), [0, 1, 3], None),
        (torch.tensor([3, 99], dtype=torch.uint8), [0, 0], 0),
        (torch.tensor([248.0, 250.0], dtype=torch.bfloat16), [0, 1], None),
        (torch.tensor([999.5], dtype=torch.float16), [3], 3),
    ],
)
def test_groups_of_the_batch(groups: GroupLookup, timestep: torch.Tensor, group: list[int], shared: int | None) -> None:
    found = groups(timestep)
    assert found.group.tolist() == group
    assert found.group.dtype is torch.int64
    assert found.shared == shared


@pytest.mark.parametrize("timestep", [[-1], [1000], [0, 1, 5000], [float("nan")]])
def test_timestep_outside_is_an_error(groups: GroupLookup, timestep: list[float]) -> None:
    with pytest.raises(InputError, match="outside"):
        groups(torch.tensor(timestep))


def test_edges_need_not_be_whole_or_positive() -> None:
    lookup = GroupLookup(TimeGroups((-0.5, 0.25), -1.0, 1.0, closed=True))
    assert lookup(torch.tensor([-1.0, -0.5, 0.2, 0.25, 1.0])).group.tolist() == [0, 1, 1, 2, 2]


def test_lookups_are_independent() -> None:
    coarse, fine = GroupLookup(TimeGroups.uniform(0, 1000, 2)), GroupLookup(TimeGroups.uniform(0, 1000, 10))
    assert (coarse(torch.tensor([999])).group.item(), fine(torch.tensor([0])).group.item()) == (1, 0)
    assert coarse(torch.tensor([0])).group.item() == 0


def test_edges_are_not_part_of_the_checkpoint(groups: GroupLookup) -> None:
    assert not groups.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_edges_keep_their_dtype(dtype: torch.dtype) -> None:
    """In bf16 the edge 333.3 would be 334, and comparing it with timesteps in fp64 an error."""
    lookup = GroupLookup(TimeGroups((333.3, 999.0), 0, 1000))
    before = lookup.edges.clone()
    lookup.to(dtype)
    assert lookup.edges.dtype is torch.float64
    assert torch.equal(lookup.edges, before)


def test_compiled_lookup_reads_no_value(groups: GroupLookup) -> None:
    """One graph for all timesteps, no row for the host; a timestep outside is in the first or the last group."""
    seen = []

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        seen.append(module)
        return module.forward

    compiled = torch.compile(groups, fullgraph=True, backend=count)
    for timestep in ([0.0, 250.0, 999.0], [-5.0, 5000.0, 499.9], [700.0, 700.0, 700.0]):
        found = compiled(torch.tensor(timestep))
        inside = torch.tensor(timestep).clamp(0, 999.9)
        assert torch.equal(found.group, groups(inside).group)
        assert found.shared is None
    assert len(seen) == 1


def test_a_call_is_frozen() -> None:
    call = Call(torch.tensor([1]), 1)
    with pytest.raises(FrozenInstanceError):
        call.shared = 2  # type: ignore[misc]
