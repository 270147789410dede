"""Where the sites of each supported architecture are: module names, and what each operand is.

Supported: diffusers' `DiTTransformer2DModel`. A block has two attention matmuls and four linear layers; q, k and v
share their input.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tqdit.architectures.timestep import check_timestep
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.spec import Granularity, Grid, Role, SiteSpec

ARCHITECTURE = "DiTTransformer2DModel"
FREQUENCY_SHIFT = "timestep_downscale_freq_shift"  # our key: 0 as published, 1 (if absent) as in diffusers
FORMER_NAME = "Transformer2DModel"  # what older pipelines call it
SIZES = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size",
    "num_embeds_ada_norm",
)  # fmt: skip
MAX_SIZE = 2**20  # of each of them: a list of so many layers or classes still is no burden
MAX_TOKENS = 2**16  # 4096 pixels at DiT's /2: the table of positions is computed, so no file bounds it
MAX_EPS = 3e38
SETTINGS = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that read one input site: (q, k, v), or a single layer. Names are module paths."""

    source: str  # name of the input site
    modules: tuple[str, ...]
    is_gelu: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(f"{module}.weight" for module in self.modules)


@dataclass(frozen=True)
class BlockLayout:
    """Names inside transformer block `index`."""

    index: int

    @property
    def prefix(self) -> str:
        return f"transformer_blocks.{self.index}"

    @property
    def attention(self) -> str:
        return f"{self.prefix}.attn1"

    def operand(self, role: Role) -> str:
        """Name of an attention-operand site."""
        return f"{self.attention}.{role.value}"

    @property
    def qkv(self) -> LinearGroup:
        a = self.attention
        return LinearGroup(f"{a}.qkv_input", (f"{a}.to_q", f"{a}.to_k", f"{a}.to_v"))

    @property
    def out(self) -> LinearGroup:
        return LinearGroup(f"{self.attention}.out_input", (f"{self.attention}.to_out.0",))

    @property
    def fc1(self) -> LinearGroup:
        return LinearGroup(f"{self.prefix}.ff.fc1_input", (f"{self.prefix}.ff.net.0.proj",))

    @property
    def fc2(self) -> LinearGroup:
        return LinearGroup(f"{self.prefix}.ff.fc2_input", (f"{self.prefix}.ff.net.2",), is_gelu=True)

    @property
    def linears(self) -> tuple[LinearGroup, ...]:
        return self.qkv, self.out, self.fc1, self.fc2

    @property
    def float_input(self) -> tuple[str, ...]:
        """Layers that depend on (t, class) alone: weights are quantized, inputs are not."""
        emb = f"{self.prefix}.norm1.emb.timestep_embedder"
        return f"{emb}.linear_1", f"{emb}.linear_2", f"{self.prefix}.norm1.linear"


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """A diffusers model's config with its class name, without diffusers' notes, whose order is not deterministic."""
    config = cast(Mapping[str, Any], model.config)
    return {"_class_name": ARCHITECTURE, **{key: value for key, value in config.items() if not key.startswith("_")}}


def blocks(config: Mapping[str, Any]) -> tuple[BlockLayout, ...]:
    """The layout of every block of a model config."""
    return tuple(BlockLayout(index) for index in range(int(config["num_layers"])))


