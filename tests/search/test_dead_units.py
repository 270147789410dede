"""Models with units that have no range: rows, channels, heads, layers and time groups of zeros, constants or denormals.

Pruned, padded, zero-initialised and partly trained models have them. A unit without a range gets a scale of 1.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tqdit.architectures.interface import Block
from tqdit.architectures.registry import config_of, graph
from tqdit.calibration.recorder import record
from tqdit.calibration.statistics import RangeStats
from tqdit.calibration.trajectories import CalibrationSet, collect
from tqdit.grids import regions, uniform
from tqdit.ops.tables import operand
from tqdit.provenance import Provenance
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.search.solver import solve
from tqdit.spec import Grid, GridParams, Role, SiteSpec
from tqdit.timegroups import TimeGroups

GROUPS = TimeGroups.uniform(0, 1000, 4)
WIDTH = 32
LOSS = 5.0  # dB that a dead unit may cost at W8A8: it takes signal away, the noise of all others stays


def site_name(block: Block, role: Role) -> str:
    """The site of an attention's operand."""
    return next(found.name for found in block.attentions[0].operands if found.role is role)


def zero_row_of_fc1(model: Any) -> None:
    model.transformer_blocks[0].ff.net[0].proj.weight[3] = 0


def zero_row_of_the_last_layer(model: Any) -> None:
    model.proj_out_2.weight[5] = 0


def zero_input_channel(model: Any) -> None:
    model.transformer_blocks[0].ff.net[2].weight[:, 7] = 0


def denormal_row(model: Any) -> None:
    model.transformer_blocks[0].ff.net[0].proj.weight[3] = 1e-42


def row_whose_step_is_denormal(model: Any) -> None:
    model.transformer_blocks[1].attn1.to_k.weight[1] = 2 * uniform.SMALLEST


def row_whose_candidates_would_be_denormal(model: Any) -> None:
    model.transformer_blocks[1].attn1.to_k.weight[1] = 200 * uniform.SMALLEST
    model.transformer_blocks[0].norm1.linear.weight[1] = 200 * uniform.SMALLEST


def zero_layers(model: Any) -> None:
    model.transformer_blocks[1].attn1.to_out[0].weight.zero_()
    model.transformer_blocks[0].ff.net[2].weight.zero_()


def zero_patch_embedding(model: Any) -> None:
    model.pos_embed.proj.weight.zero_()


