"""Presets, bit-widths, validation and the TOML form of a recipe."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tqdit.errors import InputError
from tqdit.recipe import PRESETS, Recipe
from tqdit.spec import Granularity


def test_paper_is_the_published_setting() -> None:
    recipe = Recipe("paper")
    assert (recipe.weight_bits, recipe.activation_bits, recipe.granularity) == (8, 8, Granularity.PER_TENSOR)
    assert (recipe.softmax_grid, recipe.gelu_grid, recipe.time_grouped) == ("mrq", "mrq", "softmax")
    assert (recipe.softmax_products, recipe.gelu_products) == ("two", "two")
    assert (recipe.groups, recipe.samples, recipe.steps, recipe.guidance) == (10, 32, 250, 1.5)
    assert (recipe.rounds, recipe.candidates, recipe.low, recipe.high) == (3, 100, 0.01, 1.2)
    assert (recipe.input_grid, recipe.attended_grid, recipe.gelu_channels) == ("uniform", "uniform", "one")
    assert (recipe.ends, recipe.hessian, recipe.rounding) == ("codes", "published", "nearest")
    assert recipe.probed


def test_plus_changes_only_what_it_says() -> None:
    paper, plus = (Recipe(name).model_dump() for name in ("paper", "plus"))
    changed = {key for key in paper if paper[key] != plus[key]}
    same = {name for name, value in PRESETS["plus"].items() if value == PRESETS["paper"][name]}
    assert same == {"attended_grid", "rounds"}
    assert changed == {"preset", *PRESETS["plus"]} - same


@pytest.mark.parametrize(("text", "bits"), [("w8a8", (8, 8)), ("W4A8", (4, 8)), ("w2a4", (2, 4))])
def test_bits(text: str, bits: tuple[int, int]) -> None:
    recipe = Recipe("plus", text)
    assert (recipe.weight_bits, recipe.activation_bits) == bits
    assert recipe.bits == text.lower()


@pytest.mark.parametrize("text", ["w8", "8", "w9a8", "w1a8", "w8a3", "w8a9", "w8a8 ", "", "a8w8"])
def test_unknown_bits_are_an_error(text: str) -> None:
    with pytest.raises(InputError, match="w<2-8>a<4-8>"):
        Recipe("paper", text)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="'papr'; known: paper, plus, dynamic"):
        Recipe("papr")


def test_none_keeps_the_value_of_the_preset() -> None:
    assert Recipe("plus", weight_granularity=None, seed=7) == Recipe("plus", seed=7)


@pytest.mark.parametrize(("weight_bits", "expected"), [(2, 4), (4, 6), (6, 8), (8, 8)])
def test_layers_on_float_inputs_keep_two_more_bits(weight_bits: int, expected: int) -> None:
    assert Recipe("paper", f"w{weight_bits}a8").float_input_bits == expected


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("samples", 0),
        ("steps", -1),
        ("guidance", float("inf")),
        ("guidance", -1.0),
        ("candidates", 1),
        ("low", 0.0),
        ("high", 0.9),
        ("sampler", "euler"),
        ("gelu_grid", "log"),
        ("gelu_products", 1),
        ("time_grouped", "some"),
        ("seed", -1),
        ("groups", 0),
        ("probes", 0),
        ("mix", 1.1),
        ("mix", -0.1),
        ("input_grid", "mrq"),
        ("attended_grid", "best"),
        ("gelu_channels", "two"),
        ("input_channels", "two"),
        ("rotation", 64),
        ("rotation", "128 channels"),
        ("fallback", -1.0),
        ("fallback", float("inf")),
        ("rounding", "up"),
        ("ends", "int"),
        ("hessian", "gauss"),
        ("hessian", 2),
        ("colour", "red"),
    ],
)
def test_illegal_value_names_the_setting(setting: str, value: object) -> None:
    with pytest.raises(InputError, match=setting):
        Recipe("paper", **{setting: value})


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(4, 8),
    guidance=st.floats(0, 1e6),
    low=st.floats(1e-6, 1),
    trajectories=st.none() | st.integers(1, 99),
    hessian=st.sampled_from([True, False, "none", "published", "image"]),
    mix=st.floats(0, 1),
    ends=st.sampled_from(["codes", "float"]),
    gelu_products=st.sampled_from(["one", "two"]),
    gelu_grid=st.sampled_from(["best", "uniform"]),
    softmax_grid=st.just("best"),
)
@settings(max_examples=30, deadline=None)
def test_toml_round_trip(tmp_path_factory, preset, weight_bits, activation_bits, **overrides) -> None:
    recipe = Recipe(preset, f"w{weight_bits}a{activation_bits}", **overrides)
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 'red'", "'colour'"),
        ("groups = 'ten'", "'groups'"),
        ("schema_version = 2", "'schema_version'"),
        ("groups = ", "recipe.toml"),
        ("preset = 'papr'", "papr"),
    ],
)
def test_bad_file_names_what_is_wrong(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Recipe.from_toml(path)


def test_missing_file_is_an_input_error(tmp_path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml"):
        Recipe.from_toml(tmp_path / "absent.toml")


def test_preset_in_a_file_means_the_preset(tmp_path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("preset = 'plus'\nseed = 3\n", encoding="utf-8")
    assert Recipe.from_toml(path) == Recipe("plus", seed=3)


def test_label_says_what_was_changed() -> None:
    assert Recipe("paper", "w6a6", rounds=1).label == "paper"
    assert Recipe("plus").label == "plus"
    assert Recipe("plus", mix=0.0).label == "plus (changed: mix)"
    assert Recipe("paper", hessian=False).label == "paper (changed: hessian)"
    assert Recipe("plus", loss="epsilon", gelu_grid="uniform").label == "plus (changed: gelu_grid, loss)"


@pytest.mark.parametrize(
    ("former", "setting"),
    [
        ("true", "published"), ("'true'", "published"), ("'yes'", "published"), ("'On'", "published"),
        ("1", "published"),
        ("false", "none"), ("'false'", "none"), ("'no'", "none"), ("'OFF'", "none"), ("0", "none"),
    ],
)  # fmt: skip
def test_recipes_of_earlier_versions_say_hessian_as_true_or_false(tmp_path, former: str, setting: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"preset = 'paper'\nhessian = {former}\n", encoding="utf-8")
    recipe = Recipe.from_toml(path)
    assert recipe == Recipe("paper", hessian=setting) == Recipe("paper", hessian=setting == "published")
    assert recipe.hessian == setting
    assert recipe.probed == (setting == "published")
    assert f'hessian = "{setting}"' in recipe.to_toml()


def test_a_recipe_file_of_an_earlier_version_keeps_what_it_meant() -> None:
    """The settings that it does not have are those of its preset."""
    former = {
        "schema_version": 1, "preset": "paper", "weight_bits": 8, "activation_bits": 8,
        "weight_granularity": "per_tensor", "softmax_grid": "mrq", "gelu_grid": "mrq", "softmax_products": "two",
        "gelu_products": "two", "time_grouped": "softmax", "hessian": True, "loss": "epsilon", "seed": 3,
    }  # fmt: skip
    assert Recipe(**former) == Recipe("paper", seed=3)


@pytest.mark.parametrize(
    ("wanted", "recorded", "serves"),
    [
        ("none", "none", True), ("none", "published", True), ("none", "image", True),
        ("published", "none", False), ("published", "published", True), ("published", "image", True),
        ("image", "none", False), ("image", "published", False), ("image", "image", True),
    ],
)  # fmt: skip
def test_records_with_more_serve_a_recipe_that_needs_less(wanted: str, recorded: str, serves: bool) -> None:
    made, other = Recipe("plus", hessian=wanted), Recipe("plus", hessian=recorded, rounding="nearest", ends="codes")
    assert made.records_match(other) is serves


def test_dynamic_has_no_scale_to_calibrate() -> None:
    recipe = Recipe("dynamic")
    assert {recipe.input_grid, recipe.attended_grid, recipe.gelu_grid, recipe.softmax_grid} == {"row"}
    assert (recipe.rounding, recipe.rounds, recipe.fallback, recipe.input_channels) == ("nearest", 0, 0.0, "one")
    assert not recipe.probed


def test_rotated_inputs_have_a_scale_for_each_row(tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text("preset = 'plus'\nrotation = 128\n", encoding="utf-8")
    assert Recipe.from_toml(tmp_path / "recipe.toml") == Recipe("plus", rotation=128) == Recipe(rotation="128")
    assert Recipe(rotation=256, input_grid="best").rotation == 256
    with pytest.raises(InputError, match=r"'input_grid' and 'rotation'.*'uniform' and 128; legal .* 'row' and 'best'"):
        Recipe("paper", rotation=128)


# Integer products of a matmul --------------------------------------------------------------------------------------


OPERANDS = ["softmax", "gelu"]


@pytest.mark.parametrize("operand", OPERANDS)
def test_two_regions_of_8_bits_need_two_products(tmp_path, operand: str) -> None:
    grid, products = f"{operand}_grid", f"{operand}_products"
    path = tmp_path / "recipe.toml"
    path.write_text(f"preset = 'plus'\n{products} = 'one'\n{grid} = 'mrq'\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"'{grid}' and '{products}'.*got 'one'"):
        Recipe("plus", "w4a8", **{grid: "mrq", products: "one"})
    with pytest.raises(InputError, match=f"'{grid}' and '{products}'.*got 'one'"):
        Recipe.from_toml(path)
    assert getattr(Recipe("plus", "w8a7", **{grid: "mrq", products: "one"}), grid) == "mrq"
    assert getattr(Recipe("plus", "w8a8", **{grid: "mrq", products: "two"}), grid) == "mrq"


@pytest.mark.parametrize("operand", OPERANDS)
def test_label_names_the_products(operand: str) -> None:
    name = f"{operand}_products"
    other = {"one": "two", "two": "one"}[getattr(Recipe("plus"), name)]
    assert Recipe("plus", **{name: other}).label == f"plus (changed: {name})"


# Messages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gropus": 2}, "unknown recipe setting 'gropus'; did you mean 'groups'?"),
        ({"sampler": "euler"}, "recipe setting 'sampler' must be auto, ddim, ddpm or flow, got 'euler'"),
        ({"groups": 0}, "recipe setting 'groups' must be at least 1, got 0"),
        ({"groups": "ten"}, "recipe setting 'groups' must be a whole number, got 'ten'"),
        ({"groups": 2.5}, "recipe setting 'groups' must be a whole number, got 2.5"),
        ({"guidance": "much"}, "recipe setting 'guidance' must be a number, got 'much'"),
        ({"guidance": float("inf")}, "recipe setting 'guidance' must be a finite number, got inf"),
        ({"low": 0.0}, "recipe setting 'low' must be greater than 0, got 0.0"),
        ({"low": 1.5}, "recipe setting 'low' must be at most 1, got 1.5"),
        ({"seed": 2**31}, f"recipe setting 'seed' must be less than {2**31}, got {2**31}"),
        ({"hessian": "perhaps"}, "recipe setting 'hessian' must be none, published or image, got 'perhaps'"),
        ({"gelu_grid": "log"}, "recipe setting 'gelu_grid' must be mrq, uniform, best or row, got 'log'"),
    ],
)
def test_messages_say_what_is_legal(settings: dict, message: str) -> None:
    with pytest.raises(InputError) as raised:
        Recipe(**settings)
    assert str(raised.value) == message


def test_a_setting_like_no_other_gets_the_whole_list() -> None:
    with pytest.raises(
        InputError, match=r"unknown recipe setting 'xyz'; known: activation_bits, .*, weight_granularity$"
    ):
        Recipe(xyz="red")


def test_a_misspelt_preset() -> None:
    with pytest.raises(InputError, match="unknown preset 'pluss'; known: paper, plus, dynamic; did you mean 'plus'"):
        Recipe("pluss")


def test_plus_is_the_default_everywhere(tmp_path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert Recipe() == Recipe("plus") == Recipe.from_toml(tmp_path / "empty.toml")
    assert Recipe().label == "plus"
    assert set(PRESETS["paper"]) == set(PRESETS["plus"]) == set(PRESETS["dynamic"]), (
        "each preset says all that presets differ in"
    )


def test_the_constructor_takes_preset_and_bits_then_settings() -> None:
    recipe = Recipe("paper", "w6a6", samples=8, steps=50)
    assert (recipe.preset, recipe.bits, recipe.samples, recipe.steps) == ("paper", "w6a6", 8, 50)
    assert recipe.weight_granularity == PRESETS["paper"]["weight_granularity"]
    assert Recipe(preset="paper", bits="w6a6", steps=50, samples=8) == recipe == Recipe(**recipe.model_dump())
    assert hash(recipe) == hash(Recipe("paper", "w6a6", steps=50, samples=8)) != hash(Recipe("paper", "w6a6"))
    assert Recipe("plus", "w8a8", weight_bits=4).bits == "w4a8"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.samples = 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3,), "unknown preset '3'"), (([],), "unknown preset"), (("plus", 8), "bits '8' must be w<2-8>a<4-8>")],
)
def test_a_preset_or_bits_of_another_type(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(*arguments)


def test_a_setting_called_self_is_unknown_like_any_other() -> None:
    with pytest.raises(InputError, match="unknown recipe setting 'self'"):
        Recipe(**{"self": 1})


def test_the_former_constructor_still_serves() -> None:
    with pytest.warns(DeprecationWarning, match=r"Recipe\.build\(\.\.\.\) is now Recipe\(\.\.\.\)") as caught:
        assert Recipe.build("paper", "w6a6", samples=8) == Recipe("paper", "w6a6", samples=8)
    assert caught[0].filename == __file__


def test_settings_win_over_those_of_a_file(tmp_path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("preset = 'paper'\nseed = 3\nsamples = 4\n", encoding="utf-8")
    assert Recipe.from_toml(path, seed="5") == Recipe("paper", seed=5, samples=4)
    assert Recipe.from_toml(path, preset="plus") == Recipe("plus", seed=3, samples=4)


def test_the_json_of_a_recipe() -> None:
    """Artifacts and recipe files have it."""
    assert json.loads(Recipe("paper", "w4a6", samples=8).model_dump_json()) == {
        "schema_version": 1, "preset": "paper", "weight_bits": 4, "activation_bits": 6,
        "weight_granularity": "per_tensor", "input_grid": "uniform", "input_channels": "one", "rotation": 0,
        "softmax_grid": "mrq", "attended_grid": "uniform",
        "gelu_grid": "mrq", "softmax_products": "two", "gelu_products": "two", "gelu_channels": "one",
        "time_grouped": "softmax", "ends": "codes", "hessian": "published", "loss": "epsilon", "rounding": "nearest",
        "mix": 0.5, "fallback": 0.0, "groups": 10,
        "time_edges": "uniform",
        "samples": 8, "sampler": "auto", "steps": 250, "guidance": 1.5, "trajectories": None, "probes": 1, "rounds": 3,
        "candidates": 100, "low": 0.01, "high": 1.2, "rows": 2048, "queries": 2048, "seed": 0,
    }  # fmt: skip
