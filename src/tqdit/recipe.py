"""`Recipe`: every setting of a quantization run, validated, with the presets `paper` and `plus`."""

import json
import re
import tomllib
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tqdit.errors import InputError, suggestion
from tqdit.spec import MAX_BITS, Granularity
from tqdit.system.reading import read_bytes
from tqdit.system.validation import legal

MAX_RECIPE_BYTES = 2**16
MAX_DOTS = 100  # in a line that is no comment
BITS_PATTERN = re.compile(r"w([2-8])a([4-8])", re.IGNORECASE)

CALIBRATION_SETTINGS = (
    "groups", "time_edges", "samples", "sampler", "steps", "guidance", "trajectories", "probes", "rows", "queries",
    "seed",
)  # fmt: skip

METHOD_SETTINGS = (
    "weight_granularity", "input_grid", "input_channels", "rotation", "softmax_grid", "attended_grid", "gelu_grid",
    "softmax_products", "gelu_products", "gelu_channels", "time_grouped", "ends", "hessian", "loss", "rounding", "mix",
    "fallback",
)  # fmt: skip

PRODUCTS_OF = {"softmax_grid": "softmax_products", "gelu_grid": "gelu_products"}

DEFAULT_PRESET, DEFAULT_BITS = "plus", "w8a8"
PRESETS: dict[str, dict[str, Any]] = {
    # The published method: per-tensor weights, MRQ for both roles that have it, TGQ on post-softmax only.
    "paper": {
        "weight_granularity": "per_tensor",
        "time_grouped": "softmax",
        "input_grid": "uniform",
        "input_channels": "one",
        "softmax_grid": "mrq",
        "attended_grid": "uniform",
        "gelu_grid": "mrq",
        "gelu_products": "two",
        "gelu_channels": "one",
        "ends": "codes",
        "hessian": "published",
        "loss": "epsilon",
        "rounding": "nearest",
        "fallback": 0.0,
        "rounds": 3,
    },
    # A better method at little or no run-time cost: per-channel weights, rounded by second order; a scale for each row
    # where the row is at hand; time groups for all other activations, and a factor for each channel after GELU; the
    # first and the last layer in float; errors weighed by what they do to the image (docs/quality.md).
    "plus": {
        "weight_granularity": "per_channel",
        "time_grouped": "all",
        "input_grid": "row",
        "input_channels": "best",
        "softmax_grid": "row",
        "attended_grid": "uniform",
        "gelu_grid": "best",
        "gelu_products": "one",
        "gelu_channels": "best",
        "ends": "float",
        "hessian": "image",
        "loss": "sampler",
        "rounding": "second_order",
        "fallback": 20.0,
        "rounds": 3,
    },
    # What needs no calibration where a model is traced: a scale for each row, weights rounded to nearest.
    "dynamic": {
        "weight_granularity": "per_channel",
        "time_grouped": "none",
        "input_grid": "row",
        "input_channels": "one",
        "softmax_grid": "row",
        "attended_grid": "row",
        "gelu_grid": "row",
        "gelu_products": "one",
        "gelu_channels": "one",
        "ends": "float",
        "hessian": "none",
        "loss": "epsilon",
        "rounding": "nearest",
        "fallback": 0.0,
        "rounds": 0,
    },
}


def _hessian(value: Any) -> Any:
    """Return the setting that a recipe of earlier versions means by true or false, in any of their spellings."""
    word = str(value).lower()
    if word in ("true", "t", "yes", "y", "on", "1"):
        return "published"
    return "none" if word in ("false", "f", "no", "n", "off", "0") else value


