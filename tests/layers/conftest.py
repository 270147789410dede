"""Makers of sites and weights with random parameters."""

from collections.abc import Callable

import pytest
import torch
from tqdit.layers.clock import TimestepClock

from tqdit.layers.params import ActivationParams
from tqdit.ops.schema import WeightParams
from tqdit.spec import Grid, GridParams, Role, SiteSpec
from tqdit.timegroups import TimeGroups


@pytest.fixture
def clock() -> TimestepClock:
    return TimestepClock(TimeGroups.uniform(0, 1000, 4))


@pytest.fixture
def site(clock: TimestepClock) -> Callable[..., ActivationParams]:
    """An activation site with other parameters in every group and unit."""

    def make(role: Role, ndim: int = 3, groups: int = 1, units: int = 1, grid: Grid = Grid.UNIFORM, bits: int = 8):
        spec = SiteSpec(f"a.{role}", role, bits, grid, groups=groups, units=units)
        shape = (groups, units)
        if grid.two_region:
            params = GridParams(spec, torch.rand(*shape, 2) * torch.tensor([0.002, 0.02]) + 0.001)
        else:
            zero_point = torch.randint(-40, 40, shape, dtype=torch.int32)
            params = GridParams(spec, torch.rand(shape) * 0.03 + 0.02, zero_point)
        return ActivationParams(params, clock, ndim)

    return make


@pytest.fixture
def weight() -> Callable[..., WeightParams]:
    def make(out: int, inner: int) -> WeightParams:
        codes = torch.randint(-128, 128, (out, inner), dtype=torch.int8)
        return WeightParams(codes, torch.rand(out) * 0.01 + 0.001)

    return make
