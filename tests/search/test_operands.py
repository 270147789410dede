"""Operands under search: which parameter each value uses, and which candidates there are."""

import pytest
import torch

from tqdit.calibration.statistics import RangeStats
from tqdit.errors import InputError
from tqdit.grids import mrq_gelu, regions, uniform
from tqdit.search import operands
from tqdit.spec import Granularity, Grid, Role, SiteSpec


def stats(x: torch.Tensor, group: torch.Tensor, groups: int) -> RangeStats:
    x = x[:, None] if x.ndim == 2 else x
    return RangeStats.empty(groups, x.shape[1] if x.ndim == 4 else 1).update(x, group)


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    group = torch.arange(60) % 3
    return torch.randn(60, 8) * (1 + group[:, None]) + 0.5, group


@pytest.fixture
def heads() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 2, 5, 4) * torch.tensor([1.0, 7.0])[:, None, None], torch.arange(6) % 3


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_use_the_scale_of_their_group(rows, groups: int) -> None:
    x, group = rows
    spec = SiteSpec("s", Role.INPUT, 8, groups=groups)
    operand = operands.activation(spec, x, group, stats(x, group, 3))
    assert operand.scale.shape == (groups, 1)
    for g in range(3):
        members = x[group == g]
        seen = members if groups == 3 else x
        scale, zero_point = uniform.minmax_asymmetric(seen.min(), seen.max(), 8, "s")
        expected = uniform.dequantize(uniform.quantize(members, scale, zero_point, 8), scale, zero_point)
        assert torch.equal(operand.fake()[group == g], expected)


def test_attention_uses_the_scale_of_group_and_head(heads) -> None:
    x, group = heads
    spec = SiteSpec("s", Role.KEY, 8, granularity=Granularity.PER_HEAD, groups=3, units=2)
    operand = operands.activation(spec, x, group, stats(x, group, 3))
    for g in range(3):
        for h in range(2):
            members = x[group == g, h]
            scale, zero_point = uniform.minmax_asymmetric(members.min(), members.max(), 8, "s")
            expected = uniform.dequantize(uniform.quantize(members, scale, zero_point, 8), scale, zero_point)
            assert torch.equal(operand.fake()[group == g, h], expected)


def test_losses_are_summed_into_the_parameter_that_caused_them(rows, heads) -> None:
    x, group = rows
    loss = torch.rand(60, 5)
    operand = operands.activation(SiteSpec("s", Role.INPUT, 8, groups=3), x, group, stats(x, group, 3))
    expected = torch.stack([loss[group == g].sum() for g in range(3)])[:, None]
    assert torch.allclose(operand.reduce(loss), expected)

    x, group = heads
    loss = torch.rand(6, 2, 5, 7)
    for units in (1, 2):
        spec = SiteSpec("s", Role.SOFTMAX, 8, groups=3, units=units)
        ranges = stats(x, group, 3)
        operand = operands.activation(spec, x, group, ranges if units == 2 else ranges.over_units())
        expected = torch.stack([loss[group == g].sum((0, 2, 3)) for g in range(3)])
        expected = expected if units == 2 else expected.sum(1, keepdim=True)
        assert torch.allclose(operand.reduce(loss), expected)
        several = torch.stack([loss.sum(-1).flatten(), 2 * loss.sum(-1).flatten()], -1)
        assert torch.allclose(operand.totals(several), torch.stack([expected, 2 * expected], -1))


