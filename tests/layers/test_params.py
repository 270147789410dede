"""Codes and scales keep their dtypes (trap 7), and a site picks the parameters of each sample's group."""

from dataclasses import replace

import pytest
import torch

from tqdit.layers.call import Call
from tqdit.layers.params import ActivationParams
from tqdit.ops import tables
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
    before = module.table.clone()
    module.half().double().float()
    assert torch.equal(module.table, before)


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_GELU])
def test_a_site_has_the_table_of_its_solved_parameters(grid: Grid) -> None:
    spec = SiteSpec("a", Role.GELU, 6, grid, groups=3, units=2)
    scale = torch.rand(3, 2, 2) + 0.01 if grid.two_region else torch.rand(3, 2) + 0.01
    zero_point = None if grid.two_region else torch.randint(-32, 32, (3, 2), dtype=torch.int32)
    params = GridParams(spec, scale, zero_point)
    module, made = ActivationParams(params), tables.operand(params)
    operand = module.operand(Call(torch.tensor([2, 0]), None))
    assert torch.equal(operand.table, made.table)
    assert (operand.grid, operand.bits, operand.merged) == (grid, 6, made.merged)
    module.table.zero_()
    assert made.table.any()
    assert torch.equal(params.scale, scale)


@pytest.mark.parametrize("groups", [1, 3])
def test_channel_factors_come_with_every_call(groups: int) -> None:
    """In fp32 and on the module's device, whatever the model is cast to; none where the site has none."""
    factors = torch.rand(5) + 0.1
    spec = SiteSpec("a", Role.GELU, 8, Grid.UNIFORM, groups=groups)
    params = GridParams(spec, torch.full((groups, 1), 0.1), torch.zeros(groups, 1, dtype=torch.int32), factors)
    module = ActivationParams(params).half()
    call = Call(torch.tensor([0, groups - 1]), None)
    assert torch.equal(module.operand(call).channels, factors)
    assert module.operand(call).channels.dtype is torch.float32
    assert ActivationParams(replace(params, channels=None)).operand(call).channels is None


def test_merged_regions_are_one_operand() -> None:
    """A site says so to every call, with the factor of each group in its table."""
    s1 = torch.full((2, 1), 0.0123)
    spec = SiteSpec("a", Role.SOFTMAX, 6, Grid.MRQ_SOFTMAX, groups=2)
    params = GridParams(spec, torch.stack([s1, s1 * torch.tensor([[8.0], [2.0]])], -1))
    operand = ActivationParams(params).operand(Call(torch.tensor([1, 0, 1]), None))
    assert operand.merged
    assert not operand.two_products
    assert operand.selected()[:, 0, tables.FACTOR].tolist() == [2.0, 8.0, 2.0]
    apart = GridParams(spec, torch.stack([s1, s1 * 2.5], -1))
    assert ActivationParams(apart).operand(Call(torch.tensor([1]), 1)).two_products


@pytest.mark.parametrize(("ndim", "units", "shape"), [(3, 1, (1, 1)), (4, 2, (2, 1, 1)), (4, 1, (1, 1, 1))])
def test_selection_is_per_sample(site, call, ndim: int, units: int, shape: tuple[int, ...]) -> None:
    module = site(Role.QUERY, groups=4, units=units)
    operand = module.operand(call([999, 0, 260, 260]))
    assert operand.shared is None
    assert torch.equal(operand.selected(), module.table[[3, 0, 1, 1]])
    params = tables.parameters(operand, ndim)
    assert params.scale.shape == params.zero_point.shape == (4, *shape)
    for sample, group in enumerate([3, 0, 1, 1]):
        assert torch.equal(params.scale[sample].flatten(), module.table[group, :, tables.SCALE])
        assert torch.equal(params.zero_point[sample].flatten(), module.table[group, :, tables.ZERO].int())


def test_ungrouped_site_has_one_row_for_every_call(site, call) -> None:
    """Its operand has no group of a call: a prompt, say, is the same at every timestep."""
    module = site(Role.QUERY, groups=1, units=2)
    for timesteps in ([999, 0, 260], [700]):
        operand = module.operand(call(timesteps))
        assert (operand.group, operand.shared) == (None, None)
        assert operand.selected().data_ptr() == module.table.data_ptr()
        assert tables.parameters(operand, 4).scale.shape == (1, 2, 1, 1)


def test_two_region_site_has_both_scales(site, call) -> None:
    module = site(Role.SOFTMAX, groups=4, grid=Grid.MRQ_SOFTMAX)
    operand = module.operand(call([999, 0]))
    assert operand.grid is Grid.MRQ_SOFTMAX
    params = tables.parameters(operand, 4)
    assert torch.equal(params.scale.flatten(), module.table[[3, 0], 0, tables.SCALE])
    assert torch.equal(params.coarse.flatten(), module.table[[3, 0], 0, tables.COARSE])
    assert (params.scale != params.coarse).all()


def test_shared_group_is_a_view(site, call) -> None:
    module = site(Role.QUERY, groups=4, units=2)
    operand = module.operand(call([260, 499, 300]))
    assert operand.shared == 1
    assert operand.group.tolist() == [1, 1, 1]
    assert torch.equal(operand.selected(), module.table[1:2])
    assert operand.selected().data_ptr() == module.table[1].data_ptr()


def test_compiled_sites_are_not_compiled_anew_for_every_group(site) -> None:
    """Not even where the host knows the group, which would be a constant in a graph."""
    module, graphs = site(Role.QUERY, groups=4), []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda call: module.operand(call).selected() * 1, fullgraph=True, backend=count)
    for group in (3, 0, 2):
        call = Call(torch.tensor([group, group]), group)
        assert torch.equal(compiled(call), module.table[[group, group]])
    assert len(graphs) == 1


def test_column_sums(weight) -> None:
    w = weight(6, 50)
    assert get_backend("reference").prepare(w, None).colsum.tolist() == w.codes.long().sum(1).tolist()
