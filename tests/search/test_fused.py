"""The kernels of the search on a GPU, in Triton's interpreter where there is none: what the torch operations give."""

from types import SimpleNamespace

import pytest
import torch

from poisoned import PoisonedTorch

pytest.importorskip("triton")
from tqdit.calibration.statistics import RangeStats
from tqdit.search import alternating, fused, objectives, operands
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand
from tqdit.spec import Grid, Role, SiteSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows, depth and columns: of one tile, and of several tiles and chunks and parts of them.
SHAPES = [(5, 8, 3), (300, 32, 600) if DEVICE == "cuda" else (9, 18, 19)]
LINEAR = [(Role.INPUT, Grid.UNIFORM, False), (Role.GELU, Grid.MRQ_GELU, False), (Role.GELU, Grid.MRQ_GELU, True)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch) -> None:
    monkeypatch.setattr(fused, "torch", PoisonedTorch())


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch) -> None:
    """In the interpreter, where each program takes a while whatever its tile."""
    if DEVICE == "cpu":
        for name, value in {"TALL": (4, 16), "WIDE": (8, 16), "CHUNK": 8}.items():
            monkeypatch.setattr(fused, name, value)


def operand(x: torch.Tensor, role: Role, grid: Grid = Grid.UNIFORM, merging: bool = False, units: int = 1) -> Operand:
    """Of two time groups, that take turns, with ranges of their own."""
    group = torch.arange(len(x), device=DEVICE) % 2
    heads = x.shape[1] if x.ndim == 4 else 1
    stats = RangeStats.empty(2, heads, torch.device(DEVICE)).update(x[:, None] if x.ndim == 2 else x, group)
    stats = stats if units == heads else stats.over_units()
    return operands.activation(SiteSpec("x", role, 6, grid, groups=2, units=units), x, group, stats, merging)


def weight(columns: int, depth: int, per_channel: bool) -> Operand:
    spec = SiteSpec("w", Role.WEIGHT, 6, units=columns if per_channel else 1)
    return operands.weight([spec], [torch.randn(columns, depth, device=DEVICE)])


def rows_of(role: Role, rows: int, depth: int) -> torch.Tensor:
    x = torch.randn(rows, depth, device=DEVICE)
    return torch.nn.functional.gelu(x, approximate="tanh") if role is Role.GELU else x


def agree(objective: MatmulObjective, a: Operand, b: Operand, searched: Operand, tiny_recipe) -> None:
    """With torch's operations, and a stack of tables with parts of it and its tables one by one."""
    tables = torch.cat(searched.candidate_scales(searched.scale, tiny_recipe(candidates=3)))
    tables = tables[torch.randperm(len(tables))[:3]]
    expected = alternating.loss_of_values(objective, a, b, searched)(tables)
    assert expected.shape == (3, *searched.scale.shape[:2])
    loss = alternating.loss_of_steps(objective, a, b, searched)
    stack = loss(tables)
    assert torch.allclose(stack, expected, rtol=1e-4, atol=1e-6 * expected.max().item())
    for parts in ([2, 1], [1, 1, 1]):
        found = torch.cat([loss(part) for part in tables.split(parts)])
        assert torch.allclose(found, stack, rtol=1e-4, atol=1e-6 * expected.max().item())


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "weighed"),
    [
        pytest.param(*shape, weighed, marks=pytest.mark.long if DEVICE == "cpu" and weighed != large else ())
        for large, shape in enumerate(SHAPES)
        for weighed in (False, True)
    ],
)
@pytest.mark.parametrize(("role", "grid", "merging"), LINEAR)
def test_losses_of_linear_layers(
    role: Role, grid: Grid, merging: bool, rows: int, depth: int, columns: int, weighed: bool, tiny_recipe
) -> None:
    x = rows_of(role, rows, depth)
    a, b = operand(x, role, grid, merging), weight(columns, depth, per_channel=weighed)
    fisher = torch.rand(rows, columns, device=DEVICE) if weighed else None
    objective = MatmulObjective.weighted(objectives.linear, x, b.values, fisher)
    agree(objective, a, b, a, tiny_recipe)
    agree(objective, a, b, b, tiny_recipe)


