"""Solving a whole model: complete, deterministic, and each choice for a reason."""

from dataclasses import replace

import pytest
import torch

from tqdit.architectures.interface import Block
from tqdit.architectures.registry import config_of, graph
from tqdit.calibration.recorder import record
from tqdit.calibration.statistics import RangeStats
from tqdit.calibration.store import Forgetful, InMemory
from tqdit.calibration.trajectories import collect
from tqdit.errors import InputError
from tqdit.grids.regions import merge_shift
from tqdit.plan import sites
from tqdit.provenance import Provenance
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.search import alternating, objectives, operands, solver
from tqdit.search.objectives import MatmulObjective
from tqdit.search.solver import solve
from tqdit.spec import Grid, Role
from tqdit.timegroups import TimeGroups

GROUPS = TimeGroups.uniform(0, 1000, 4)
PRESETS = ["paper", "plus"]
# Scales of which each is searched for, and weights that are rounded to nearest.
STATIC = {
    "input_grid": "uniform", "softmax_grid": "best", "gelu_channels": "one", "ends": "codes", "hessian": "published",
    "rounding": "nearest",
}  # fmt: skip


def site_name(block: Block, role: Role) -> str:
    """The site of an attention's operand."""
    return next(found.name for found in block.attentions[0].operands if found.role is role)


def solution_of(model, records, recipe):
    return solve(model, records, recipe, GROUPS, Provenance())


def assert_identical(a, b) -> None:
    assert list(a.params) == list(b.params)
    for name, p in a.params.items():
        q = b.params[name]
        assert p.spec == q.spec
        assert torch.equal(p.scale, q.scale), name
        assert (p.zero_point is None) == (q.zero_point is None)
        assert p.zero_point is None or torch.equal(p.zero_point, q.zero_point), name
        assert (p.channels is None) == (q.channels is None)
        assert p.channels is None or torch.equal(p.channels, q.channels), name
    for first, second in ((a.codes, b.codes), (a.floats, b.floats)):
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_site_is_solved_with_its_shape(model, solved, tiny_recipe, preset: str) -> None:
    solution = solved(preset)
    expected = sites(config_of(model), tiny_recipe(preset))
    assert list(solution.params) == [site.name for site in expected]
    for site, params in zip(expected, solution.params.values(), strict=True):
        assert replace(params.spec, grid=site.grid) == site
        shape = (site.groups, site.units)
        assert params.scale.shape == ((*shape, 2) if params.spec.grid.two_region else shape)
        assert params.scale.dtype is torch.float32
        assert (params.scale > 0).all()
        if not params.spec.has_zero_point:
            assert params.zero_point is None
        else:
            assert params.zero_point.dtype is torch.int32
            assert params.zero_point.shape == shape
    assert set(solution.codes) == {site.name for site in expected if site.is_weight}


def test_paper_keeps_mrq_everywhere(solved) -> None:
    grids = {p.spec.grid for p in solved("paper").params.values() if p.spec.role is Role.SOFTMAX}
    grids |= {p.spec.grid for p in solved("paper").params.values() if p.spec.role is Role.GELU}
    assert grids == {Grid.MRQ_SOFTMAX, Grid.MRQ_GELU}


@pytest.mark.parametrize("preset", PRESETS)
def test_trap_4_every_layer_is_calibrated(solved, preset: str) -> None:
    changes = STATIC if preset == "plus" else {}
    searched, start = solved(preset, "w4a4", **changes), solved(preset, "w4a4", rounds=0, **changes)
    for name, params in searched.params.items():
        before = start.params[name]
        if params.spec.role is Role.SOFTMAX:  # few candidates: the start may be the best
            assert (params.scale[..., 0] < params.scale[..., 1]).all() if params.zero_point is None else True
            continue
        assert params.scale.shape != before.scale.shape or (params.scale != before.scale).any(), name
    for index in range(2):
        changed = [n for n, c in searched.codes.items() if f".{index}." in n and not torch.equal(c, start.codes[n])]
        assert len(changed) >= 6


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", ["w6a6", "w4a4"])
def test_searched_scales_beat_minmax_on_the_model(model, solved, model_inputs, preset: str, bits: str) -> None:
    with torch.inference_mode():
        expected = model(**model_inputs).sample
        before, after = (
            sqnr_db(expected, convert(solved(preset, bits, rounds=rounds))(**model_inputs).sample) for rounds in (0, 2)
        )
    assert after > before - 0.1


