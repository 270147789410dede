"""Codes and scales keep their dtypes (trap 7), and a site picks the parameters of each sample's group."""

import pytest
import torch

from tqdit.layers.params import ActivationParams
from tqdit.ops.dispatch import get_backend
from tqdit.spec import Grid, GridParams, Role, SiteSpec

DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_trap_7_scales_stay_fp32(site, weight, dtype: torch.dtype, backend: str) -> None:
    run = get_backend(backend)
    layers = run.prepare(weight(6, 5), torch.randn(6)), run.prepare_float_input(weight(6, 5), torch.randn(6))
    for module in (site(Role.INPUT, groups=4), *layers):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        assert before
        module.to(dtype)
        for name, tensor in module.state_dict().items():
            assert tensor.dtype is before[name].dtype, name
            assert torch.equal(tensor, before[name]), name


def test_half_and_double_round_trip_loses_no_bit(site) -> None:
    module = site(Role.INPUT, groups=4)
    before = module.scale.clone()
    module.half().double().float()
    assert torch.equal(module.scale, before)


@pytest.mark.parametrize(("ndim", "units", "trailing"), [(3, 1, (1, 1)), (4, 2, (2, 1, 1)), (4, 1, (1, 1, 1))])
def test_selection_is_per_sample(site, clock, ndim: int, units: int, trailing: tuple[int, ...]) -> None:
    module = site(Role.QUERY, ndim, groups=4, units=units)
    clock.set(torch.tensor([999, 0, 260, 260]))
    params = module.select()
    assert params.scale.shape == params.zero_point.shape == (4, *trailing)
    for sample, group in enumerate([3, 0, 1, 1]):
        assert torch.equal(params.scale[sample], module.scale[group])
        assert torch.equal(params.zero_point[sample], module.zero_point[group])


def test_ungrouped_site_needs_no_clock(site) -> None:
    params = site(Role.QUERY, 4, groups=1, units=2).select()
    assert params.scale.shape == (1, 2, 1, 1)


def test_two_region_site_has_both_scales(site, clock) -> None:
    module = site(Role.SOFTMAX, 4, groups=4, grid=Grid.MRQ_SOFTMAX)
    clock.set(torch.tensor([999, 0]))
    params = module.select()
    assert params.grid is Grid.MRQ_SOFTMAX
    assert torch.equal(params.scale, module.scale[[3, 0]])
    assert torch.equal(params.coarse, module.coarse[[3, 0]])
    assert (params.scale != params.coarse).all()


def test_grouped_site_before_any_call_is_an_error(site) -> None:
    with pytest.raises(AssertionError, match="clock"):
        site(Role.INPUT, groups=4).select()


def test_shared_group_is_a_view(site, clock) -> None:
    module = site(Role.QUERY, 4, groups=4, units=2)
    clock.set(torch.tensor([260, 499, 300]))
    params = module.select()
    assert params.scale.shape == (1, 2, 1, 1)
    assert torch.equal(params.scale[0], module.scale[1])
    assert params.scale.data_ptr() == module.scale[1].data_ptr()


def test_column_sums(weight) -> None:
    w = weight(6, 50)
    assert get_backend("reference").prepare(w, None).colsum.tolist() == w.codes.long().sum(1).tolist()


def test_merging_regions_are_found(clock) -> None:
    """s2 = s1 2^i in every group, and both regions in one byte: 6-bit codes after GELU merge up to i = 2."""

    def shift_of(exponents: list[int], bits: int, role: Role, grid: Grid, factor: float = 1.0) -> list[int] | None:
        spec = SiteSpec("a", role, bits, grid, groups=len(exponents))
        s1 = torch.full((len(exponents), 1), 0.0123)
        s2 = s1 * 2.0 ** torch.tensor(exponents)[:, None] * factor
        shift = ActivationParams(GridParams(spec, torch.stack([s1, s2], -1)), clock, 3).shift
        return None if shift is None else shift.flatten().tolist()

    gelu, softmax = (Role.GELU, Grid.MRQ_GELU), (Role.SOFTMAX, Grid.MRQ_SOFTMAX)
    assert shift_of([0, 2], 6, *gelu) == [0, 2]
    assert shift_of([0, 3], 6, *gelu) is None
    assert shift_of([3, 1], 6, *softmax) == [3, 1]
    assert shift_of([4], 6, *softmax) is None
    assert shift_of([1], 8, *softmax) == [1]
    assert shift_of([2], 8, *softmax) is None
    assert shift_of([1], 6, *gelu, factor=1.0001) is None
    assert shift_of([-1], 6, *gelu) is None