def float_input_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """All weight-only layers, in the order of the model."""
    inner = [name for block in blocks(config) for name in block.float_input]
    return ("pos_embed.proj", *inner, "proj_out_1", "proj_out_2")


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise `InputError` if this config is not an architecture whose every operand we know, with sizes that fit."""
    if "_class_name" not in config:
        raise InputError(f"the config is of no diffusers model: it lacks _class_name; supported: {ARCHITECTURE}")
    if (found := config["_class_name"]) not in (ARCHITECTURE, FORMER_NAME):
        raise InputError(f"architecture '{found}' is not supported; supported: {ARCHITECTURE}")
    for key, value in SETTINGS.items():
        if config.get(key, value) != value:
            raise InputError(f"model config has {key} = {config[key]!r}; supported: {value!r}")
    for key in SIZES:
        if key not in config:
            raise InputError(f"model config lacks {key}")
        _check_size(key, config[key])
    channels = config["in_channels"]
    if config.get("out_channels") not in (None, channels, 2 * channels):
        raise InputError(
            f"model config has out_channels = {config['out_channels']!r}; it must be {channels} or twice that"
        )
    shift = config.get(FREQUENCY_SHIFT, 1)
    if type(shift) is not int or shift not in (0, 1):
        raise InputError(f"model config has {FREQUENCY_SHIFT} = {shift!r}; it must be 0 or 1")
    check_timestep(config)
    eps = config.get("norm_eps", 1e-5)
    if type(eps) not in (int, float) or not 0 <= eps < MAX_EPS:
        raise InputError(f"model config has norm_eps = {repr(eps)[:40]}; it must be a number from 0 that fp32 holds")
    if config["sample_size"] % config["patch_size"]:
        raise InputError(
            f"model config has sample_size = {config['sample_size']}, not a multiple of patch_size = "
            f"{config['patch_size']}"
        )
    if (tokens := (config["sample_size"] // config["patch_size"]) ** 2) > MAX_TOKENS:
        raise InputError(
            f"model config has sample_size = {config['sample_size']} and patch_size = {config['patch_size']}, which is "
            f"{tokens} tokens; at most {MAX_TOKENS} are supported"
        )


def _check_size(key: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise InputError(f"model config has {key} = {value!r}; it must be a whole number from 1 to {MAX_SIZE}")


def sites(config: Mapping[str, Any], recipe: Recipe) -> tuple[SiteSpec, ...]:
    """Every site of a model under a recipe, in the order of the model. "best" grids are listed as MRQ until solved.

    `config` may be a loaded model's own, which has no class name. Raises `InputError` as `check_supported` does.
    """
    check_supported({"_class_name": ARCHITECTURE, **config})
    return tuple(_all_sites(config, recipe))


def _all_sites(config: Mapping[str, Any], recipe: Recipe) -> Iterator[SiteSpec]:
    heads = int(config["num_attention_heads"])
    width = heads * int(config["attention_head_dim"])
    everywhere = recipe.groups if recipe.time_grouped == "all" else 1
    softmax_groups = 1 if recipe.time_grouped == "none" else recipe.groups
    bits = recipe.activation_bits
    softmax = Grid.UNIFORM if recipe.softmax_grid == "uniform" else Grid.MRQ_SOFTMAX
    gelu = Grid.UNIFORM if recipe.gelu_grid == "uniform" else Grid.MRQ_GELU

    def weight(module: str, units: int) -> SiteSpec:
        per_channel = recipe.granularity is Granularity.PER_CHANNEL
        return SiteSpec(
            f"{module}.weight", Role.WEIGHT, recipe.weight_bits, Grid.UNIFORM, recipe.granularity,
            units=units if per_channel else 1,
        )  # fmt: skip

    def linear(group: LinearGroup, units: int) -> Iterator[SiteSpec]:
        role, grid = (Role.GELU, gelu) if group.is_gelu else (Role.INPUT, Grid.UNIFORM)
        yield SiteSpec(group.source, role, bits, grid, groups=everywhere)
        for module in group.modules:
            yield weight(module, units)

    for name in float_input_modules(config):
        yield SiteSpec(
            f"{name}.weight", Role.WEIGHT_ONLY, recipe.float_input_bits, Grid.UNIFORM, Granularity.PER_CHANNEL,
            units=_float_input_units(name, config, width),
        )  # fmt: skip
    for block in blocks(config):
        yield from linear(block.qkv, width)
        for role in (Role.QUERY, Role.KEY, Role.VALUE):
            yield SiteSpec(
                block.operand(role), role, bits, Grid.UNIFORM, Granularity.PER_HEAD, everywhere, heads
            )  # fmt: skip
        yield SiteSpec(block.operand(Role.SOFTMAX), Role.SOFTMAX, bits, softmax, groups=softmax_groups)
        yield from linear(block.out, width)
        yield from linear(block.fc1, 4 * width)
        yield from linear(block.fc2, width)


def _float_input_units(name: str, config: Mapping[str, Any], width: int) -> int:
    """Output channels of a weight-only layer."""
    if name.endswith("norm1.linear"):
        return 6 * width
    if name == "proj_out_1":
        return 2 * width
    if name == "proj_out_2":
        channels = config.get("out_channels") or config["in_channels"]
        return int(channels) * int(config["patch_size"]) ** 2
    return width
