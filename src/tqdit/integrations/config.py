"""`TQDiTConfig`: what a quantized model's config says, and how a float model is quantized while diffusers loads it."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Self

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from tqdit.artifact import tensors
from tqdit.errors import InputError
from tqdit.plan import needs_records
from tqdit.recipe import PRESETS, Recipe
from tqdit.system.files import CONFIG, QUANT_METHOD

DYNAMIC = "dynamic"  # the preset that needs no calibration


class _Method(StrEnum):  # diffusers reads its `value`
    TQDIT = QUANT_METHOD


METHOD = _Method.TQDIT.value


class TQDiTConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact's config.json, or of a float model that is quantized on loading.

        FluxPipeline.from_pretrained(folder, quantization_config=PipelineQuantizationConfig(
            quant_mapping={"transformer": TQDiTConfig("dynamic")}))

    Only a preset without calibration can be used so, with 8 bits where none are given. Any other is solved by
    `tqdit.quantize`. `modules_to_not_convert`: names of layers that stay in float, or of modules with all layers
    inside, each a whole path or a part of one: "transformer_blocks.0", "to_out".
    """

    def __init__(
        self,
        preset: str | None = None,
        weight_bits: int | None = None,
        activation_bits: int | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        format_version: int = tensors.FORMAT_VERSION,
        manifest_sha256: str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise InputError(f"quant_method is '{quant_method}', a TQDiTConfig has '{METHOD}'")
        if isinstance(modules_to_not_convert, str):
            raise InputError(f"modules_to_not_convert must be a list of names, got '{modules_to_not_convert}'")
        self.quant_method: Any = _Method.TQDIT
        self.format_version = format_version
        self.preset = preset
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.manifest_sha256 = manifest_sha256

    @classmethod
    def dynamic(
        cls, weight_bits: int = 8, activation_bits: int = 8, modules_to_not_convert: Sequence[str] | None = None
    ) -> Self:
        """Make the config that quantizes a float model on loading. Raises `InputError` for bits that are not legal."""
        config = cls(DYNAMIC, weight_bits, activation_bits, modules_to_not_convert)
        config.recipe()
        return config

    def recipe(self) -> Recipe:
        """Return the recipe by which a float model is quantized on loading.

        Raises `InputError` for a preset that has to be calibrated, and for bits that are not legal.
        """
        if self.preset in PRESETS:
            recipe = Recipe(self.preset, weight_bits=self.weight_bits, activation_bits=self.activation_bits)
            if not needs_records(recipe):
                return recipe
        raise InputError(
            "a float model has to be calibrated: run `tqdit quantize MODEL -o FOLDER`, then load FOLDER;"
            f' or load it with TQDiTConfig("{DYNAMIC}"), which needs no calibration'
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make the config from the `quantization_config` of a config.json; unknown keys are ignored.

        Raises `InputError` for another method or format.
        """
        tensors.check_config({tensors.QUANTIZATION: config_dict}, CONFIG)
        config = cls(**{key: value for key, value in config_dict.items() if key in cls().to_dict()})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {**self.__dict__, "quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the settings that diffusers prints: all of them, since they are few."""
        return self.to_dict()