def zero_heads(model: Any) -> None:
    for name in ("to_q", "to_k", "to_v"):
        layer = getattr(model.transformer_blocks[0].attn1, name)
        layer.weight[: WIDTH // 2] = 0
        layer.bias[: WIDTH // 2] = 0


def zero_query(model: Any) -> None:
    layer = model.transformer_blocks[1].attn1.to_q
    layer.weight.zero_()
    layer.bias.zero_()


def zero_label_rows(model: Any) -> None:
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight[:5] = 0


def zero_conditioning(model: Any) -> None:
    """As DiT is initialised: every gate, shift and scale is 0, so blocks pass their input on."""
    for block in model.transformer_blocks:
        block.norm1.linear.weight.zero_()
        block.norm1.linear.bias.zero_()


def zero_attention_input(model: Any) -> None:
    """The modulation multiplies the norm's output by 0."""
    adaptive = model.transformer_blocks[0].norm1.linear
    adaptive.weight[: 2 * WIDTH] = 0
    adaptive.bias[:WIDTH] = 0
    adaptive.bias[WIDTH : 2 * WIDTH] = -1


def constant_attention_input(model: Any) -> None:
    """One number, whatever token, timestep and class."""
    zero_attention_input(model)
    model.transformer_blocks[0].norm1.linear.bias[:WIDTH] = 0.7


def negative_gelu(model: Any) -> None:
    """Every input of GELU is negative: its output has no positive region."""
    layer = model.transformer_blocks[0].ff.net[0].proj
    layer.weight *= 0.05
    layer.bias.fill_(-1)


def positive_gelu(model: Any) -> None:
    layer = model.transformer_blocks[0].ff.net[0].proj
    layer.weight *= 0.05
    layer.bias.fill_(2)


def gelu_of_zeros(model: Any) -> None:
    layer = model.transformer_blocks[0].ff.net[0].proj
    layer.weight.zero_()
    layer.bias.zero_()


def one_sided_inputs(model: Any) -> None:
    """Inputs of query, key and value are positive alone, those of fc1 negative alone."""
    adaptive = model.transformer_blocks[0].norm1.linear
    for first, shift in ((0, 9.0), (3 * WIDTH, -9.0)):
        adaptive.weight[first : first + 2 * WIDTH] *= 0.05
        adaptive.bias[first : first + WIDTH] = shift


KINDS = [
    zero_row_of_fc1, zero_row_of_the_last_layer, zero_input_channel, denormal_row, row_whose_step_is_denormal,
    row_whose_candidates_would_be_denormal, zero_layers, zero_patch_embedding, zero_heads, zero_query, zero_label_rows,
    zero_conditioning, zero_attention_input, constant_attention_input, negative_gelu, positive_gelu, gelu_of_zeros,
    one_sided_inputs,
]  # fmt: skip


def noise_of(model: nn.Module, solution: Any, inputs: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return sqnr_db(model(**inputs).sample, convert(solution)(**inputs).sample)


def assert_every_scale_is_usable(solution: Any) -> None:
    for name, params in solution.params.items():
        assert torch.isfinite(params.scale).all(), name
        assert torch.isfinite(1 / params.scale).all(), name
        assert (params.scale >= uniform.SMALLEST).all(), name


@pytest.fixture(scope="module")
def whole(model, solved, data: CalibrationSet) -> Callable[..., float]:
    """SQNR of the model without dead units."""
    inputs = {"hidden_states": data.x, "timestep": data.t, "class_labels": data.labels}
    return lambda preset, **changes: noise_of(model, solved(preset, **changes), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_dead_units_is_as_close_as_any(
    kind: Callable[[Any], None], tiny_dit, data: CalibrationSet, whole, tiny_recipe, model_inputs
) -> None:
    model = tiny_dit()
    with torch.no_grad():
        kind(model)
    records = record(model, data, tiny_recipe())
    for preset in ("paper", "plus"):
        for changes in ({"rounds": 0}, {"rounds": 1, "candidates": 5}):
            solution = solve(model, records, tiny_recipe(preset, **changes), GROUPS, Provenance())
            assert_every_scale_is_usable(solution)
            assert noise_of(model, solution, model_inputs) > whole(preset, **changes) - LOSS


@pytest.mark.parametrize("preset", ["paper", "plus"])
def test_dead_rows_have_a_scale_of_1_and_zero_codes(tiny_dit, records, tiny_recipe, preset: str) -> None:
    model = tiny_dit()
    with torch.no_grad():
        for kind in (zero_row_of_fc1, zero_row_of_the_last_layer, zero_layers):
            kind(model)
    solution = solve(model, records, tiny_recipe(preset, rounds=1, candidates=5), GROUPS, Provenance())
    dead = 0
    for name, codes in solution.codes.items():
        rows = model.get_parameter(name).flatten(1)
        scale = solution.params[name].scale[0]
        zero = rows.abs().amax(1) == 0
        assert (codes.flatten(1)[zero] == 0).all()
        alone = zero if len(scale) == len(rows) else zero.all()[None]
        assert (scale[alone] == 1).all(), name
        assert (scale[~alone] < 1).all(), name
        dead += int(alone.sum())
    # The last layer's row has a scale of its own, or is float; to_out and fc2 have one each, or one a row, as fc1 has.
    assert dead == (1 + 2 if preset == "paper" else 2 * WIDTH + 1)


@pytest.mark.parametrize("grid", ["mrq", "uniform"])
@pytest.mark.parametrize("products", ["one", "two"])
def test_a_time_group_that_saw_only_zeros(model, records, tiny_recipe, grid: str, products: str) -> None:
    """Of inputs, of GELU and of every attention operand; the other groups keep what they have without it."""
    static = {"input_grid": "uniform", "softmax_grid": "best", "gelu_channels": "one", "rounding": "nearest"}
    recipe = tiny_recipe("plus", "w6a6", rounds=1, candidates=5, gelu_grid=grid, gelu_products=products, **static)
    block = graph(config_of(model)).blocks[0]
    sources = (block.linears[0].source.name, block.linears[3].source.name)
    linears, ranges = dict(records.linears), dict(records.ranges)
    for name in sources:
        linear = records.linears[name]
        linears[name] = replace(linear, x=torch.where(linear.group[:, None] == 2, 0.0, linear.x))
    attention = records.attentions[block.attentions[0].module]
    silent = {field: getattr(attention, field) * (attention.group != 2)[:, None, None, None] for field in "qkv"}
    for name in (*sources, *(site_name(block, role) for role in (Role.QUERY, Role.KEY, Role.VALUE))):
        low, high = records.ranges[name].low.clone(), records.ranges[name].high.clone()
        low[2], high[2] = 0, 0
        ranges[name] = RangeStats(low, high)
    attentions = {**records.attentions, block.attentions[0].module: replace(attention, **silent)}
    silenced = replace(records, linears=linears, attentions=attentions, ranges=ranges)
    found, before = (solve(model, seen, recipe, GROUPS, Provenance()) for seen in (silenced, records))
    assert_every_scale_is_usable(found)
    for name in (*sources, *(site_name(block, role) for role in (Role.QUERY, Role.KEY, Role.VALUE))):
        params = found.params[name]
        if params.spec.grid is Grid.UNIFORM:
            assert (params.scale[2] == 1).all()
            assert (params.zero_point[2] == 0).all()
        else:  # an empty region is as fine as the other one
            assert params.scale[2, 0, 0] <= params.scale[2, 0, 1] <= regions.GELU_MINIMUM / 8
        assert (params.scale[[0, 1, 3]] < 1).all()
    assert all(torch.equal(before.floats[name], tensor) for name, tensor in found.floats.items())


def test_a_single_token(tiny_dit, scheduler_config, tiny_recipe) -> None:
    """Its attention is 1 whatever the scores, whose Fisher weights are 0."""
    model = tiny_dit(sample_size=2)
    recipe = tiny_recipe("plus", rounds=1, candidates=5)
    seen = collect(model, scheduler_config, recipe)
    inputs = {"hidden_states": seen.x, "timestep": seen.t, "class_labels": seen.labels}
    records = record(model, seen, recipe)
    for preset in ("paper", "plus"):
        solution = solve(model, records, tiny_recipe(preset, rounds=1, candidates=5), GROUPS, Provenance())
        assert_every_scale_is_usable(solution)
        assert noise_of(model, solution, inputs) > 30


@pytest.mark.parametrize(("low", "high"), [(1e-44, 1.2), (0.01, 1e300)])
def test_no_candidate_is_subnormal_or_infinite(model, records, tiny_recipe, low: float, high: float) -> None:
    recipe = tiny_recipe("paper", "w6a6", rounds=1, candidates=3, low=low, high=high)
    assert_every_scale_is_usable(solve(model, records, recipe, GROUPS, Provenance()))


def test_tables_of_the_smallest_scale_are_finite() -> None:
    params = GridParams(SiteSpec("a", Role.INPUT, 8), torch.full((1, 1), uniform.SMALLEST), torch.zeros(1, 1))
    assert torch.isfinite(operand(params).table).all()
