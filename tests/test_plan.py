"""What a recipe means for the sites of a model."""

import pytest
import torch

from tqdit.architectures.interface import Attention, Block, Graph, Linear, Operand
from tqdit.architectures.registry import config_of, graph
from tqdit.plan import Objective, grids, needs_records, objective, plan
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


# Inputs that are quantized apart, as in traced models ----------------------------------------------------------------


def apart(role: Role = Role.INPUT, width: int = 384, timed: bool = True) -> Graph:
    """A block of one layer of an input of its own, and one that modulates."""
    source = Operand("x", role, timed=timed, quantized_by_row=True, apart=True, feed="GELU tanh")
    shapes = {"b.fc.weight": torch.Size((24, width)), "b.ada.weight": torch.Size((8, 4))}
    return Graph((Block("b", (Linear(source, ("b.fc",)),), ("b.ada",)),), (), shapes)


@pytest.mark.parametrize("role", [Role.INPUT, Role.GELU])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"input_grid": "row"}, (Grid.ROW,)),
        ({"input_grid": "uniform"}, (Grid.UNIFORM,)),
        ({"input_grid": "best"}, (Grid.UNIFORM, Grid.ROW)),
    ],
)
def test_what_makes_an_input_apart_does_not_decide_its_grids(role: Role, settings: dict, expected: tuple) -> None:
    """The static scale is tried first, so that it is kept where both are as good; a row's has no time groups."""
    site = plan(apart(role), Recipe("plus", groups=6, **settings))["x"]
    assert site.grids == expected
    assert site.apart
    assert {spec.grid: spec.groups for spec in site.tried} == {g: 1 if g is Grid.ROW else 6 for g in expected}
    assert {spec.groups for spec in plan(apart(role, timed=False), Recipe(**settings))["x"].tried} == {1}


def test_inputs_apart_have_factors_on_the_grid_of_rows(model) -> None:
    for choice, tried in (("one", False), ("best", True)):
        recipe = Recipe("plus", input_channels=choice, input_grid="row")
        assert plan(apart(), recipe)["x"].channels is tried
        others = plan(graph(config_of(model)), recipe).values()
        assert not any(site.channels or site.apart for site in others if site.spec.role is Role.INPUT)


@pytest.mark.parametrize(("width", "rotation", "expected"), [(384, 128, 128), (384, 256, 0), (512, 256, 256)])
def test_whole_blocks_of_inputs_apart_are_rotated(width: int, rotation: int, expected: int, model) -> None:
    recipe = Recipe("plus", rotation=rotation, input_grid="best")
    site = plan(apart(width=width), recipe)["x"]
    assert site.rotation == expected
    assert site.grids == ((Grid.ROW,) if expected else (Grid.UNIFORM, Grid.ROW))
    assert not any(other.rotation for other in plan(graph(config_of(model)), recipe).values())


def test_the_limit_of_the_fallback_is_lower_for_fewer_bits(model) -> None:
    limits = [plan(apart(), Recipe("plus", bits, fallback=30.0))["x"].fallback for bits in ("w8a8", "w4a8", "w4a6")]
    assert limits[:2] == [30.0, 30.0]
    assert limits[2] == pytest.approx(30.0 - 2 * 6.02)
    assert plan(apart(), Recipe("plus", fallback=0.0))["x"].fallback is None
    assert all(site.fallback is None for site in plan(graph(config_of(model)), Recipe("plus")).values())


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, False), ({"rotation": 128}, False), ({"rounding": "second_order"}, True),
        ({"input_grid": "uniform"}, True), ({"input_grid": "best"}, True), ({"input_channels": "best"}, True),
        ({"fallback": 10.0}, True), ({"rounds": 1}, True),
    ],
)  # fmt: skip
def test_what_needs_a_calibration(settings: dict, needed: bool) -> None:
    assert needs_records(Recipe("dynamic", **settings)) is needed
    assert needs_records(Recipe("plus"))