@pytest.mark.parametrize("units", [1, 3])
def test_losses_of_scores(units: int, tiny_recipe) -> None:
    """A scale per head or one, of many matrices."""
    q, k = torch.randn(4, 3, 6, 8, device=DEVICE), torch.randn(4, 3, 10, 8, device=DEVICE)
    objective = MatmulObjective.weighted(objectives.scores, q, k, torch.rand(4, 3, 6, 10, device=DEVICE))
    a, b = operand(q, Role.QUERY, units=units), operand(k, Role.KEY, units=units)
    agree(objective, a, b, a, tiny_recipe)
    agree(objective, a, b, b, tiny_recipe)


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_SOFTMAX])
def test_losses_of_values(grid: Grid, tiny_recipe) -> None:
    """The probabilities have one scale of all heads, v one of each."""
    p = torch.randn(4, 3, 6, 10, device=DEVICE).mul(4).softmax(-1)
    v = torch.randn(4, 3, 10, 8, device=DEVICE)
    objective = MatmulObjective.weighted(objectives.values, p, v, None)
    a, b = operand(p, Role.SOFTMAX, grid), operand(v, Role.VALUE, units=3)
    agree(objective, a, b, a, tiny_recipe)
    agree(objective, a, b, b, tiny_recipe)


def test_operands_may_lie_in_memory_as_they_like(tiny_recipe) -> None:
    x, w = torch.randn(8, 6, device=DEVICE).t(), torch.randn(8, 4, device=DEVICE).t()
    fisher = torch.rand(4, 6, device=DEVICE).t()
    a, b = operand(x, Role.INPUT), operands.weight([SiteSpec("w", Role.WEIGHT, 6)], [w])
    target = objectives.linear(x, w).t().contiguous().t()
    objective = MatmulObjective(objectives.linear, target, fisher)
    agree(objective, a, b, a, tiny_recipe)
    agree(objective, a, b, b, tiny_recipe)