def weight_error(model, solution) -> float:
    state, total = model.state_dict(), 0.0
    for name, codes in solution.codes.items():
        if solution.params[name].spec.role is Role.WEIGHT:
            scale = solution.params[name].scale[0][:, None]
            total += (codes * scale - state[name]).square().sum().item()
    return total


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_per_channel_weights_are_closer(model, solved, bits: str) -> None:
    tensor, channel = (
        weight_error(model, solved("paper", bits, rounds=0, weight_granularity=granularity))
        for granularity in ("per_tensor", "per_channel")
    )
    assert channel < 0.9 * tensor


def test_memory_that_runs_out_is_one_clear_error(model, records, tiny_recipe, monkeypatch) -> None:
    def hungry(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(solver, "alternate", hungry)
    with pytest.raises(InputError, match=r"too little memory to search the scales of 'transformer_blocks\.0\.attn1"):
        solution_of(model, records, tiny_recipe())


def test_weight_only_search_lowers_the_error_of_each_channel(model, solved) -> None:
    state = model.state_dict()
    errors = []
    for rounds in (0, 2):
        solution = solved("paper", "w2a8", rounds=rounds)
        name = "transformer_blocks.0.norm1.linear.weight"
        real = solution.codes[name] * solution.params[name].scale[0][:, None]
        errors.append((real - state[name]).square().sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < errors[0].sum()


def coded(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of a weight's rows (n, in) at one scale for each of them, or one for all: no zero point."""
    return (values / scale[:, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_codes_are_the_weights_in_units_of_their_scale(model, solved, preset: str) -> None:
    changes = STATIC if preset == "plus" else {}
    solution, state = solved(preset, "w4a4", **changes), model.state_dict()
    assert len(solution.codes) > 10
    for name, codes in solution.codes.items():
        params = solution.params[name]
        assert codes.dtype is torch.int8
        expected = coded(state[name].flatten(1), params.scale[0], params.spec.bits)
        assert torch.equal(codes.float(), expected.reshape(state[name].shape)), name


@pytest.mark.parametrize("rounds", [0, 1])
def test_float_input_layers_take_the_best_of_all_candidates_by_channel(
    model, records, tiny_recipe, rounds: int
) -> None:
    """The min-max scale itself competes; without rounds it stays. The loss is the squared error of the weight."""
    recipe = tiny_recipe("paper", "w4a8", rounds=rounds)
    name = "transformer_blocks.1.norm1.linear.weight"
    found = solution_of(model, records, recipe).params[name]
    values, bits = model.state_dict()[name], found.spec.bits
    minmax = values.abs().amax(1) / (2 ** (bits - 1) - 1)
    factors = [1.0, *torch.linspace(recipe.low, recipe.high, recipe.candidates).tolist()] if rounds else [1.0]
    scales = torch.stack([minmax * factor for factor in factors])
    errors = [(coded(values, scale, bits) * scale[:, None] - values).square().sum(1) for scale in scales]
    best = torch.stack(errors).argmin(0)
    assert torch.allclose(found.scale[0], scales.gather(0, best[None])[0], rtol=1e-6)
    assert found.scale.shape == (1, len(values))


def test_attention_is_searched_on_its_float_scores_and_probabilities(model, records, solved, tiny_recipe) -> None:
    """P = softmax(Q K^T / sqrt d) over the keys, V as recorded, and weights at each matmul's own output."""
    recipe, solution = tiny_recipe("paper", "w6a6"), solved("paper", "w6a6")
    block = graph(config_of(model)).blocks[0]
    record = records.attentions[block.attentions[0].module]
    specs = {
        site.role: site for site in sites(config_of(model), recipe) if site.name.startswith(block.attentions[0].module)
    }

    def operand(role: Role, values: torch.Tensor) -> operands.Operand:
        ranges = records.ranges[site_name(block, role)]
        return operands.activation(
            specs[role], values, record.group, ranges.over_units() if role is Role.SOFTMAX else ranges
        )

    p = torch.einsum("shqd,shkd->shqk", record.q, record.k).mul(record.q.shape[-1] ** -0.5).softmax(-1)
    of_values = MatmulObjective.weighted(objectives.values, p, record.v, record.fisher_values)
    of_scores = MatmulObjective.weighted(objectives.scores, record.q, record.k, record.fisher_scores)
    for objective, left, right in (
        (of_scores, operand(Role.QUERY, record.q), operand(Role.KEY, record.k)),
        (of_values, operand(Role.SOFTMAX, p), operand(Role.VALUE, record.v)),
    ):
        for expected in alternating.alternate(objective, left, right, recipe)[:2]:
            assert torch.allclose(solution.params[expected.spec.name].scale, expected.scale), expected.spec.name


def test_weights_of_half_precision_are_solved_as_their_fp32_values(tiny_dit, records, tiny_recipe) -> None:
    recipe = tiny_recipe("plus", "w4a8", rounds=1, candidates=4)
    half = tiny_dit().bfloat16()
    rounded = tiny_dit().bfloat16().float()
    solution = solution_of(half, records, recipe)
    assert_identical(solution, solution_of(rounded, records, recipe))
    assert {tensor.dtype for tensor in solution.floats.values()} == {torch.float32}


def test_matmuls_that_a_store_has_are_not_solved_again(model, records, tiny_recipe, monkeypatch) -> None:
    pieces: dict[str, InMemory] = {}

    class Kept(Forgetful):
        def once(self, name, make):
            if name not in pieces:
                pieces[name] = InMemory(make())
            return pieces[name]

    recipe = tiny_recipe(rounds=0)
    first = solve(model, records, recipe, GROUPS, Provenance(source="a"), store=Kept())
    monkeypatch.setattr(solver, "alternate", None)
    monkeypatch.setattr(solver, "linears", None)
    again = solve(model, records, recipe, GROUPS, Provenance(source="a"), store=Kept())
    assert_identical(first, again)
    assert again.provenance == Provenance(source="a")
    assert again.time_groups == GROUPS
    assert len(pieces) == 2 * 6 + len(
        [name for name in first.codes if first.params[name].spec.role is Role.WEIGHT_ONLY]
    )
    told: list[float] = []
    solve(model, records, recipe, GROUPS, Provenance(), told.append, Kept())
    assert told == pytest.approx([(i + 1) / len(pieces) for i in range(len(pieces))])


# Choice of the grid ------------------------------------------------------------------------------------------------


def with_input(records, name: str, x: torch.Tensor):
    """Records whose site `name` saw `x` (R, in), in every group alike."""
    linear = replace(records.linears[name], x=x, fisher=torch.ones_like(records.linears[name].fisher))
    ranges = RangeStats(x.amin().expand(4, 1).clone(), x.amax().expand(4, 1).clone())
    return replace(records, linears={**records.linears, name: linear}, ranges={**records.ranges, name: ranges})


@pytest.mark.parametrize("choice", ["best", "mrq", "uniform"])
@pytest.mark.parametrize(("negative_share", "better"), [(0.05, Grid.UNIFORM), (0.97, Grid.MRQ_GELU)])
def test_best_gelu_grid(model, records, tiny_recipe, choice: str, negative_share: float, better: Grid) -> None:
    name = graph(config_of(model)).blocks[1].linears[3].source.name
    shape = records.linears[name].x.shape
    x = torch.where(torch.rand(shape) < negative_share, -0.17 * torch.rand(shape), 4 * torch.rand(shape))
    solution = solution_of(model, with_input(records, name, x), tiny_recipe(gelu_grid=choice))
    expected = {"best": better, "mrq": Grid.MRQ_GELU, "uniform": Grid.UNIFORM}[choice]
    assert solution.params[name].spec.grid is expected


@pytest.mark.parametrize(("sharpness", "better"), [(0.1, Grid.UNIFORM), (3.0, Grid.MRQ_SOFTMAX)])
def test_best_softmax_grid(model, records, tiny_recipe, sharpness: float, better: Grid) -> None:
    block = graph(config_of(model)).blocks[1]
    attention = records.attentions[block.attentions[0].module]
    attention = replace(
        attention, q=torch.randn_like(attention.q) * sharpness, k=torch.randn_like(attention.k),
        fisher_values=torch.ones_like(attention.fisher_values),
    )  # fmt: skip
    p = (attention.q @ attention.k.mT / 4).softmax(-1)
    name = site_name(block, Role.SOFTMAX)
    ranges = {**records.ranges, name: RangeStats(p.amin().expand(4, 2), p.amax().expand(4, 2))}
    doctored = replace(records, attentions={**records.attentions, block.attentions[0].module: attention}, ranges=ranges)
    solution = solution_of(model, doctored, tiny_recipe("plus", "w6a6", **STATIC))
    assert solution.params[name].spec.grid is better


# One product -------------------------------------------------------------------------------------------------------


ONE = {"gelu_products": "one", "softmax_products": "one"}
TWO = dict.fromkeys(ONE, "two")
MRQ = {"gelu_grid": "mrq", "softmax_grid": "mrq"}


def two_region(solution) -> list:
    return [params for params in solution.params.values() if params.spec.grid.two_region]


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("bits", ["w6a6", "w4a4", "w8a7"])
def test_one_product_merges_every_two_region_site(solved, bits: str, rounds: int) -> None:
    one = solved("plus", bits, rounds=rounds, **MRQ, **ONE)
    assert {params.spec.role for params in two_region(one)} == {Role.GELU, Role.SOFTMAX}
    assert all(params.merged for params in two_region(one))
    two = solved("plus", bits, rounds=rounds, **MRQ, **TWO)
    assert not any(params.merged for params in two_region(two) if params.spec.role is Role.GELU)


def test_one_product_of_8_bits_is_uniform(model, solved) -> None:
    one = solved("plus", "w4a8", softmax_grid="best", **ONE)
    assert not two_region(one)
    assert_identical(one, solved("plus", "w4a8", gelu_grid="uniform", softmax_grid="uniform"))


@pytest.mark.parametrize("operand", ["gelu", "softmax"])
def test_products_are_limited_for_each_operand_alone(solved, operand: str) -> None:
    limited = solved("plus", "w6a6", rounds=0, **MRQ, **TWO | {f"{operand}_products": "one"})
    free = solved("plus", "w6a6", rounds=0, **MRQ, **TWO)
    for params, other in zip(two_region(limited), two_region(free), strict=True):
        if params.spec.role is Role(operand):
            assert params.merged
        else:
            assert torch.equal(params.scale, other.scale)
    mixed = solved("plus", "w4a8", rounds=0, **TWO | {f"{operand}_products": "one"}, **{f"{operand}_grid": "best"})
    assert all(params.spec.role is not Role(operand) for params in two_region(mixed))


@pytest.mark.parametrize(("negative_share", "better"), [(0.05, Grid.UNIFORM), (0.9, Grid.MRQ_GELU)])
def test_uniform_competes_with_merged_regions(model, records, tiny_recipe, negative_share: float, better: Grid) -> None:
    name = graph(config_of(model)).blocks[1].linears[3].source.name
    shape = records.linears[name].x.shape
    x = torch.where(torch.rand(shape) < negative_share, -0.17 * torch.rand(shape), 2 * torch.rand(shape))
    solution = solution_of(model, with_input(records, name, x), tiny_recipe("plus", "w6a6", **STATIC, **ONE))
    assert solution.params[name].spec.grid is better
    assert all(params.merged for params in two_region(solution))


def test_each_group_has_its_own_exponent(model, records, tiny_recipe) -> None:
    """Positive values of 4 need i = 2 at 6 bits; where they reach 0.17 like the negative ones, i = 0 covers both."""
    name = graph(config_of(model)).blocks[0].linears[3].source.name
    linear = records.linears[name]
    largest = torch.where(linear.group == 0, 4.0, 0.17)[:, None]
    x = torch.where(torch.rand(linear.x.shape) < 0.5, -0.17, 1.0) * torch.rand(linear.x.shape)
    x = torch.where(x > 0, x * largest, x)
    linear = replace(linear, x=x, fisher=torch.ones_like(linear.fisher))
    ranges = RangeStats.empty(4, 1).update(x[:, None], linear.group)
    doctored = replace(
        records, linears={**records.linears, name: linear}, ranges={**records.ranges, name: ranges}
    )  # fmt: skip
    recipe = tiny_recipe("plus", "w6a6", **STATIC, **ONE, gelu_grid="mrq")
    params = solution_of(model, doctored, recipe).params[name]
    shift = merge_shift(params.scale[..., 0], params.scale[..., 1], 6, Grid.MRQ_GELU)
    assert shift is not None
    assert shift[0] == 2
    assert (shift[1:] < 2).all()


# Determinism, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("states_in_float32")
def test_same_seed_same_solution(model, scheduler_config, solved, tiny_recipe, preset: str) -> None:
    recipe = tiny_recipe(preset, hessian="published")
    data = collect(model, scheduler_config, recipe)
    again = solution_of(model, record(model, data, recipe), recipe)
    assert_identical(solved(preset, hessian="published"), again)


@pytest.mark.usefixtures("states_in_float32")
def test_other_seed_other_solution(model, scheduler_config, solved, tiny_recipe) -> None:
    recipe = tiny_recipe(seed=1)
    other = solution_of(model, record(model, collect(model, scheduler_config, recipe), recipe), recipe)
    changed = [n for n, p in solved().params.items() if not torch.equal(p.scale, other.params[n].scale)]
    assert changed


def test_hessian_guidance_changes_the_choice(model, data, solved, tiny_recipe) -> None:
    recipe = tiny_recipe("paper", "w4a4", hessian=False)
    plain = solution_of(model, record(model, data, recipe), recipe)
    guided = solved("paper", "w4a4")
    assert any(not torch.equal(p.scale, plain.params[n].scale) for n, p in guided.params.items())


def test_sampler_loss_is_fisher_times_step_weight(model, records, tiny_recipe) -> None:
    """loss = "sampler" solves what loss = "epsilon" solves on records whose Fisher weights are scaled beforehand."""
    linears = {name: replace(r, fisher=r.fisher * r.step_weight[:, None]) for name, r in records.linears.items()}
    attentions = {
        name: replace(
            r,
            fisher_scores=r.fisher_scores * r.step_weight[:, None, None, None],
            fisher_values=r.fisher_values * r.step_weight[:, None, None, None],
        )
        for name, r in records.attentions.items()
    }
    scaled = replace(records, linears=linears, attentions=attentions)
    sampler = solution_of(model, records, tiny_recipe(loss="sampler"))
    epsilon = solution_of(model, records, tiny_recipe(loss="epsilon"))
    assert_identical(sampler, solution_of(model, scaled, tiny_recipe(loss="epsilon")))
    assert any(not torch.equal(p.scale, epsilon.params[name].scale) for name, p in sampler.params.items())


def test_the_model_is_only_read(tiny_dit, records, tiny_recipe) -> None:
    model = tiny_dit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    solution = solution_of(model, records, tiny_recipe())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(solution.floats) == set(before) - set(solution.codes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in solution.floats.items())


def test_a_site_whose_values_are_not_finite_is_named(model, records, tiny_recipe) -> None:
    name = graph(config_of(model)).blocks[1].linears[2].source.name
    doctored = with_input(records, name, torch.full_like(records.linears[name].x, float("nan")))
    with pytest.raises(InputError, match=rf"'{name}'.*time group 0 of 4"):
        solution_of(model, doctored, tiny_recipe())


def test_progress_reaches_the_end(model, records, tiny_recipe) -> None:
    told: list[float] = []
    solve(model, records, tiny_recipe(rounds=0), GROUPS, Provenance(), told.append)
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU its kernels need Triton's interpreter")
def test_the_search_of_a_gpu_chooses_the_same(model, records, solved, tiny_recipe, monkeypatch) -> None:
    """By its kernels, in Triton's interpreter: other roundings may break near ties in another way, here and there."""
    fused = pytest.importorskip("tqdit.search.fused", exc_type=ImportError)
    changes = {**STATIC, "candidates": 5, "rounds": 1, **MRQ}
    expected = solved("plus", "w6a6", **changes)
    monkeypatch.setattr(alternating, "loss_of_values", alternating.loss_of_steps)
    for tile in ("TALL", "WIDE"):  # few programs: the interpreter takes a while for each
        monkeypatch.setattr(fused, tile, (256, 128))
    found = solution_of(model, records, tiny_recipe("plus", "w6a6", **changes))
    assert [p.spec.grid for p in found.params.values()] == [p.spec.grid for p in expected.params.values()]
    same = [a.scale == expected.params[name].scale for name, a in found.params.items()]
    assert torch.cat([s.flatten() for s in same]).float().mean() > 0.98