def _whole(value: Any) -> Any:
    """Return a whole number for its text, as a command line gives it."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


class Recipe(BaseModel):
    """Every setting of one quantization: a preset at a bit-width, with single settings changed.

        Recipe()                                    # the preset plus, W8A8
        Recipe("paper", "w6a6", samples=8, steps=50)

    The presets share the paper's calibration and search; the paper's n is `samples`, per time group. A recipe is
    frozen, hashable, and equal to another one of the same settings. docs/settings.md explains every setting.
    Raises `InputError` that names the setting and what is legal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    preset: str = DEFAULT_PRESET
    weight_bits: int = Field(8, ge=2, le=8)
    activation_bits: int = Field(8, ge=4, le=8)
    weight_granularity: Literal["per_tensor", "per_channel"] = "per_channel"
    input_grid: Literal["uniform", "row", "best"] = "row"  # of inputs that are quantized with their row at hand
    input_channels: Literal["one", "best"] = "best"  # a factor for each channel of an input quantized apart
    rotation: Annotated[Literal[0, 128, 256], BeforeValidator(_whole)] = 0  # channels that are rotated together
    softmax_grid: Literal["mrq", "uniform", "best", "row"] = "row"
    attended_grid: Literal["uniform", "row"] = "uniform"  # of the attention's output
    gelu_grid: Literal["mrq", "uniform", "best", "row"] = "best"
    softmax_products: Literal["one", "two"] = "two"  # "one": two-region grids of one integer product only
    gelu_products: Literal["one", "two"] = "one"
    gelu_channels: Literal["one", "best"] = "best"  # a factor for each channel after GELU: 1, or what is best
    time_grouped: Literal["none", "softmax", "all"] = "all"
    ends: Literal["codes", "float"] = "float"  # the weights of the first and the last layer
    hessian: Annotated[Literal["none", "published", "image"], BeforeValidator(_hessian)] = "image"
    loss: Literal["epsilon", "sampler"] = "sampler"  # of hessian = "published": errors of epsilon alike, or by step
    rounding: Literal["nearest", "second_order"] = "second_order"  # of weights: GPTQ
    mix: float = Field(
        0.5, ge=0, le=1, description="of second-order rounding: share of the Hessian whose rows are weighed"
    )
    fallback: float = Field(
        20.0, ge=0, allow_inf_nan=False, description="dB below which a layer of a traced model keeps float inputs"
    )  # layers of 8 bits have about 40 dB, so one of 20 dB has the error of a hundred others

    groups: int = Field(10, ge=1)
    time_edges: Literal["uniform", "visited"] = "uniform"  # equal ranges of t, or equal numbers of sampler steps
    samples: int = Field(32, ge=1, description="calibration samples per time group (n)")
    sampler: Literal["auto", "ddim", "ddpm", "flow"] = "auto"  # "auto": ddpm for a diffusion model, else flow
    steps: int = Field(250, ge=1)
    guidance: float = Field(1.5, ge=0, allow_inf_nan=False)
    trajectories: int | None = Field(None, ge=1, description="sampling runs to draw from")
    probes: int = Field(1, ge=1, description="random probes per sample for the Fisher diagonal")

    rounds: int = Field(3, ge=0, description="alternating search rounds; 0 keeps min-max scales")
    candidates: int = Field(100, ge=2)
    low: float = Field(0.01, gt=0, le=1)
    high: float = Field(1.2, ge=1, allow_inf_nan=False)
    rows: int = Field(2048, ge=1, description="activation rows per linear layer that the search scores")
    queries: int = Field(2048, ge=1, description="query rows per attention layer that the search scores")
    seed: int = Field(0, ge=0, lt=2**31)

    def __init__(self, /, preset: str = DEFAULT_PRESET, bits: str = DEFAULT_BITS, **settings: Any) -> None:
        """Take `preset` at `bits`, such as "w6a6", with other `settings` changed; None keeps the preset's value.

        The settings `weight_bits` and `activation_bits` win over `bits`.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        values = {"preset": preset, **_preset(preset), **_bit_widths(bits), **given}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_reason(error.errors()[0])) from None
        self._check_products()
        self._check_rotation()

    def records_match(self, recorded: "Recipe") -> bool:
        """Say whether records made under another recipe serve this one. Only search settings may differ."""
        others = [name for name in CALIBRATION_SETTINGS if name != "sampler"]
        same = all(getattr(self, name) == getattr(recorded, name) for name in others)
        known = self.hessian == "none" or recorded.hessian in (self.hessian, "image")  # what "published" needs as well
        return same and _same_sampler(self.sampler, recorded.sampler) and known

    def _uniform_at_best(self) -> list[str]:
        """Return the grid settings that one product limits to a uniform grid's levels (`regions.merging_exponents`)."""
        one = [grid for grid, products in PRODUCTS_OF.items() if getattr(self, products) == "one"]
        return one if self.activation_bits == MAX_BITS else []

    @property
    def label(self) -> str:
        """Return the preset's name with the changed parts of the method, such as "paper (changed: hessian)"."""
        original = Recipe(self.preset)
        changed = [name for name in METHOD_SETTINGS if getattr(self, name) != getattr(original, name)]
        return f"{self.preset} (changed: {', '.join(changed)})" if changed else self.preset

    @property
    def probed(self) -> bool:
        """Say whether calibration probes the Fisher diagonal."""
        return self.hessian != "none"

    @property
    def bits(self) -> str:
        """Return both bit-widths as text, such as "w6a6"."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def granularity(self) -> Granularity:
        """Return the granularity of the weights' scales."""
        return Granularity(self.weight_granularity)

    @property
    def float_input_bits(self) -> int:
        """Return the weight bits of the layers that run on float inputs (adaLN, timestep, patch and final layers).

        The paper leaves these layers in float. They steer every block at once, so they keep two bits more than the
        rest. With `ends = "float"` the first and the last of them stay in float.
        """
        return min(8, self.weight_bits + 2)

    @classmethod
    def build(cls, preset: str = DEFAULT_PRESET, bits: str = DEFAULT_BITS, **overrides: Any) -> Self:
        """Call `Recipe` itself, which takes the same arguments; this method is deprecated."""
        warnings.warn("Recipe.build(...) is now Recipe(...)", DeprecationWarning, stacklevel=2)
        return cls(preset, bits, **overrides)

    @classmethod
    def from_toml(cls, path: Path, **settings: Any) -> Self:
        """Read a recipe file: the settings of its `preset`, changed by the file's other settings, then by `settings`.

        Raises `InputError` that names the file, for a text that is no TOML, and as `Recipe` does, also for unknown
        keys.
        """
        data = read_bytes(path, MAX_RECIPE_BYTES)
        try:
            text = data.decode("utf-8")
            _check_keys(text)
            values = tomllib.loads(text)
        except RecursionError:
            raise InputError(f"recipe {path}: its tables and arrays are too deep; a recipe has single values") from None
        except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
            raise InputError(f"recipe {path}: {error}") from None
        preset = values.get("preset", DEFAULT_PRESET)
        if str(preset) not in PRESETS:
            raise InputError(f"recipe {path}: unknown preset {preset!r}; known: {', '.join(PRESETS)}")
        return cls(**values | settings)

    def to_toml(self) -> str:
        """Return the recipe as TOML text. All values are scalars, which TOML spells as JSON does."""
        values = self.model_dump(exclude_none=True)
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())

    def _check_products(self) -> None:
        """Refuse a two-region grid of which the number of products leaves nothing."""
        for name in self._uniform_at_best():
            if getattr(self, name) == "mrq":
                raise InputError(
                    f"recipe settings '{name}' and '{PRODUCTS_OF[name]}': 'mrq' of {MAX_BITS} bits takes two products, "
                    f"got 'one'; legal with 'one' are 'best', 'uniform', or at most {MAX_BITS - 1} bits"
                )

    def _check_rotation(self) -> None:
        """Refuse a static grid for rotated inputs, whose ranges calibration does not record."""
        if self.rotation and self.input_grid == "uniform":
            raise InputError(
                f"recipe settings 'input_grid' and 'rotation': rotated inputs have a scale for each row, got 'uniform' "
                f"and {self.rotation}; legal with a rotation are 'row' and 'best'"
            )


