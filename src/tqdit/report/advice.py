"""Say what to change for a sensitive site: rules from its facts and the recipe, each naming a real setting.

A rule holds for some roles and asks one question of the site; the first that holds is the advice. No rule names a value
that the recipe has already.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdit.grids.registry import Grid
from tqdit.quality.run import Site
from tqdit.recipe import Recipe
from tqdit.spec import MAX_BITS, Role

DEFAULTS = Recipe().model_dump(mode="json")
LEAST_SHARE = 0.02  # of all error power: below it a change would not be seen
Settings = Mapping[str, Any]
Setting = tuple[str, Any]


@dataclass(frozen=True)
class Advice:
    """A sentence, and the setting of a recipe that it names, as a name and a value; None: nothing to set."""

    text: str
    setting: Setting | None = None

    @property
    def assignment(self) -> str:
        """Return the setting as `--set` takes it, or ""."""
        return "" if self.setting is None else f"{self.setting[0]}={self.setting[1]}"


@dataclass(frozen=True)
class Rule:
    """One piece of advice: `holds` for a site of `roles` and its recipe, of traced models or described ones or both."""

    roles: tuple[Role, ...]
    holds: Callable[[Site, Settings], bool]
    setting: Callable[[Site, Settings], Setting]
    text: str
    traced: bool | None = None


ATTENTION = (Role.QUERY, Role.KEY, Role.VALUE)
STATIC = (Role.INPUT, Role.SOFTMAX, Role.GELU, *ATTENTION)


def _set(name: str, value: Any) -> Callable[[Site, Settings], Setting]:
    return lambda site, recipe: (name, value)


def _doubled(name: str) -> Callable[[Site, Settings], Setting]:
    return lambda site, recipe: (name, 2 * recipe[name])


def _static(site: Site) -> bool:
    return not Grid(site.grid).per_row


RULES = (
    Rule((Role.WEIGHT_ONLY,), lambda s, r: s.end, _set("ends", "float"), "Keep the first and the last layer in float."),
    Rule((Role.WEIGHT_ONLY,), lambda s, r: s.bits < MAX_BITS, lambda s, r: ("weight_bits", r["weight_bits"] + 2),
         "Layers on float inputs have two bits more than the rest: raise the weights' bits."),
    Rule((Role.WEIGHT,), lambda s, r: s.granularity == "per_tensor", _set("weight_granularity", "per_channel"),
         "One scale serves all its output channels: give each channel its own."),
    Rule((Role.WEIGHT,), lambda s, r: r["rounding"] == "nearest", _set("rounding", "second_order"),
         "Its codes are rounded to nearest: let GPTQ round them."),
    Rule((Role.WEIGHT,), lambda s, r: s.bits < MAX_BITS, _set("weight_bits", MAX_BITS), "Use 8 bits for weights."),
    Rule((Role.INPUT, Role.GELU), lambda s, r: _static(s), _set("input_grid", "row"),
         "Its scale is static: take one for each row.", traced=True),
    Rule((Role.INPUT, Role.GELU), lambda s, r: r["activation_bits"] == MAX_BITS and not s.channels
         and r["input_channels"] == "one", _set("input_channels", "best"),
         "Let the search try factors for its channels, of which some may be large.", traced=True),
    Rule((Role.INPUT,), lambda s, r: s.by_row and _static(s), _set("input_grid", "row"),
         "Its scale is static, and its row is at hand: take a scale for each row at no cost.", traced=False),
    Rule((Role.SOFTMAX,), lambda s, r: _static(s), _set("softmax_grid", "row"),
         "Code exponentials by row instead: one integer product, and rows that sum to 1.", traced=False),
    Rule((Role.GELU,), lambda s, r: _static(s) and not s.channels and r["gelu_channels"] == "one",
         _set("gelu_channels", "best"), "Let the search try factors for its channels.", traced=False),
    Rule(STATIC, lambda s, r: _static(s) and s.groups == 1 and r["time_grouped"] != "all", _set("time_grouped", "all"),
         "One static scale serves all timesteps: give each time group its own."),
    Rule(STATIC, lambda s, r: s.bits < MAX_BITS, _set("activation_bits", MAX_BITS), "Use 8 bits for activations."),
    Rule((Role.INPUT,), lambda s, r: not s.by_row and _static(s), _set("attended_grid", "row"),
         "Take a scale for each row of the attention's output; a GPU needs one more pass.", traced=False),
    Rule((Role.GELU,), lambda s, r: _static(s), _set("gelu_grid", "row"),
         "Take a scale for each row after GELU; a GPU needs one more pass.", traced=False),
    Rule((Role.INPUT, Role.GELU), lambda s, r: r["rotation"] == 0, _set("rotation", 256),
         "Rotate its channels, which spreads what is large in one of them.", traced=True),
    Rule((Role.INPUT, Role.GELU), lambda s, r: r["fallback"] < 40, lambda s, r: ("fallback", r["fallback"] + 10),
         "Keep it in float: raise the limit below which a layer takes float inputs.", traced=True),
    Rule(STATIC, lambda s, r: _static(s), _doubled("samples"),
         "Its grid is the finest of its kind: more calibration states fix its static scale better."),
)  # fmt: skip


def advice(site: Site, recipe: Mapping[str, Any], traced: bool = False) -> Advice:
    """Return the advice for a site of a model that was quantized by `recipe`, whose other settings have their defaults.

    `traced`: whether the model was calibrated on recorded calls.
    """
    if site.share is not None and site.share < LEAST_SHARE:
        return Advice("Leave it: it makes a small part of the error.")
    role, settings = Role(site.role), {**DEFAULTS, **recipe}
    for rule in RULES:
        if role in rule.roles and rule.traced in (None, traced) and rule.holds(site, settings):
            name, value = rule.setting(site, settings)
            if settings[name] != value:
                return Advice(rule.text, (name, value))
    return Advice("A recipe has nothing finer for it.")
