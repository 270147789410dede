"""The registry of architectures: the name of a diffusers class leads to an `Architecture`, loaded on demand."""

import importlib
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from tqdit.architectures import timestep
from tqdit.architectures.interface import Architecture, Graph
from tqdit.errors import InputError, PromptsNeededError
from tqdit.sampling.guidance import Conditions, Sample

CLASS_NAME = "_class_name"  # of a diffusers config
FREQUENCY_SHIFT = "timestep_downscale_freq_shift"  # our key, for classes whose timestep embedding has no key for it
KEPT = (FREQUENCY_SHIFT, *timestep.DEFAULTS)  # all keys of ours, which a config keeps and diffusers does not know
_LOCATIONS = {
    "DiTTransformer2DModel": "tqdit.architectures.dit:DIT",
    "PixArtTransformer2DModel": "tqdit.architectures.pixart:PIXART",
}
_FORMER_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}  # what older pipelines call a class


def register(name: str, location: str) -> None:
    """Add an architecture of your own under the name of its diffusers class, or replace one.

    `location` is "module:object", imported when a model of the class is met first:

        register("MyTransformer2DModel", "my_package.my_model:ARCHITECTURE")

    Raises `InputError` for a location of another form.
    """
    module, _, attribute = location.partition(":")
    if not (module and attribute.isidentifier()):
        raise InputError(f"architecture '{name}' has location '{location}'; it must be \"module:object\"")
    _LOCATIONS[name] = location


def supported() -> tuple[str, ...]:
    """The names of the diffusers classes that have an architecture."""
    return tuple(_LOCATIONS)


def architecture(model: str | Mapping[str, Any]) -> Architecture:
    """Return the architecture of a diffusers class by its name, or by a config that has it as "_class_name".

    Raises `InputError` that names the class and lists the supported ones.
    """
    if not isinstance(model, str) and CLASS_NAME not in model:
        raise InputError(f"the config is of no diffusers model: it lacks {CLASS_NAME}; supported: {_listed()}")
    name = model if isinstance(model, str) else model[CLASS_NAME]
    location = _LOCATIONS.get(_FORMER_NAMES.get(name, name)) if isinstance(name, str) else None
    if location is None:
        raise InputError(_unsupported(str(name)))
    module, _, attribute = location.partition(":")
    try:
        return cast(Architecture, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise InputError(f"architecture '{name}' cannot be loaded from '{location}': {error}") from None


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise `InputError` for a config whose class has no architecture, or that its architecture does not support."""
    architecture(config).check(config)


def graph(config: Mapping[str, Any]) -> Graph:
    """Return the graph of a config's model. Raises `InputError` for a config that is not supported."""
    check_supported(config)
    return architecture(config).graph(config)


def conditions(config: Mapping[str, Any]) -> Conditions:
    """Return the classes of a config's model. Raises `InputError` for a model that is sampled under prompts."""
    made = architecture(config).conditions(config)
    if made is None:
        name = config[CLASS_NAME]
        hint = "give conditions, such as tqdit.Prompts.read(FILE)"
        raise PromptsNeededError(f"a {name} is sampled under prompts; {hint}")
    return made


def sample(config: Mapping[str, Any]) -> Sample:
    """Return what a sampling run has to know of a config's model."""
    return architecture(config).sample(config)


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return a diffusers model's config with its class name, without diffusers' notes, whose order varies.

    `model` may be a wrapper that has the model's `config`. Raises `InputError` for a model that is not supported.
    """
    return plain_config(model, _class_name(model))


def plain_config(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Return `config_of` of any diffusers model, by default with the name of its own class."""
    config = cast(Mapping[str, Any], model.config)
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return {CLASS_NAME: name or type(model).__name__, **settings}


def _class_name(model: nn.Module) -> str:
    """The supported class that a model, or the model inside a wrapper, is of."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _LOCATIONS:
                return kind.__name__
    raise InputError(_unsupported(type(model).__name__))


def _unsupported(name: str) -> str:
    """Return a message about a class without an architecture, which says what else serves a class of diffusers."""
    return (
        f"architecture '{name}' is not supported; supported: {_listed()}; any other class of diffusers is quantized "
        "and compared by recorded calls (tqdit.record), and sampled by its own pipeline"
    )


def _listed() -> str:
    return ", ".join(_LOCATIONS)
