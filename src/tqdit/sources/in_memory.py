"""Describe a float model that is in memory already, with a scheduler, like one that is found by its path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures.building import empty_model, set_parameter
from tqdit.architectures.registry import check_supported, config_of
from tqdit.errors import InputError
from tqdit.sampling.schedules import scheduler_config
from tqdit.sources.float_weights import check_shapes, checked
from tqdit.sources.labels import checked_labels
from tqdit.sources.source import ModelSource
from tqdit.system.files import TRANSFORMER


def source_in_memory(
    transformer: nn.Module, scheduler: Any = None, labels: Mapping[int, str] | None = None
) -> ModelSource:
    """Describe a diffusers transformer as a source, named after the folder or id that it was loaded from.

    `scheduler`: as in `scheduler_config`. Raises `InputError` for a model of another architecture, and for one that is
    quantized already.
    """
    config, schedule = _checked_config(transformer), {} if scheduler is None else scheduler_config(scheduler)
    return ModelSource(name_of(transformer), Path(), config, schedule, checked_labels(labels, config))


def float_copy(transformer: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Return a float model in fp32 and eval mode that shares with `transformer` the tensors in that form.

    The transformer itself, its hooks and its mode are left as they are. `device`: where the copy is; by default where
    the transformer is. Raises `InputError` that names a tensor that is missing, left over, not finite or offloaded.
    """
    model = empty_model(_checked_config(transformer))
    state = transformer.state_dict()
    check_shapes(state, model.state_dict())
    for name, tensor in state.items():
        if tensor.is_meta:
            raise InputError(f"tensor '{name}' of the model is offloaded; remove accelerate's hooks first")
    target = device or next(iter(state.values())).device
    for name, tensor in state.items():
        set_parameter(model, name, checked(name, tensor.detach()).to(target))
    return model.eval().requires_grad_(False).to(target)


def check_transformer(given: Any) -> None:
    """Raise `InputError` for an object that is no model with a diffusers config."""
    if not isinstance(given, nn.Module) or not isinstance(getattr(given, "config", None), Mapping):
        what = "has no diffusers config" if isinstance(given, nn.Module) else "is no model"
        hint = pipeline_hint(given) or "; give a transformer of diffusers"
        raise InputError(f"a {type(given).__name__} {what}{hint}")


def check_float(model: nn.Module) -> None:
    """Raise `InputError` for a diffusers model that is quantized already, has adapters, or is offloaded."""
    config = cast(Mapping[str, Any], model.config)
    if hasattr(model, "solution") or config.get("quantization_config") is not None:
        raise InputError("the model is already quantized; give the float model")
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise InputError(
                f"the model has an adapter on '{name}'; fuse adapters and unload them, or load them into the quantized"
                " model afterwards"
            )
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise InputError(f"tensor '{name}' of the model is offloaded; remove accelerate's hooks first")


def pipeline_hint(given: Any) -> str:
    """Return the end of a message about an object that is no transformer: what to give if it is a pipeline."""
    return "; give pipe.transformer" if isinstance(getattr(given, "transformer", None), nn.Module) else ""


def _checked_config(transformer: nn.Module) -> Mapping[str, Any]:
    check_transformer(transformer)
    name = type(transformer).__name__
    config = {**config_of(transformer), "_class_name": name}
    if hasattr(transformer, "solution") or config.pop("quantization_config", None) is not None:
        raise InputError("the model is already quantized; give the float model")
    check_supported(config)
    return config


def name_of(transformer: Any) -> str:
    """Return the name of the folder, or the id on the Hub, that a model was loaded from; else the name of its class."""
    given = str(transformer.config.get("_name_or_path") or type(transformer).__name__)
    if not Path(given).is_dir():
        return given
    folder = Path(given).resolve()
    return folder.parent.name if folder.name == TRANSFORMER else folder.name
