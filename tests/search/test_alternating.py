"""The alternating search: every candidate scored, never worse, better where it matters."""

from collections.abc import Callable

import pytest
import torch

from tqdit.calibration.statistics import RangeStats
from tqdit.grids import uniform
from tqdit.search import alternating, operands
from tqdit.search.alternating import alternate
from tqdit.search.objectives import MatmulObjective, linear, scores
from tqdit.search.operands import Operand
from tqdit.spec import Granularity, Grid, Role, SiteSpec


def activation(x: torch.Tensor, group: torch.Tensor, bits: int = 6, **spec: object) -> Operand:
    site = SiteSpec("x", spec.pop("role", Role.INPUT), bits, **spec)
    shaped = x[:, None] if x.ndim == 2 else x
    stats = RangeStats.empty(site.groups, site.units).update(shaped, group if site.groups > 1 else group * 0)
    return operands.activation(site, x, group, stats)


def weight(w: torch.Tensor, bits: int = 6, per_channel: bool = True) -> Operand:
    return operands.weight([SiteSpec("w", Role.WEIGHT, bits, units=len(w) if per_channel else 1)], [w])


@pytest.fixture
def outlier_example() -> tuple[MatmulObjective, Operand, Operand]:
    """Two values that the output hardly depends on stretch the min-max range tenfold."""
    x, w = torch.randn(200, 32), torch.randn(16, 32)
    x[0, :2] = torch.tensor([-40.0, 40.0])
    fisher = torch.rand(200, 16) + 0.1
    fisher[0] = 1e-4
    objective = MatmulObjective.weighted(linear, x, w, fisher)
    return objective, activation(x, torch.zeros(200, dtype=torch.int64)), weight(w, per_channel=False)


