"""The site list of a DiT: nothing missing, nothing invented, in every recipe."""

import pytest
from torch import nn

from tqdit.architectures.registry import check_supported, config_of, graph
from tqdit.errors import InputError
from tqdit.plan import sites
from tqdit.spec import Granularity, Grid, Role


def by_role(model, recipe, role: Role):
    return [site for site in sites(config_of(model), recipe) if site.role is role]


@pytest.mark.parametrize("preset", ["paper", "plus"])
def test_every_linear_and_convolution_weight_is_a_site(model, tiny_recipe, preset: str) -> None:
    """Unless both ends stay in float."""
    found = [site.name for site in sites(config_of(model), tiny_recipe(preset)) if site.is_weight]
    found += ["pos_embed.proj.weight", "proj_out_2.weight"] if preset == "plus" else []
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted(found) == sorted(f"{name}.weight" for name in layers)


@pytest.mark.parametrize("preset", ["paper", "plus"])
def test_units_are_the_rows_of_the_weight(model, tiny_recipe, preset: str) -> None:
    state = model.state_dict()
    for site in sites(config_of(model), tiny_recipe(preset)):
        if site.granularity is Granularity.PER_CHANNEL:
            assert site.units == len(state[site.name]), site.name
        elif site.is_weight:
            assert site.units == 1


def test_names_are_unique_and_every_block_has_all_operands(model, tiny_recipe) -> None:
    found = sites(config_of(model), tiny_recipe())
    assert len({site.name for site in found}) == len(found)
    for block in graph(config_of(model)).blocks:
        roles = [site.role for site in found if site.name.startswith(f"{block.prefix}.") and not site.is_weight]
        assert sorted(roles) == sorted(
            [Role.INPUT, Role.QUERY, Role.KEY, Role.VALUE, Role.SOFTMAX, Role.INPUT, Role.INPUT, Role.GELU]
        )


@pytest.mark.parametrize(("time_grouped", "softmax", "others"), [("none", 1, 1), ("softmax", 4, 1), ("all", 4, 4)])
def test_time_groups(model, tiny_recipe, time_grouped: str, softmax: int, others: int) -> None:
    for site in sites(config_of(model), tiny_recipe(time_grouped=time_grouped)):
        expected = 1 if site.is_weight else softmax if site.role is Role.SOFTMAX else others
        assert site.groups == expected, site.name


@pytest.mark.parametrize(("choice", "mrq"), [("mrq", True), ("best", True), ("uniform", False)])
def test_grids(model, tiny_recipe, choice: str, mrq: bool) -> None:
    recipe = tiny_recipe(softmax_grid=choice, gelu_grid=choice)
    grids = {site.role: site.grid for site in sites(config_of(model), recipe)}
    assert (grids.pop(Role.SOFTMAX) is Grid.MRQ_SOFTMAX) == mrq
    assert (grids.pop(Role.GELU) is Grid.MRQ_GELU) == mrq
    assert set(grids.values()) == {Grid.UNIFORM}


def test_bits_and_heads(model, tiny_recipe) -> None:
    recipe = tiny_recipe("paper", "w4a6")
    bits = {site.role: site.bits for site in sites(config_of(model), recipe)}
    assert bits.pop(Role.WEIGHT) == 4
    assert bits.pop(Role.WEIGHT_ONLY) == 6
    assert set(bits.values()) == {6}
    for role in (Role.QUERY, Role.KEY, Role.VALUE):
        assert {(s.granularity, s.units) for s in by_role(model, recipe, role)} == {(Granularity.PER_HEAD, 2)}


def test_weight_only_layers_are_those_outside_the_matmuls_of_a_block(model) -> None:
    names = graph(config_of(model)).float_input
    assert {"pos_embed.proj", "proj_out_1", "proj_out_2"} < set(names)
    assert all("norm1" in name for name in names[1:-2])
    for name in names:
        model.get_submodule(name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "FluxTransformer2DModel"),
        ("activation_fn", "geglu"),
        ("norm_type", "layer_norm"),
        ("norm_elementwise_affine", True),
    ],
)
def test_unknown_architecture_is_named(model, tiny_recipe, key: str, value: object) -> None:
    config = {**config_of(model), key: value}
    with pytest.raises(InputError, match=str(value)):
        check_supported(config)
    with pytest.raises(InputError, match=str(value)):
        sites(config, tiny_recipe())


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_both_names_of_a_dit_are_supported(model, tiny_recipe, name: str) -> None:
    config = {**config_of(model), "_class_name": name}
    check_supported(config)
    assert sites(config, tiny_recipe()) == sites(config_of(model), tiny_recipe())


def test_config_of_no_diffusers_model() -> None:
    with pytest.raises(InputError, match="no diffusers model"):
        check_supported({"model_type": "bert", "num_attention_heads": 12})


@pytest.mark.parametrize("value", ["2", True, 0, -1, 2.0, None, [2]])
@pytest.mark.parametrize("key", ["num_layers", "sample_size", "num_embeds_ada_norm"])
def test_sizes_are_whole_numbers(model, key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{key} = "):
        check_supported({**config_of(model), key: value})


@pytest.mark.parametrize(
    "key", ["num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size"]
)
def test_missing_size_is_named(model, key: str) -> None:
    with pytest.raises(InputError, match=f"lacks {key}"):
        check_supported({k: v for k, v in config_of(model).items() if k != key})


@pytest.mark.parametrize("change", [{"out_channels": 3}, {"out_channels": "2"}, {"sample_size": 9}])
def test_sizes_that_do_not_fit(model, change: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(change))} = "):
        check_supported({**config_of(model), **change})


@pytest.mark.parametrize("eps", [-1, -1e-6, float("nan"), float("inf"), "1e-6", True, None, 10**40])
def test_an_eps_below_0_or_no_number_is_refused(model, eps: object) -> None:
    with pytest.raises(InputError, match=r"norm_eps = .*; it must be a number from 0"):
        check_supported({**config_of(model), "norm_eps": eps})
    for legal in (0, 1, 1e-6):
        check_supported({**config_of(model), "norm_eps": legal})


@pytest.mark.parametrize(("eps", "shown"), [("1e-5", "'1e-5'"), ("x" * 99, "'" + "x" * 39), ([1] * 50, "[1, 1")])
def test_an_eps_is_shown_as_what_it_is(model, eps: object, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        check_supported({**config_of(model), "norm_eps": eps})
    said = str(caught.value).partition("norm_eps = ")[2].partition("; it must")[0]
    assert said.startswith(shown)
    assert len(said) <= 40