def test_half_as_many_at_once_where_memory_runs_out(tiny_recipe, monkeypatch) -> None:
    x = rows_of(Role.INPUT, 6, 8)
    a, b = operand(x, Role.INPUT), weight(4, 8, per_channel=True)
    objective = MatmulObjective.weighted(objectives.linear, x, b.values, None)
    (tables,) = a.candidate_scales(a.scale, tiny_recipe(candidates=5))
    expected = alternating.loss_of_values(objective, a, b, a)(tables)
    steps, counts, most = fused.steps, [], 2

    def limited(operand: Operand, tables: torch.Tensor) -> fused.Steps:
        counts.append(len(tables))
        if len(tables) > most:
            raise torch.OutOfMemoryError
        return steps(operand, tables)

    monkeypatch.setattr(fused, "steps", limited)
    monkeypatch.setattr(fused, "at_once", lambda *_: 5)
    loss = alternating.loss_of_steps(objective, a, b, a)
    assert torch.allclose(loss(tables), expected, rtol=1e-4)
    assert counts == [1, 5, 2, 2, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        loss(tables)


@pytest.mark.parametrize(
    ("reason", "grid", "searched"),
    [(None, Grid.MRQ_GELU, "steps"), ("no Triton", Grid.UNIFORM, "values"), (None, "another", "values")],
)
def test_kernels_search_where_they_can_run(reason, grid, searched, monkeypatch) -> None:
    """On a GPU, on grids that they have; the choice is made before anything is computed there."""
    monkeypatch.setattr(alternating, "unavailable", lambda _: reason)
    for way in ("steps", "values"):
        monkeypatch.setattr(alternating, f"loss_of_{way}", lambda *_, way=way: pytest.fail(f"by {way}"))
    values, spec = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(grid=grid)
    on_a_gpu = SimpleNamespace(values=values, scale=None, spec=spec)
    with pytest.raises(pytest.fail.Exception, match=f"by {searched}"):
        alternating.alternate(None, on_a_gpu, on_a_gpu, SimpleNamespace(rounds=1))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    x = torch.rand(40, 9, device="cuda:1")
    group = torch.zeros(40, dtype=torch.int64, device="cuda:1")
    stats = RangeStats.empty(1, 1, x.device).update(x[:, None], group)
    found = operands.activation(SiteSpec("x", Role.INPUT, 6, Grid.UNIFORM), x, group, stats)
    (part,), (scale,) = (steps := fused.steps(found, found.scale[None])).parts, steps.scales
    assert torch.allclose(part * scale[0, :, None], found.fake(), rtol=1e-6)


def test_memory_limits_the_candidates_at_once(tiny_recipe, monkeypatch) -> None:
    """By the largest of the parts of the output and of the searched operand; the losses stay."""
    x = rows_of(Role.GELU, 6, 8)
    b = weight(4, 8, per_channel=True)
    objective = MatmulObjective.weighted(objectives.linear, x, b.values, None)
    one, two = (operand(x, Role.GELU, Grid.MRQ_GELU, merging) for merging in (True, False))
    tables = b.candidate_scales(b.scale, tiny_recipe(candidates=5))[0]
    expected = alternating.loss_of_steps(objective, one, b, b)(tables)
    monkeypatch.setattr(fused, "MEMORY", 400)
    assert [fused.at_once(objective, a, a) for a in (one, two)] == [2, 1]  # of 6 x 8 values, in one or two parts
    assert [fused.at_once(objective, a, b) for a in (one, two)] == [3, 1]  # of 4 x 8 values
    assert torch.allclose(alternating.loss_of_steps(objective, one, b, b)(tables), expected, rtol=1e-4)
    monkeypatch.setattr(fused, "MEMORY", 1)
    assert fused.at_once(objective, one, b) == 1


@pytest.mark.parametrize(("role", "grid", "merging"), [*LINEAR, (Role.SOFTMAX, Grid.MRQ_SOFTMAX, False)])
def test_steps_add_up_to_the_fake_values_and_fit_tf32(role: Role, grid: Grid, merging: bool) -> None:
    """Equal to torch's own, ties included."""
    x = torch.rand(40, 3, 8, 9, device=DEVICE) if role is Role.SOFTMAX else rows_of(role, 40, 9)
    found = operand(x, role, grid, merging)
    coarse = found.scale[..., -1].min() if grid.two_region else found.scale.min()
    x.view(-1)[: x.numel() // 4 : 7] = 2.5 * coarse  # a tie where the scale is the smallest
    steps = fused.steps(found, found.scale[None])
    assert len(steps.parts) == len(steps.scales) == (2 if grid is Grid.MRQ_GELU and not merging else 1)
    shaped = [scale.reshape(*x.shape[:2], 1, 1) if x.ndim == 4 else scale[0, :, None] for scale in steps.scales]
    total = sum(part * scale for part, scale in zip(steps.parts, shaped, strict=True))
    assert torch.allclose(total, found.fake(), rtol=1e-6)
    for part in steps.parts:
        mantissa, _ = torch.frexp(part)
        assert torch.equal(mantissa * 2**11, (mantissa * 2**11).round())  # TF32 keeps 11 bits


def test_steps_of_weights() -> None:
    """One candidate's channels after the other's."""
    found = weight(6, 9, per_channel=True)
    tables = torch.stack([found.scale, found.scale / 2])
    (part,), (scales,) = (steps := fused.steps(found, tables)).parts, steps.scales
    assert torch.equal(part * scales.reshape(-1, 1), torch.cat([found.fake(table) for table in tables]))


def test_values_far_beyond_the_range_are_clipped() -> None:
    x = torch.tensor([[1e9, -1e9, 3e4, 0.5, 2.5, -0.5]], device=DEVICE).repeat(2, 1)
    found = operand(x, Role.INPUT)
    table = torch.ones_like(found.scale)
    (part,) = fused.steps(found, table[None]).parts
    assert torch.equal(part, found.fake(table))


@pytest.mark.parametrize(("role", "grid", "merging"), LINEAR)
def test_units_without_a_range(role: Role, grid: Grid, merging: bool, tiny_recipe) -> None:
    """A time group of zeros and a channel of zeros: losses of 0 under every scale, as by torch's operations."""
    x = rows_of(role, 6, 8)
    x[1::2] = 0
    a, b = operand(x, role, grid, merging), weight(4, 8, per_channel=True)
    b.values[2] = 0
    b = operands.weight([b.spec], [b.values])
    assert b.scale[0, 2] == 1
    objective = MatmulObjective.weighted(objectives.linear, x, b.values, None)
    for searched in (a, b):
        tables = torch.cat(searched.candidate_scales(searched.scale, tiny_recipe(candidates=3)))[:3]
        expected, found = (
            way(objective, a, b, searched)(tables) for way in (alternating.loss_of_values, alternating.loss_of_steps)
        )
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max().item())
        dead = found[:, 1] if searched is a else found[..., 2]
        assert not dead.any()