def _preset(name: Any) -> dict[str, Any]:
    """Return the settings in which a preset differs from another."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}{suggestion(str(name), PRESETS)}")
    return PRESETS[name]


def _bit_widths(text: Any) -> dict[str, int]:
    """Return the two bit-widths of a text such as "w6a6"."""
    match = BITS_PATTERN.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise InputError(f"bits '{text}' must be w<2-8>a<4-8>, such as w8a8, w6a6 or w4a8")
    return {"weight_bits": int(match[1]), "activation_bits": int(match[2])}


def _same_sampler(first: str, second: str) -> bool:
    """Say whether two settings are the same sampler of one model.

    "auto" is "ddpm" for every model that "ddpm" can sample, and "flow" for every one that "flow" can.
    """
    return first == second or ("auto" in (first, second) and "ddim" not in (first, second))


def _check_keys(text: str) -> None:
    """Refuse a key of very many parts: the TOML parser's memory for it would grow with their square."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MAX_DOTS and not line.lstrip().startswith("#"):
            raise InputError(f"line {number} has more than {MAX_DOTS} dots; a recipe's keys have one part")


def _reason(error: Any) -> str:
    """Return one of pydantic's errors in our own words."""
    name, given = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        known = sorted(set(Recipe.model_fields) - {"schema_version"})
        return f"unknown recipe setting '{name}'{suggestion(name, known) or '; known: ' + ', '.join(known)}"
    expected = legal(error)
    if expected is None:
        return f"recipe setting '{name}': {error['msg']}, got {given!r}"
    return f"recipe setting '{name}' must be {expected}, got {given!r}"
