"""A Solution that is not one of its model is refused before anything is built or allocated."""

import re
from dataclasses import replace

import pytest
import torch

from tqdit import workflow
from tqdit.architectures.checks import PATCHES
from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.runtime import fitting
from tqdit.runtime.convert import LayerCodes, convert
from tqdit.runtime.fitting import check_solution
from tqdit.spec import Granularity, Grid, Role, Solution
from tqdit.timegroups import TimeGroups

QUERY, SOFTMAX = "transformer_blocks.0.attn1.query", "transformer_blocks.1.attn1.softmax"
FC1, FC2 = "transformer_blocks.0.ff.net.0.proj.weight", "transformer_blocks.0.ff.fc2_input"
ADALN = "transformer_blocks.0.norm1.linear.weight"
RECIPES = [("paper", "w8a8"), ("plus", "w6a6"), ("plus", "w4a8"), ("paper", "w3a5")]


def with_site(solution: Solution, name: str, **fields) -> Solution:
    """The solution with other fields of one site, its tensors as they were or as the fields say."""
    params = solution.params[name]
    return replace(solution, params={**solution.params, name: replace(params, spec=replace(params.spec, **fields))})


def with_config(solution: Solution, **settings) -> Solution:
    return replace(solution, model_config={**solution.model_config, **settings})


def refused(solution: Solution, *parts: str) -> None:
    """By the check itself and by whoever would run it."""
    for reader in (check_solution, convert):
        with pytest.raises(InputError) as error:
            reader(solution)
        assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(("preset", "bits"), RECIPES)
def test_every_choice_of_a_recipe_fits(solved, preset: str, bits: str) -> None:
    solution = solved(preset, bits)
    check_solution(solution)
    assert convert(solution).config["num_layers"] == solution.model_config["num_layers"]


def test_sites_may_differ_in_what_a_recipe_chooses(solved) -> None:
    solution = solved("plus")
    params = solution.params[FC1]
    one = replace(params.spec, granularity=Granularity.PER_TENSOR, units=1, bits=3)
    changed = replace(solution, params={**solution.params, FC1: replace(params, spec=one, scale=torch.ones(1, 1))})
    check_solution(changed)
    with pytest.raises(InputError, match=re.escape(FC1)):
        check_solution(with_site(changed, FC1, units=2))


@pytest.mark.parametrize(
    ("site", "fields"),
    [
        (QUERY, {"grid": Grid.MRQ_GELU}),
        (QUERY, {"role": Role.GELU}),
        (QUERY, {"role": Role.KEY}),
        (QUERY, {"units": 1}),
        (QUERY, {"granularity": Granularity.PER_TENSOR}),
        (QUERY, {"bits": 3}),
        (QUERY, {"groups": 3}),
        (SOFTMAX, {"grid": Grid.MRQ_GELU}),
        (FC2, {"grid": Grid.MRQ_SOFTMAX}),
        (FC2, {"role": Role.INPUT}),
        (FC1, {"groups": 4}),
        (FC1, {"role": Role.WEIGHT_ONLY}),
        (FC1, {"units": 7}),
        (FC1, {"granularity": Granularity.PER_HEAD}),
        (FC1, {"bits": 9}),
        (ADALN, {"granularity": Granularity.PER_TENSOR}),
    ],
)
def test_a_site_that_the_model_does_not_have_is_named_with_its_field(solved, site: str, fields: dict) -> None:
    refused(with_site(solved("plus"), site, **fields), f"site '{site}'", f" {next(iter(fields))} ")


NEW_CHOICES = {
    "rows": {"input_grid": "row", "attended_grid": "row", "softmax_grid": "row", "gelu_grid": "row"},
    "factors": {"gelu_channels": "best", "gelu_grid": "mrq", "gelu_products": "two"},
    "ends in codes": {"ends": "codes", "rounding": "nearest"},
    "ends in float": {"ends": "float", "hessian": "none"},
}


