"""Codes and scales keep their dtypes (trap 7), and a site picks the parameters of each sample's group."""

import pytest
import torch

from tqdit.spec import Grid, Role

DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_trap_7_scales_stay_fp32(site, quantized_weight, dtype: torch.dtype) -> None:
    for module in (site(Role.INPUT, groups=4), quantized_weight(6, 5)):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        module.to(dtype)
        for name, buffer in module.named_buffers():
            assert buffer.dtype is before[name].dtype, name
            assert torch.equal(buffer, before[name]), name


def test_half_and_double_round_trip_loses_no_bit(site) -> None:
    module = site(Role.INPUT, groups=4)
    before = module.scale.clone()
    module.half().double().float()
    assert torch.equal(module.scale, before)


@pytest.mark.parametrize(("ndim", "units", "trailing"), [(3, 1, (1, 1)), (4, 2, (2, 1, 1)), (4, 1, (1, 1, 1))])
def test_selection_is_per_sample(site, clock, ndim: int, units: int, trailing: tuple[int, ...]) -> None:
    module = site(Role.QUERY, ndim, groups=4, units=units)
    clock.set(torch.tensor([999, 0, 260, 260]), 4)
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
    clock.set(torch.tensor([999, 0]), 2)
    params = module.select()
    assert params.grid is Grid.MRQ_SOFTMAX
    assert torch.equal(params.scale, module.scale[[3, 0]])
    assert torch.equal(params.coarse, module.coarse[[3, 0]])
    assert (params.scale != params.coarse).all()


def test_grouped_site_before_any_call_is_an_error(site) -> None:
    with pytest.raises(AssertionError, match="clock"):
        site(Role.INPUT, groups=4).select()


def test_column_sums(quantized_weight) -> None:
    weight = quantized_weight(6, 50)
    assert weight.colsum.tolist() == weight.codes.long().sum(1).tolist()
    assert "8 bits" in repr(weight)