@pytest.mark.parametrize("per_channel", [True, False])
def test_stacked_weights_keep_their_own_scales(per_channel: bool) -> None:
    parts = [torch.randn(4, 6), torch.randn(4, 6) * 10]
    units = 4 if per_channel else 1
    specs = [SiteSpec(f"w{i}", Role.WEIGHT, 8, units=units) for i in range(2)]
    operand = operands.weight(specs, parts)
    largest = torch.cat([p.abs().amax(1) if per_channel else p.abs().amax()[None] for p in parts])
    assert torch.allclose(operand.scale, largest[None] / 127)
    scale = operand.scale[0] if per_channel else operand.scale[0].repeat_interleave(4)
    values = torch.cat(parts)
    expected = uniform.dequantize(uniform.quantize(values, scale[:, None], 0, 8), scale[:, None], 0)
    assert torch.equal(operand.fake(), expected)
    loss = torch.rand(9, 8)
    per_output = loss.sum(0)
    assert torch.allclose(operand.reduce(loss)[0], per_output if per_channel else per_output.reshape(2, 4).sum(1))


def test_uniform_candidates_are_multiples_of_the_minmax_scale(rows, tiny_recipe) -> None:
    x, group = rows
    operand = operands.activation(SiteSpec("s", Role.INPUT, 8, groups=3), x, group, stats(x, group, 3))
    (tables,) = operand.candidate_scales(operand.scale, tiny_recipe(candidates=7, low=0.5, high=1.1))
    ratios = tables / operand.scale
    assert torch.allclose(ratios[:, 0, 0], torch.linspace(0.5, 1.1, 7))
    assert len(tables) == 7


def test_softmax_candidates_are_powers_of_two_below_a_fixed_coarse_scale(tiny_recipe) -> None:
    p, group = torch.randn(6, 2, 5, 9).softmax(-1), torch.arange(6) % 3
    spec = SiteSpec("s", Role.SOFTMAX, 6, Grid.MRQ_SOFTMAX, groups=3)
    operand = operands.activation(spec, p, group, stats(p, group, 3).over_units())
    (tables,) = operand.candidate_scales(operand.scale, tiny_recipe())
    for i, table in zip(regions.softmax_exponents(6), tables, strict=True):
        assert torch.equal(table[..., 1], torch.full((3, 1), 1 / 31))
        assert torch.equal(table[..., 0], table[..., 1] * 2.0**-i)


def test_gelu_candidates_search_one_region_at_a_time(rows, tiny_recipe) -> None:
    x, group = torch.nn.functional.gelu(rows[0]), rows[1]
    operand = operands.activation(SiteSpec("s", Role.GELU, 8, Grid.MRQ_GELU), x, group, stats(x, group, 3))
    assert operand.scale[0, 0, 1] == x.max() / 127
    assert operand.scale[0, 0, 0] == pytest.approx(0.17 / 128)
    moved = operand.with_scale(operand.scale * 0.5)
    fine, coarse = moved.candidate_scales(operand.scale, tiny_recipe(candidates=5))
    assert {t[0, 0, 1].item() for t in fine} == {moved.scale[0, 0, 1].item()}
    assert {t[0, 0, 0].item() for t in coarse} == {moved.scale[0, 0, 0].item()}
    assert len({t[0, 0, 0].item() for t in fine}) == len({t[0, 0, 1].item() for t in coarse}) == 5


def test_what_each_row_or_matrix_uses_of_a_stack_of_tables(rows, heads) -> None:
    """By row of a linear input or a weight, and by (sample, head) of attention: where losses are summed per row."""
    x, group = rows
    tables = torch.rand(4, 3, 1)
    operand = operands.activation(SiteSpec("s", Role.INPUT, 8, groups=3), x, group, stats(x, group, 3))
    assert torch.equal(operand.by_row(tables), torch.stack([tables[:, g, 0] for g in group.tolist()], 1))

    x, group = heads
    for units in (1, 2):
        tables = torch.rand(4, 3, units)
        granularity = Granularity.PER_HEAD if units == 2 else Granularity.PER_TENSOR
        spec = SiteSpec("s", Role.KEY, 8, granularity=granularity, groups=3, units=units)
        ranges = stats(x, group, 3) if units == 2 else stats(x, group, 3).over_units()
        operand = operands.activation(spec, x, group, ranges)
        expected = [tables[:, g, h if units == 2 else 0] for g in group.tolist() for h in range(2)]
        assert torch.equal(operand.by_row(tables), torch.stack(expected, 1))
        assert operand.by_row(tables).is_contiguous()

    specs = [SiteSpec("per tensor", Role.WEIGHT, 8), SiteSpec("per channel", Role.WEIGHT, 8, units=3)]
    operand = operands.weight(specs, [torch.randn(2, 6), torch.randn(3, 6)])
    tables = torch.rand(5, 1, 4)
    assert torch.equal(operand.by_row(tables), tables[:, 0, [0, 0, 1, 2, 3]])


