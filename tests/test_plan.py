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
        ({"loss": "epsilon"}, Objective.FISHER),
        ({"loss": "sampler"}, Objective.FISHER_BY_STEP),
    ],
)
def test_objective(settings: dict, expected: Objective) -> None:
    assert objective(Recipe("plus", **settings)) is expected


def test_layers_on_float_inputs_come_first_in_the_order_of_the_model(model) -> None:
    names = list(plan(graph(config_of(model)), Recipe("plus")))
    assert names[0] == "pos_embed.proj.weight"
    assert names[7:9] == ["proj_out_1.weight", "proj_out_2.weight"]
    assert names[9:11] == ["transformer_blocks.0.attn1.qkv_input", "transformer_blocks.0.attn1.to_q.weight"]


@pytest.mark.parametrize("time_grouped", ["none", "softmax", "all"])
def test_what_does_not_depend_on_the_timestep_has_one_time_group(time_grouped: str) -> None:
    query, softmax = Operand("q", Role.QUERY, 2), Operand("p", Role.SOFTMAX)
    key, value = (Operand(role.value, role, 2, timed=False) for role in (Role.KEY, Role.VALUE))
    source = Operand("context", Role.INPUT, timed=False)
    matmuls = (Linear(source, ()), Attention("attn", query, key, value, softmax, 2, 8, context=True))
    recipe = Recipe("plus", groups=6, time_grouped=time_grouped)
    groups = {name: site.spec.groups for name, site in plan(Graph((Block("b", matmuls),), (), {}), recipe).items()}
    assert groups == {
        "context": 1, "key": 1, "value": 1,
        "q": 6 if time_grouped == "all" else 1, "p": 1 if time_grouped == "none" else 6,
    }  # fmt: skip