def test_loss_never_rises_over_the_rounds(outlier_example, tiny_recipe) -> None:
    losses = [alternate(*outlier_example, tiny_recipe(rounds=rounds))[2] for rounds in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.7 * losses[0]
    a, b, loss = alternate(*outlier_example, tiny_recipe(rounds=2))
    assert loss == pytest.approx(outlier_example[0].loss(a.fake(), b.fake()).sum().item())


def test_zero_rounds_keep_the_minmax_scales(outlier_example, tiny_recipe) -> None:
    objective, a, b = outlier_example
    same_a, same_b, _ = alternate(objective, a, b, tiny_recipe(rounds=0))
    assert same_a is a
    assert same_b is b


@pytest.mark.parametrize("grid", [Grid.MRQ_GELU, Grid.UNIFORM])
def test_loss_never_rises_on_either_gelu_grid(grid: Grid, tiny_recipe) -> None:
    x = torch.nn.functional.gelu(torch.randn(200, 32) * 2, approximate="tanh")
    w = torch.randn(16, 32)
    objective = MatmulObjective.weighted(linear, x, w, torch.ones(200, 16))
    a = activation(x, torch.arange(200) % 4, role=Role.GELU, grid=grid, groups=4)
    losses = [alternate(objective, a, weight(w), tiny_recipe(rounds=rounds))[2] for rounds in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < losses[0]
    found_a, found_b, loss = alternate(objective, a, weight(w), tiny_recipe(rounds=2))
    assert loss == pytest.approx(objective.loss(found_a.fake(), found_b.fake()).sum().item())  # over all groups


def exact_input() -> tuple[torch.Tensor, Operand]:
    """An 8-bit operand that its own min-max grid represents without error."""
    x = torch.randint(-128, 128, (50, 12)).float()
    x[0, 0], x[0, 1] = -128.0, 127.0
    operand = activation(x * 0.5, torch.zeros(50, dtype=torch.int64), bits=8)
    assert torch.equal(operand.fake(), x * 0.5)
    return x * 0.5, operand


@pytest.mark.parametrize("position", range(6))
def test_trap_3_an_optimum_at_any_candidate_is_found(position: int, tiny_recipe) -> None:
    recipe = tiny_recipe(candidates=6, low=0.3, high=1.2, rounds=1)
    factor = uniform.factors(0.3, 1.2, 6)[position]
    x, a = exact_input()
    best = torch.rand(4, 1) + 0.5
    w = torch.randint(-31, 32, (4, 12)) * best
    b = weight(w).with_scale((best / factor).T)
    objective = MatmulObjective.weighted(linear, x, w, torch.ones(50, 4))
    _, found, loss = alternate(objective, a, b, recipe)
    assert torch.allclose(found.scale, best.T, rtol=1e-5)
    assert loss < 1e-4


def test_trap_3_every_built_candidate_is_scored(tiny_recipe) -> None:
    scored: list[tuple[float, ...]] = []

    def counted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scored.append(tuple(w.flatten().tolist()))
        return linear(x, w)

    x, a = exact_input()
    w = torch.randn(4, 12)
    b = weight(w)
    objective = MatmulObjective.weighted(counted, x, w, torch.ones(50, 4))
    recipe = tiny_recipe(candidates=9, rounds=1)
    (tables,) = b.candidate_scales(b.scale, recipe)
    scored.clear()
    alternate(objective, a, b, recipe)
    assert len(scored) == 2 * (9 + 1) + 1  # both operands with the current scale, and the final loss
    assert {tuple(b.fake(table).flatten().tolist()) for table in tables} <= set(scored)


def test_every_channel_group_and_head_finds_its_own(tiny_recipe) -> None:
    recipe = tiny_recipe(candidates=12, rounds=1)
    group = torch.arange(8) % 2
    q = torch.randn(8, 3, 20, 4)
    q[group == 1, 2, 0, :2] = torch.tensor([-40.0, 40.0])  # outliers in one group and head alone
    k = torch.randn(8, 3, 20, 4)
    spec = {"granularity": Granularity.PER_HEAD, "groups": 2, "units": 3, "bits": 4}
    a, b = activation(q, group, role=Role.QUERY, **spec), activation(k, group, role=Role.KEY, **spec)
    fisher = torch.ones(8, 3, 20, 20)
    fisher[:, :, 0] = 0  # nobody listens to the row of the outlier
    found, _, _ = alternate(MatmulObjective.weighted(scores, q, k, fisher), a, b, recipe)
    ratio = found.scale / a.scale
    assert ratio[1, 2] < 0.3
    assert (ratio.flatten()[:-1] > 0.5).all()


def test_fisher_weights_decide(tiny_recipe) -> None:
    x, w = torch.randn(100, 12), torch.randn(4, 12)
    x[:50] *= 20
    group = torch.zeros(100, dtype=torch.int64)
    scales: list[float] = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        fisher = torch.tensor(weights).repeat_interleave(50)[:, None].expand(100, 4)
        found, _, _ = alternate(
            MatmulObjective.weighted(linear, x, w, fisher), activation(x, group), weight(w, 8), tiny_recipe()
        )
        scales.append(found.scale.item())
    assert scales[1] < scales[0] / 3


def test_softmax_exponent_follows_the_probabilities_of_the_group(tiny_recipe) -> None:
    group = torch.arange(8) % 2
    sharpness = torch.tensor([0.1, 4.0])[group][:, None, None, None]
    p = (torch.randn(8, 2, 30, 64) * sharpness).softmax(-1)
    v = torch.randn(8, 2, 64, 4)
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul
    site = SiteSpec("p", Role.SOFTMAX, 8, Grid.MRQ_SOFTMAX, groups=2)
    stats = RangeStats.empty(2, 2).update(p, group).over_units()
    a = operands.activation(site, p, group, stats)
    b = activation(v, group, bits=8, role=Role.VALUE, granularity=Granularity.PER_HEAD, units=2)
    found, _, _ = alternate(MatmulObjective.weighted(combine, p, v, torch.ones(1)), a, b, tiny_recipe())
    ratio = torch.log2(found.scale[:, 0, 1] / found.scale[:, 0, 0])
    assert torch.equal(ratio, ratio.round())  # powers of two
    flat_scale = found.scale[0, 0, 0]
    assert flat_scale * 127 >= p[group == 0].max()  # flat rows lie in the fine region, with no step to spare
    assert flat_scale * 127 / 2 < p[group == 0].max()
    assert ratio[1] != ratio[0]


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_GELU])
@pytest.mark.parametrize("per_channel", [False, True])
def test_ending_early_changes_nothing(grid: Grid, per_channel: bool, tiny_recipe, monkeypatch) -> None:
    x = torch.nn.functional.gelu(torch.randn(200, 32) * 2, approximate="tanh")
    w = torch.randn(16, 32)
    objective = MatmulObjective.weighted(linear, x, w, torch.rand(200, 16))
    a = activation(x, torch.arange(200) % 2, role=Role.GELU, grid=grid, groups=2)
    early = alternate(objective, a, weight(w, 6, per_channel), tiny_recipe(rounds=8))
    monkeypatch.setattr(torch, "equal", lambda *_: False)  # never settled
    full = alternate(objective, a, weight(w, 6, per_channel), tiny_recipe(rounds=8))
    assert (early[0].scale == full[0].scale).all()
    assert (early[1].scale == full[1].scale).all()
    assert early[2] == full[2]