def test_weights_of_both_granularities_share_an_input() -> None:
    """The first two rows have one scale, the others one each; so have the losses of their outputs."""
    specs = [SiteSpec("per tensor", Role.WEIGHT, 6), SiteSpec("per channel", Role.WEIGHT, 6, units=3)]
    parts = [torch.randn(2, 6), torch.randn(3, 6) * 5]
    operand = operands.weight(specs, parts)
    largest = torch.cat([parts[0].abs().max()[None], parts[1].abs().amax(1)])
    assert torch.allclose(operand.scale, largest[None] / 31)
    assert operand.zero_point.dtype is torch.int32
    assert not operand.zero_point.any()
    loss = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [10.0, 20.0, 40.0, 80.0, 160.0]])
    assert operand.reduce(loss).tolist() == [[33.0, 44.0, 88.0, 176.0]]
    assert operand.is_weight
    assert not operand.merging
    assert operands.weight(specs[::-1], parts[::-1]).unit.tolist() == [0, 1, 2, 3, 3]


def test_a_weight_of_two_channels_has_two_scales() -> None:
    operand = operands.weight([SiteSpec("w", Role.WEIGHT, 8, units=2)], [torch.tensor([[1.27, 0.5], [-2.54, 1.0]])])
    assert operand.scale.flatten().tolist() == pytest.approx([0.01, 0.02])
    assert operand.unit.tolist() == [0, 1]


def test_heads_of_a_softmax_share_their_scale() -> None:
    p, group = torch.randn(6, 3, 5, 9).softmax(-1), torch.arange(6) % 3
    spec = SiteSpec("s", Role.SOFTMAX, 6, Grid.MRQ_SOFTMAX, groups=3)
    operand = operands.activation(spec, p, group, stats(p, group, 3).over_units())
    table = operand.scale * torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    for g in range(3):
        s1, s2 = table[g, 0]
        expected = regions.fake_quantize(p[group == g], s1, s2, 6, spec.grid)
        assert torch.equal(operand.fake(table)[group == g], expected)


def test_the_finest_merging_region_may_reach_exactly_as_far_as_asked() -> None:
    """s1 = s2 / 2 is as fine as asked, s1 = s2 / 4 would be finer, s1 = s2 coarser than needed."""
    fine, coarse = torch.tensor([[0.1]]), torch.tensor([[0.2]])
    assert torch.equal(mrq_gelu.finest_merged(fine, coarse, 4), torch.stack([fine, coarse], -1))


@pytest.mark.parametrize("bits", range(4, 9))
def test_softmax_starts_between_the_ends_of_its_candidates(bits: int) -> None:
    """s2 = 1 / m, so that 1 is exact, and s1 a power of two below it, neither the coarsest nor the finest."""
    p, group = torch.randn(6, 2, 5, 9).softmax(-1), torch.arange(6) % 3
    spec = SiteSpec("s", Role.SOFTMAX, bits, Grid.MRQ_SOFTMAX, groups=3)
    operand = operands.activation(spec, p, group, stats(p, group, 3).over_units())
    s1, s2 = operand.scale.unbind(-1)
    assert torch.equal(s2, torch.full((3, 1), 1 / (2 ** (bits - 1) - 1)))
    exponents = torch.log2(s2 / s1).flatten().tolist()
    first, *_, last = regions.softmax_exponents(bits)
    assert len(set(exponents)) == 1
    assert exponents[0] in range(first + 1, last)


