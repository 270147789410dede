"""Advice for sensitive sites: every rule can be reached, and names a setting that a recipe takes and has not yet."""

import itertools

import pytest
from comparisons import recipe, site

from tqdit.recipe import Recipe
from tqdit.report.advice import RULES, advice
from tqdit.spec import Grid, Role

GRIDS = {
    Role.WEIGHT: ["uniform"], Role.WEIGHT_ONLY: ["uniform"], Role.INPUT: ["uniform", "row"], Role.QUERY: ["uniform"],
    Role.KEY: ["uniform"], Role.VALUE: ["uniform"], Role.SOFTMAX: ["mrq_softmax", "uniform", "softmax_row"],
    Role.GELU: ["mrq_gelu", "uniform", "row"],
}  # fmt: skip
RECIPES = [recipe(preset, bits) for preset in ("paper", "plus", "dynamic") for bits in ("w8a8", "w4a8", "w6a6", "w4a4")]

ROTATED = [recipe("plus", rotation=256), recipe("dynamic", fallback=50.0, rotation=256)]


def cases():
    for settings, traced in itertools.product([*RECIPES, *ROTATED], (False, True)):
        for role, grids in GRIDS.items():
            if traced and role in (Role.QUERY, Role.KEY, Role.VALUE, Role.SOFTMAX):
                continue
            weight = role in (Role.WEIGHT, Role.WEIGHT_ONLY)
            bits = settings["weight_bits" if weight else "activation_bits"]
            if role is Role.WEIGHT_ONLY:
                bits = min(8, bits + 2)
            for grid, flag in itertools.product(grids, (False, True)):
                groups = 10 if settings["time_grouped"] == "all" and not weight and not Grid(grid).per_row else 1
                end = role is Role.WEIGHT_ONLY and flag and settings["ends"] == "codes"
                yield (
                    site("s", role=str(role.value), grid=grid, bits=bits, groups=groups, channels=False, by_row=flag,
                         end=end, share=0.5, granularity=settings["weight_granularity"] if weight else "per_tensor"),
                    settings, traced,
                )  # fmt: skip


def test_advice_is_a_legal_change_of_the_recipe() -> None:
    texts = set()
    for one, settings, traced in cases():
        found = advice(one, settings, traced)
        texts.add(found.text)
        if found.setting is not None:
            name, value = found.setting
            assert settings[name] != value, (one, settings, found)
            changed = Recipe(**{**settings, name: value})
            assert getattr(changed, name) == value
            assert found.assignment == f"{name}={value}"
    assert texts >= {rule.text for rule in RULES}, "every rule is reached"
    assert "A recipe has nothing finer for it." in texts


def test_a_small_share_is_left_alone() -> None:
    assert advice(site(share=0.019), recipe()).setting is None
    assert advice(site(share=0.5), recipe()).setting is not None


@pytest.mark.parametrize(
    ("changes", "settings", "assignment"),
    [
        ({"role": "softmax", "grid": "mrq_softmax"}, recipe("paper"), "softmax_grid=row"),
        ({"role": "weight", "granularity": "per_channel", "bits": 4}, recipe("plus", "w4a8"), "weight_bits=8"),
        ({"role": "weight_only", "end": True, "granularity": "per_channel"}, recipe("paper"), "ends=float"),
        ({"role": "input", "by_row": True}, recipe("paper"), "input_grid=row"),
        ({"role": "gelu", "channels": True, "groups": 10}, recipe("plus"), "gelu_grid=row"),
        ({"role": "query", "groups": 1}, recipe("paper"), "time_grouped=all"),
    ],
)
def test_advice_by_example(changes: dict, settings: dict, assignment: str) -> None:
    assert advice(site(**changes), settings).assignment == assignment