def test_a_settled_search_ends(outlier_example, tiny_recipe) -> None:
    calls = []

    def counted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return linear(x, w)

    objective, a, b = outlier_example
    recipe = tiny_recipe(rounds=50)
    alternate(MatmulObjective(counted, objective.target, objective.weights), a, b, recipe)
    assert len(calls) < 10 * 2 * (recipe.candidates + 1)


# Two regions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", [0, 1])
def test_each_region_of_gelu_is_searched(region: int, tiny_recipe) -> None:
    """Values reach an eighth of the negative region's fixed extent; or an outlier that no output shows is positive."""
    x = torch.nn.functional.gelu(torch.randn(200, 32), approximate="tanh")
    fisher = torch.ones(200, 16)
    if region == 0:
        x = torch.where(x < 0, x, 0) / 8
    else:
        x[0, 0], fisher[0] = 40.0, 0.0
    w = torch.randn(16, 32)
    a = activation(x, torch.zeros(200, dtype=torch.int64), role=Role.GELU, grid=Grid.MRQ_GELU)
    found, _, _ = alternate(MatmulObjective.weighted(linear, x, w, fisher), a, weight(w, 8), tiny_recipe(rounds=1))
    assert found.scale[0, 0, region] < 0.3 * a.scale[0, 0, region]


def test_a_first_region_is_searched_again_after_the_second(tiny_recipe, monkeypatch) -> None:
    """The regions depend on one another, so a settled weight does not settle them.

    The best factor of the first region is here half of the second's, and the second's the mean of the first's and 1:
    from (1, 1) the search takes several turns to (1/3, 2/3), while the weight's scale stays as it is.
    """
    x = torch.nn.functional.gelu(torch.randn(8, 4))
    a = activation(x, torch.zeros(8, dtype=torch.int64), role=Role.GELU, grid=Grid.MRQ_GELU)
    b = weight(torch.randn(3, 4), per_channel=False)
    base = a.scale

    def loss_of(objective: object, a: Operand, b: Operand, searched: Operand) -> alternating.LossOf:
        def loss(tables: torch.Tensor) -> torch.Tensor:
            if searched is b:
                return torch.zeros(tables.shape)
            first, second = (tables / base).unbind(-1)
            return (first - second / 2).square() + (second - (first + 1) / 2).square()

        return loss

    monkeypatch.setattr(alternating, "loss_of_values", loss_of)
    recipe = tiny_recipe(candidates=121, low=0.01, high=1.21)
    objective = MatmulObjective.weighted(linear, x, b.values, None)
    losses = [alternate(objective, a, b, recipe.model_copy(update={"rounds": n}))[2] for n in (1, 2, 3, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0]
    assert losses[2] < losses[1]


def test_a_candidate_whose_loss_is_not_a_number_is_never_chosen(tiny_recipe, monkeypatch) -> None:
    x, a = exact_input()
    b = weight(torch.randn(4, 12))

    def loss_of(objective: object, a: Operand, b: Operand, searched: Operand) -> alternating.LossOf:
        def loss(tables: torch.Tensor) -> torch.Tensor:
            found = torch.ones(tables.shape)
            if len(tables) > 1:
                found[1::2], found[2] = torch.nan, 0.5
            return found

        return loss

    monkeypatch.setattr(alternating, "loss_of_values", loss_of)
    recipe = tiny_recipe(rounds=1)
    found, _, _ = alternate(MatmulObjective.weighted(linear, x, b.values, None), a, b, recipe)
    (tables,) = a.candidate_scales(a.scale, recipe)
    assert torch.equal(found.scale, tables[1])


def expected_searches(history: list[torch.Tensor], start: torch.Tensor, independent: bool) -> int:
    """How many searches the rule asks for, given the scales of b, a, b, a, ... of a run that never ends early."""
    for i, scale in enumerate(history):
        of_a = i % 2 == 1
        former = history[i - 2] if i >= 2 else start if of_a else None
        if former is not None and (scale == former).all() and (of_a or not independent):
            return i + 1
    return len(history)


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_GELU])
@pytest.mark.parametrize("seed", range(12))
def test_a_search_ends_where_another_could_change_nothing(grid: Grid, seed: int, tiny_recipe, monkeypatch) -> None:
    """When an operand keeps its scale, the other's choice is the one it had; only two regions answer to each other.

    In a quarter of these tiny problems a weight keeps its scale and GELU moves once more.
    """
    torch.manual_seed(seed)
    x, w = torch.nn.functional.gelu(torch.randn(8, 4) * 2, approximate="tanh"), torch.randn(3, 4)
    objective = MatmulObjective.weighted(linear, x, w, None)
    a = activation(x, torch.zeros(8, dtype=torch.int64), 4, role=Role.GELU, grid=grid)
    b = weight(w, 4, per_channel=False)
    history: list[torch.Tensor] = []
    search = alternating._search

    def kept(*args: object) -> Operand:
        found = search(*args)
        history.append(found.scale)
        return found

    monkeypatch.setattr(alternating, "_search", kept)
    early = alternate(objective, a, b, tiny_recipe(rounds=6))
    searches = len(history)
    history.clear()
    monkeypatch.setattr(torch, "equal", lambda *_: False)  # never settled
    full = alternate(objective, a, b, tiny_recipe(rounds=6))
    assert (early[0].scale == full[0].scale).all()
    assert (early[1].scale == full[1].scale).all()
    assert len(history) == 12
    assert searches == expected_searches(history, a.scale, grid is Grid.MRQ_GELU)