@pytest.mark.parametrize("choice", NEW_CHOICES)
def test_rows_factors_and_float_ends_fit(solved, choice: str) -> None:
    solution = solved("plus", "w6a6", **NEW_CHOICES[choice])
    check_solution(solution)
    grids = {role: {p.spec.grid for p in solution.params.values() if p.spec.role is role} for role in Role}
    if choice == "rows":
        assert grids[Role.INPUT] == grids[Role.GELU] == {Grid.ROW}
        assert grids[Role.SOFTMAX] == {Grid.SOFTMAX_ROW}
    assert ("proj_out_2.weight" in solution.codes) == ("pos_embed.proj.weight" in solution.codes)
    assert ("proj_out_2.weight" in solution.codes) == (choice == "ends in codes")


def test_rows_belong_to_inputs_and_softmax(solved) -> None:
    """A query's verb has no whole rows, and each of the two grids of rows has its own operands."""
    solution = solved("plus")
    bare = {"scale": torch.ones(1, 1), "zero_point": None}
    for site, grid in [
        (QUERY, Grid.ROW), (QUERY, Grid.SOFTMAX_ROW), (SOFTMAX, Grid.ROW), (FC2, Grid.SOFTMAX_ROW),
        (QUERY.replace("query", "value"), Grid.ROW), (FC1, Grid.ROW),
    ]:  # fmt: skip
        params = solution.params[site]
        spec = replace(params.spec, grid=grid)
        changed = replace(params, spec=spec, **bare)
        refused(replace(solution, params={**solution.params, site: changed}), f"site '{site}' has grid {grid}")


def test_a_site_of_rows_has_no_zero_point(solved) -> None:
    solution = solved("plus")
    name = "transformer_blocks.0.attn1.qkv_input"
    params = solution.params[name]
    assert params.spec.grid is Grid.ROW
    zero = torch.zeros(1, 1, dtype=torch.int32)
    changed = replace(solution, params={**solution.params, name: replace(params, zero_point=zero)})
    refused(changed, f"site '{name}' has a zero_point")


def with_channels(solution: Solution, name: str, channels: torch.Tensor) -> Solution:
    params = replace(solution.params[name], channels=channels)
    return replace(solution, params={**solution.params, name: params})


@pytest.mark.parametrize("shape", [(127,), (32,), (1,), (128, 1)])
def test_factors_that_are_not_as_many_as_the_channels(solved, shape: tuple[int, ...]) -> None:
    refused(
        with_channels(solved("plus"), FC2, torch.ones(shape)), f"site '{FC2}' has channels of shape {shape}", "(128,)"
    )


@pytest.mark.parametrize("site", [QUERY, SOFTMAX, FC1, ADALN])
def test_factors_at_a_site_that_is_no_input_of_a_linear_layer(solved, site: str) -> None:
    """No weight takes them back there."""
    message = f"site '{site}' has channels; only inputs of linear layers can have factors"
    refused(with_channels(solved("plus"), site, torch.ones(16)), message)


@pytest.mark.parametrize("name", ["pos_embed.proj.weight", "proj_out_2.weight"])
def test_each_end_may_be_codes_or_float(solved, name: str) -> None:
    """But one of them: neither is a parameter that is missing, both are one too many."""
    floats, codes = solved("plus"), solved("plus", ends="codes")
    mixed = replace(
        floats,
        params={**floats.params, name: codes.params[name]},
        codes={**floats.codes, name: codes.codes[name]},
        floats={key: value for key, value in floats.floats.items() if key != name},
    )
    check_solution(mixed)
    without = {key: value for key, value in floats.floats.items() if key != name}
    refused(replace(floats, floats=without), f"'{name}'")
    refused(replace(mixed, codes=floats.codes), f"'{name}'")
    refused(replace(floats, codes=mixed.codes), f"'{name}', which this model has no place for")


def test_other_layers_may_not_be_float(solved, model) -> None:
    solution, name = solved("plus"), "proj_out_1.weight"
    params = {key: value for key, value in solution.params.items() if key != name}
    floats = {**solution.floats, name: model.state_dict()[name]}
    refused(replace(solution, params=params, floats=floats), f"no codes for weight site '{name}'")


