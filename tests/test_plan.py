"""What a recipe means for the sites of a model."""

import pytest

from tqdit.architectures.interface import Attention, Block, Graph, Linear, Operand
from tqdit.architectures.registry import config_of, graph
from tqdit.plan import Objective, grids, objective, plan
from tqdit.recipe import Recipe
from tqdit.spec import Grid, Role

MRQ = {"softmax": Grid.MRQ_SOFTMAX, "gelu": Grid.MRQ_GELU}


@pytest.mark.parametrize("operand", ["softmax", "gelu"])
@pytest.mark.parametrize(
    ("bits", "products", "both"),
    [("w8a8", "one", False), ("w8a8", "two", True), ("w8a7", "one", True), ("w6a6", "two", True)],
)
def test_best_tries_both_grids_where_two_regions_could_be_better(
    operand: str, bits: str, products: str, both: bool
) -> None:
    recipe = Recipe("plus", bits, **{f"{operand}_grid": "best", f"{operand}_products": products})
    expected = (MRQ[operand], Grid.UNIFORM) if both else (Grid.UNIFORM,)
    assert grids(recipe, Role(operand)) == expected
    assert grids(recipe, Role.INPUT) == (Grid.UNIFORM,)


@pytest.mark.parametrize("operand", ["softmax", "gelu"])
@pytest.mark.parametrize("choice", ["mrq", "uniform"])
def test_a_named_grid_is_the_only_one(operand: str, choice: str) -> None:
    recipe = Recipe("plus", "w6a6", **{f"{operand}_grid": choice})
    assert grids(recipe, Role(operand)) == (MRQ[operand] if choice == "mrq" else Grid.UNIFORM,)


@pytest.mark.parametrize("products", ["one", "two"])
def test_merging_is_what_one_product_asks_for(model, products: str) -> None:
    recipe = Recipe("plus", "w6a6", gelu_products=products, softmax_products="two")
    merging = {site.spec.role for site in plan(graph(config_of(model)), recipe).values() if site.merging}
    assert merging == ({Role.GELU} if products == "one" else set())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hessian": False}, Objective.PLAIN),
        ({"hessian": "none", "loss": "epsilon"}, Objective.PLAIN),
        ({"hessian": "published", "loss": "epsilon"}, Objective.FISHER),
        ({"hessian": "published", "loss": "sampler"}, Objective.FISHER_BY_STEP),
        ({"hessian": "image", "loss": "epsilon"}, Objective.IMAGE),
        ({}, Objective.IMAGE),
    ],
)
def test_objective(settings: dict, expected: Objective) -> None:
    assert objective(Recipe("plus", **settings)) is expected


def test_layers_on_float_inputs_come_first_in_the_order_of_the_model(model) -> None:
    names = list(plan(graph(config_of(model)), Recipe("plus", ends="codes")))
    assert names[0] == "pos_embed.proj.weight"
    assert names[7:9] == ["proj_out_1.weight", "proj_out_2.weight"]
    assert names[9:11] == ["transformer_blocks.0.attn1.qkv_input", "transformer_blocks.0.attn1.to_q.weight"]


def test_ends_in_float_are_no_sites(model) -> None:
    structure = graph(config_of(model))
    codes, floats = (list(plan(structure, Recipe("plus", ends=ends))) for ends in ("codes", "float"))
    assert structure.ends == ("pos_embed.proj", "proj_out_2")
    assert [name for name in codes if name not in floats] == ["pos_embed.proj.weight", "proj_out_2.weight"]
    assert [name for name in codes if name in floats] == floats


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"input_grid": "row", "attended_grid": "uniform"}, (Grid.ROW, Grid.UNIFORM)),
        ({"input_grid": "uniform", "attended_grid": "row"}, (Grid.UNIFORM, Grid.ROW)),
    ],
)
def test_inputs_that_verbs_quantize_by_row_and_the_attentions_output(model, settings: dict, expected: tuple) -> None:
    sites = plan(graph(config_of(model)), Recipe("plus", **settings))
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        at_hand = {sites[f"{block}.{name}"].spec.grid for name in ("attn1.qkv_input", "ff.fc1_input")}
        assert (*at_hand, sites[f"{block}.attn1.out_input"].spec.grid) == expected


@pytest.mark.parametrize(
    ("role", "setting", "grid"),
    [(Role.SOFTMAX, "softmax_grid", Grid.SOFTMAX_ROW), (Role.GELU, "gelu_grid", Grid.ROW)],
)
@pytest.mark.parametrize("bits", ["w8a8", "w4a6"])
def test_rows_are_the_only_grid_and_have_no_time_groups(model, role: Role, setting: str, grid: Grid, bits: str) -> None:
    recipe = Recipe("plus", bits, **{setting: "row"})
    assert grids(recipe, role) == (grid,)
    found = [site for site in plan(graph(config_of(model)), recipe).values() if site.spec.role is role]
    assert {(site.grids, site.spec.groups, site.channels) for site in found} == {((grid,), 1, False)}


@pytest.mark.parametrize("choice", ["one", "best"])
def test_channel_factors_are_tried_after_gelu_alone(model, choice: str) -> None:
    sites = plan(graph(config_of(model)), Recipe("plus", gelu_channels=choice)).values()
    assert {site.spec.role for site in sites if site.channels} == ({Role.GELU} if choice == "best" else set())


@pytest.mark.parametrize("time_grouped", ["none", "softmax", "all"])
def test_what_does_not_depend_on_the_timestep_has_one_time_group(time_grouped: str) -> None:
    query, softmax = Operand("q", Role.QUERY, 2), Operand("p", Role.SOFTMAX)
    key, value = (Operand(role.value, role, 2, timed=False) for role in (Role.KEY, Role.VALUE))
    source = Operand("context", Role.INPUT, timed=False)
    matmuls = (Linear(source, ()), Attention("attn", query, key, value, softmax, 2, 8, context=True))
    recipe = Recipe("plus", groups=6, time_grouped=time_grouped, softmax_grid="mrq", input_grid="uniform")
    groups = {name: site.spec.groups for name, site in plan(Graph((Block("b", matmuls),), (), {}), recipe).items()}
    assert groups == {
        "context": 1, "key": 1, "value": 1,
        "q": 6 if time_grouped == "all" else 1, "p": 1 if time_grouped == "none" else 6,
    }  # fmt: skip