def test_both_regions_after_gelu_are_searched(tiny_recipe) -> None:
    """Values reach -0.02 where -0.17 is allowed for, and one that nobody listens to stretches the positive side.

    So a tenth of each min-max scale is enough for all values that count.
    """
    x = torch.cat([-0.02 * torch.rand(100, 8), 0.5 * torch.rand(100, 8)])
    x[-1, 0] = 5.0
    fisher = torch.ones(200, 4)
    fisher[-1] = 0
    a = activation(x, torch.zeros(200, dtype=torch.int64), role=Role.GELU, grid=Grid.MRQ_GELU)
    objective = MatmulObjective.weighted(linear, x, torch.randn(4, 8), fisher)
    found, _, _ = alternate(objective, a, weight(torch.randn(4, 8), 8), tiny_recipe())
    negative, positive = (found.scale / a.scale).flatten().tolist()
    assert negative < 0.3
    assert positive < 0.3


def test_the_weight_is_searched_first_and_given_the_minmax_activation(tiny_recipe) -> None:
    """One round scores the weight's candidates on the activation's first codes, then the activation on the new ones."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def kept(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.append((x, w))
        return linear(x, w)

    x, w = torch.randn(30, 8), torch.randn(4, 8)
    a, b = activation(x, torch.zeros(30, dtype=torch.int64), 4), weight(w, 4)
    recipe = tiny_recipe(rounds=1)
    objective = MatmulObjective(kept, linear(x, w), None)
    found_a, found_b, loss = alternate(objective, a, b, recipe)
    tries = recipe.candidates + 1
    assert all(torch.equal(one, a.fake()) for one, _ in seen[:tries])
    assert all(torch.equal(other, found_b.fake()) for _, other in seen[tries:])
    assert len(seen) == 2 * tries + 1
    plain = (linear(found_a.fake(), found_b.fake()) - linear(x, w)).square().sum()
    assert loss == pytest.approx(plain.item())


def test_a_tie_keeps_the_current_scale(tiny_recipe) -> None:
    """Where nothing is heard, every candidate costs nothing, and the min-max scale stays."""
    x, w = torch.randn(30, 8), torch.randn(4, 8)
    a, b = activation(x, torch.zeros(30, dtype=torch.int64)), weight(w)
    objective = MatmulObjective(linear, linear(x, w), torch.zeros(30, 4))
    found_a, found_b, loss = alternate(objective, a, b, tiny_recipe())
    assert torch.equal(found_a.scale, a.scale)
    assert torch.equal(found_b.scale, b.scale)
    assert loss == 0