@pytest.mark.parametrize(
    ("grid", "merging", "independent"),
    [
        (Grid.MRQ_GELU, False, True),
        (Grid.MRQ_GELU, True, False),
        (Grid.MRQ_SOFTMAX, False, False),
        (Grid.MRQ_SOFTMAX, True, False),
        (Grid.UNIFORM, False, False),
    ],
)
def test_only_two_regions_after_gelu_are_searched_apart(rows, grid: Grid, merging: bool, independent: bool) -> None:
    """The softmax's s1 and s2, and all that merge, are a power of two apart."""
    x, group = rows[0].abs(), rows[1]
    operand = operands.activation(SiteSpec("s", Role.GELU, 6, grid), x, group, stats(x, group, 3), merging)
    assert operand.independent_regions is independent


def test_a_site_without_time_groups_has_the_range_of_all_of_them(rows) -> None:
    x, group = rows
    operand = operands.activation(SiteSpec("s", Role.INPUT, 8), x, group, stats(x, group, 3))
    assert not operand.lead.any()
    scale, zero_point = uniform.minmax_asymmetric(x.min(), x.max(), 8, "s")
    assert operand.scale.tolist() == [[scale.item()]]
    assert operand.zero_point.tolist() == [[zero_point.item()]]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_fake_operand_takes_other_scales_of_two_regions(rows, bits: int) -> None:
    x, group = torch.nn.functional.gelu(rows[0]), rows[1]
    spec = SiteSpec("s", Role.GELU, bits, Grid.MRQ_GELU, groups=3)
    operand = operands.activation(spec, x, group, stats(x, group, 3))
    table = operand.scale * torch.tensor([0.7, 1.3])
    for g in range(3):
        s1, s2 = table[g, 0]
        members = x[group == g]
        expected = regions.dequantize(regions.quantize(members, s1, s2, bits, spec.grid), s1, s2, spec.grid)
        assert torch.equal(operand.fake(table)[group == g], expected)
    assert torch.equal(operand.fake(), operand.with_scale(operand.scale).fake())
    assert torch.equal(operand.with_scale(table).fake(), operand.fake(table))


# One product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(4, 9))
def test_gelu_candidates_of_one_product_are_every_scale_with_every_exponent(rows, tiny_recipe, bits: int) -> None:
    x, group = torch.nn.functional.gelu(rows[0]), rows[1]
    spec = SiteSpec("s", Role.GELU, bits, Grid.MRQ_GELU, groups=3)
    operand = operands.activation(spec, x, group, stats(x, group, 3), merging=True)
    recipe = tiny_recipe(candidates=7)
    (tables,) = operand.candidate_scales(operand.scale, recipe)
    found = set()
    for table in tables:
        shift = regions.merge_shift(table[..., 0], table[..., 1], bits, spec.grid)
        assert shift is not None
        assert shift.unique().numel() == 1
        found.add((shift[0, 0].item(), (table[..., 1] / operand.scale[..., 1])[0, 0].item()))
    exponents, multiples = ({part[axis] for part in found} for axis in (0, 1))
    assert exponents == set(regions.merging_exponents(bits, spec.grid))
    assert sorted(multiples) == pytest.approx(uniform.factors(recipe.low, recipe.high, 7).tolist())
    assert len(found) == len(tables) == len(exponents) * 7


@pytest.mark.parametrize("bits", range(4, 9))
@pytest.mark.parametrize("largest", [0.02, 0.4, 2.0, 40.0])
def test_merging_gelu_starts_with_both_ranges_covered(bits: int, largest: float) -> None:
    x, group = torch.tensor([[-0.17, largest], [0.0, largest / 3]]), torch.arange(2)
    spec = SiteSpec("s", Role.GELU, bits, Grid.MRQ_GELU, groups=2)
    operand = operands.activation(spec, x, group, stats(x, group, 2), merging=True)
    s1, s2 = operand.scale[..., 0], operand.scale[..., 1]
    top = 2 ** (bits - 1)
    shift = regions.merge_shift(s1, s2, bits, spec.grid)
    assert shift is not None
    assert (s1 * top >= 0.17 * (1 - 1e-6)).all()
    assert (s2 * (top - 1) >= torch.tensor([[largest], [largest / 3]]) * (1 - 1e-6)).all()
    finer = (shift < regions.merging_exponents(bits, spec.grid).stop - 1) & (s1 / 2 * top >= 0.17)
    assert not finer.any()


