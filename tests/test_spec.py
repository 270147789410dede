"""Integer formats and site specs."""

import pytest

from tqdit.grids.registry import known
from tqdit.spec import Granularity, Grid, IntFormat, Role, SiteSpec


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_every_width_have_2_to_the_k_values_and_fit_int8(bits: int) -> None:
    fmt = IntFormat(bits)
    assert fmt.qmax - fmt.qmin + 1 == 2**bits
    assert -128 <= fmt.qmin < 0 < fmt.qmax <= 127


def test_only_weights_rows_and_mrq_sites_have_no_zero_point(solved) -> None:
    assert {role for role in Role if SiteSpec("s", role, 8).is_weight} == {Role.WEIGHT, Role.WEIGHT_ONLY}
    for params in solved("plus").params.values():
        free = params.spec.is_weight or params.spec.grid.two_region or params.spec.grid.per_row
        assert (params.zero_point is None) == free, params.spec.name


def test_two_region_grids() -> None:
    assert [grid for grid in known() if grid.two_region] == [Grid.MRQ_SOFTMAX, Grid.MRQ_GELU]


def test_a_solution_lists_its_sites_in_the_order_of_the_model(solved) -> None:
    solution = solved()
    assert [site.name for site in solution.sites] == list(solution.params)
    assert solution.sites[0].name == "pos_embed.proj.weight"
    assert solution.sites[0].granularity is Granularity.PER_CHANNEL