def test_scales_that_are_not_what_the_site_says(solved) -> None:
    solution = solved("plus")
    params = solution.params[QUERY]
    for change in ({"scale": params.scale[:, :1]}, {"zero_point": params.zero_point[:1]}, {"zero_point": None}):
        changed = replace(solution, params={**solution.params, QUERY: replace(params, **change)})
        refused(changed, f"site '{QUERY}'", next(iter(change)))


def test_more_heads_of_fewer_channels(solved) -> None:
    """Every weight keeps its shape; the scales of query, key and value would be read past their end."""
    refused(with_config(solved(), num_attention_heads=8, attention_head_dim=4), "query'", "units 2", "needs 8")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_layers": 1}, "transformer_blocks.1"),
        ({"num_layers": 3}, "transformer_blocks.2"),
        ({"num_layers": 10**5}, "num_layers = 100000"),
        ({"num_layers": 10**12}, "num_layers"),
        ({"num_embeds_ada_norm": 10**6}, "embedding_table"),
        ({"num_embeds_ada_norm": 10**9}, "num_embeds_ada_norm"),
        ({"sample_size": 2**20}, "tokens"),
        ({"in_channels": 2**20, "out_channels": 2**20}, "pos_embed.proj.weight"),
        ({"patch_size": 4}, "pos_embed.proj.weight"),
        ({"attention_head_dim": 2**20}, "pos_embed.proj.weight"),
        ({"out_channels": 1}, "proj_out_2"),
        ({"norm_eps": "0"}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
    ],
)
@pytest.mark.timeout(20)
def test_sizes_that_the_file_does_not_hold(solved, settings: dict, part: str) -> None:
    refused(with_config(solved("plus"), **settings), part)


def test_parameters_missing_left_over_or_of_another_shape(solved) -> None:
    solution = solved()
    floats = dict(solution.floats)
    bias = floats.pop("proj_out_1.bias")
    refused(replace(solution, floats=floats), "no value for parameter 'proj_out_1.bias'")
    refused(replace(solution, floats={**floats, "proj_out_1.bias": bias[:-1]}), "'proj_out_1.bias' has shape")
    refused(replace(solution, floats={**solution.floats, "stranger": bias}), "'stranger', which this model has no")
    codes = {**solution.codes, FC1: solution.codes[FC1].T.contiguous()}
    refused(replace(solution, codes=codes), f"'{FC1}' has shape")


def test_readers_name_the_folder(tmp_path, solved) -> None:
    artifact.write(with_site(solved(), QUERY, role=Role.KEY), tmp_path)
    for reader in (fitting.read, workflow.load, workflow.inspect):
        with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}: site '{re.escape(QUERY)}' has role key"):
            reader(tmp_path)


def test_a_model_of_other_time_groups(solved) -> None:
    refused(replace(solved("plus"), time_groups=TimeGroups.uniform(0, 1000, 5)), "groups 4", "needs 1 or 5")


def test_the_codes_of_a_models_layers_are_checked_without_being_unpacked(solved, monkeypatch) -> None:
    solution = convert(solved("plus")).solution
    assert {name: solution.codes.shape_of(name) for name in solution.codes} == {
        name: codes.shape for name, codes in solution.codes.items()
    }
    unpacked: list[str] = []
    monkeypatch.setattr(LayerCodes, "__getitem__", lambda _, site: unpacked.append(site))
    check_solution(solution)
    assert not unpacked
    with pytest.raises(InputError, match=rf"tensor '{re.escape(PATCHES)}' has shape"):
        check_solution(with_config(solution, in_channels=3, out_channels=None))


def test_the_scale_of_softmax_rows_is_fixed(solved) -> None:
    """Kernels know it from the number of bits."""
    solution = solved("plus")
    params = solution.params[SOFTMAX]
    assert params.spec.grid is Grid.SOFTMAX_ROW
    other = replace(params, scale=params.scale * 2)
    refused(replace(solution, params={**solution.params, SOFTMAX: other}), SOFTMAX, "scale")