@pytest.mark.parametrize("bits", range(4, 9))
def test_softmax_of_one_product_starts_and_stays_where_regions_merge(tiny_recipe, bits: int) -> None:
    p, group = torch.randn(6, 2, 5, 9).softmax(-1), torch.arange(6) % 3
    spec = SiteSpec("s", Role.SOFTMAX, bits, Grid.MRQ_SOFTMAX, groups=3)
    operand = operands.activation(spec, p, group, stats(p, group, 3).over_units(), merging=True)
    (tables,) = operand.candidate_scales(operand.scale, tiny_recipe())
    shifts = [regions.merge_shift(t[..., 0], t[..., 1], bits, spec.grid) for t in [operand.scale, *tables]]
    assert all(shift is not None for shift in shifts)
    assert [shift[0, 0].item() for shift in shifts[1:]] == list(regions.softmax_exponents(bits, merging=True))
    assert shifts[0][0, 0].item() in regions.softmax_exponents(bits, merging=True)


@pytest.mark.parametrize("value", [0.0, 1e-42])
@pytest.mark.parametrize("merging", [False, True])
def test_a_unit_without_a_range_gets_a_scale_of_1(value: float, merging: bool) -> None:
    x, group = torch.full((4, 8), value), torch.zeros(4, dtype=torch.int64)
    operand = operands.activation(SiteSpec("s", Role.INPUT, 8), x, group, stats(x, group, 1))
    assert operand.scale.tolist() == [[1.0]]
    assert operand.zero_point.tolist() == [[0]]
    assert not operand.fake().any()
    (weight,) = operands.weight([SiteSpec("w", Role.WEIGHT, 8, units=4)], [x]).scale
    assert weight.tolist() == [1.0] * 4
    gelu = operands.activation(SiteSpec("s", Role.GELU, 6, Grid.MRQ_GELU), x, group, stats(x, group, 1), merging)
    fine = regions.GELU_MINIMUM / 32
    assert gelu.scale.flatten().tolist() == pytest.approx([fine, fine])  # of the region that may still have values


def test_multiples_of_a_scale_stay_powers_of_two_apart_where_they_merge(tiny_recipe) -> None:
    x, group = torch.nn.functional.gelu(torch.randn(4, 8)), torch.zeros(4, dtype=torch.int64)
    spec = SiteSpec("s", Role.GELU, 4, Grid.MRQ_GELU)
    operand = operands.activation(spec, x, group, stats(x, group, 1), merging=True)
    (tables,) = operand.candidate_scales(operand.scale, tiny_recipe(candidates=3, low=1e-44))
    for table in tables:
        assert (table >= uniform.SMALLEST).all()
        assert regions.merge_shift(table[..., 0], table[..., 1], 4, spec.grid) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_range_without_a_scale_names_the_site(value: float) -> None:
    x, group = torch.full((4, 8), value), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError, match=r"'block\.3\.fc1'.*time group 0 of 1"):
        operands.activation(SiteSpec("block.3.fc1", Role.INPUT, 8), x, group, stats(x, group, 1))
    gelu = SiteSpec("block.3.fc2", Role.GELU, 6, Grid.MRQ_GELU)
    with pytest.raises(InputError, match=r"'block\.3\.fc2'"):
        operands.activation(gelu, x, group, stats(x, group, 1), merging=True)
    with pytest.raises(InputError, match=r"'block\.3\.w'"):
        operands.weight([SiteSpec("block.3.w", Role.WEIGHT, 8)], [x])
