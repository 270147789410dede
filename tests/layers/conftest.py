"""Makers of calls, sites and weights with random parameters."""

from collections.abc import Callable

import pytest
import torch

from tqdit.layers.call import Call, GroupLookup
from tqdit.layers.params import ActivationParams
from tqdit.ops.schema import WeightParams
from tqdit.spec import Grid, GridParams, Role, SiteSpec
from tqdit.timegroups import TimeGroups


@pytest.fixture
def groups() -> GroupLookup:
    """4 groups of 1000 timesteps."""
    return GroupLookup(TimeGroups.uniform(0, 1000, 4))


@pytest.fixture
def call(groups: GroupLookup) -> Callable[..., Call]:
    """The call of some timesteps, (1,) or (B,)."""

    def make(timesteps: list[float]) -> Call:
        return Call(*groups(torch.tensor(timesteps)))

    return make


@pytest.fixture
def site() -> Callable[..., ActivationParams]:
    """An activation site with other parameters in every group and unit."""

    def make(role: Role, groups: int = 1, units: int = 1, grid: Grid = Grid.UNIFORM, bits: int = 8):
        spec = SiteSpec(f"a.{role}", role, bits, grid, groups=groups, units=units)
        shape = (groups, units)
        if grid.two_region:
            params = GridParams(spec, torch.rand(*shape, 2) * torch.tensor([0.002, 0.02]) + 0.001)
        else:
            zero_point = torch.randint(-40, 40, shape, dtype=torch.int32)
            params = GridParams(spec, torch.rand(shape) * 0.03 + 0.02, zero_point)
        return ActivationParams(params)

    return make


@pytest.fixture
def weight() -> Callable[..., WeightParams]:
    def make(out: int, inner: int) -> WeightParams:
        codes = torch.randint(-128, 128, (out, inner), dtype=torch.int8)
        return WeightParams(codes, torch.rand(out) * 0.01 + 0.001, 8)

    return make
