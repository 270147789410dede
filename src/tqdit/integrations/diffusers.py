"""Let diffusers' `from_pretrained` load artifacts, and quantize float models that it loads.

A quantizer collects the tensors of an artifact, and `convert` makes the model.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import configuration_utils
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from tqdit.architectures.registry import KEPT
from tqdit.artifact import folder as artifact
from tqdit.artifact import tensors
from tqdit.errors import InputError
from tqdit.integrations.config import METHOD, TQDiTConfig
from tqdit.system.isolation import isolated

WHOLE = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that leave the choice to the quantizer


class TQDiTQuantizer(DiffusersQuantizer):
    """The quantizer by which `from_pretrained` loads an artifact.

    The empty model is replaced by a list of the checkpoint's tensors. diffusers then hands the tensors over one by one.
    At the end the integer model takes the empty model's place.

    Tensors are taken as they are in the file, since diffusers would cast the scales to `torch_dtype`. A tensor that is
    missing, left over or changed is an `InputError`, where diffusers would only warn.

    Overlapping calls of `from_pretrained` in several threads may leave `torch.nn.Module.register_parameter` as
    accelerate has patched it. This happens with float models too: load one model at a time.
    """

    def __new__(cls, *_: Any, **kwargs: Any) -> "TQDiTQuantizer":
        """Make the quantizer of an artifact, or that of a float model; a copy is made without arguments."""
        return super().__new__(cls if kwargs.get("pre_quantized", True) else DynamicQuantizer)

    def __init__(self, quantization_config: TQDiTConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._folder: Path | None = None
        self._keys: list[str] = []
        self._found: dict[str, torch.Tensor] = {}
        self._device = torch.device("cpu")
        self._dtype = torch.float32

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Raise `InputError` for a device map over several devices, between which codes cannot travel, or over none."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else {"one"}
        if len(devices) != 1 or devices & {"disk", "meta"}:
            raise InputError(f"an integer model runs on one device; device_map is {device_map}")

    def update_torch_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """Keep the dtype of the model's inputs and outputs, float32 by default."""
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """Put the whole model on one device: the first GPU if diffusers leaves the choice to the model."""
        if device_map is None:
            return None
        if isinstance(device_map, str) and device_map in WHOLE:
            self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        else:
            self._device = torch.device(next(iter(device_map.values())))
        return {"": self._device}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Keep the names of all tensors, and check the artifact's seal before any tensor is taken.

        Raises `InputError` if a file beside the weights, or in the pipeline around them, is not as its seal says.
        """
        self._keys = list(loaded_keys)
        self._folder = Path(checkpoint_files[0]).parent
        artifact.check_seal(self._folder)
        return loaded_keys

    def check_if_quantized_param(self, *_: Any, **__: Any) -> bool:
        """Claim every tensor."""
        return True

    def create_quantized_param(self, *args: Any, **_: Any) -> Any:
        """Keep a tensor of the file.

        The arguments are the model, the value, its name, the device and the file's tensors by name.
        """
        name, state_dict = args[2], args[4]
        self._found[name] = state_dict[name]  # not `value`, which diffusers has cast

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Give the model an empty tensor under every name of the checkpoint."""
        _clear(model)
        for key in self._keys:
            try:
                _add_empty(model, key)
            except (AttributeError, KeyError, NameError, TypeError):  # a module cannot have a tensor of this name
                raise InputError(f"{self._folder}: has an unexpected tensor '{key}'") from None

    @isolated()
    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Make the collected tensors an integer model, which takes the place of `model`."""
        from tqdit.runtime.convert import convert
        from tqdit.runtime.integer import make_integer

        if lost := sorted(set(self._keys) - set(self._found)):
            raise InputError(
                f"{self._folder}: diffusers gave no '{lost[0]}';"
                " load without ignore_mismatched_sizes and offload_state_dict"
            )
        config = {**model.config, tensors.QUANTIZATION: self.quantization_config.to_dict()}
        found, self._found = self._found, {}
        _clear(model)
        solution = tensors.unpack(found, config, self._folder)
        try:
            built: Any = convert(solution, device=self._device, dtype=self._dtype if solution.graph else None)
        except InputError as error:
            raise InputError(f"{self._folder}: {error}") from None
        if solution.graph is None:
            make_integer(model, built.runtime.architecture).adopt(built).io_dtype = self._dtype
            return
        model.__class__ = type(built)
        model.adopt(built)

    @property
    def is_serializable(self) -> bool:
        """Say that the model can be saved, which its own `save_pretrained` does."""
        return True  # the model's own `save_pretrained` does it

    @property
    def is_trainable(self) -> bool:
        """Say that the model cannot be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Say that the model can be compiled."""
        return True


class DynamicQuantizer(TQDiTQuantizer):
    """The quantizer of a float model that is loaded with a `TQDiTConfig` whose recipe needs no calibration.

    diffusers loads the float model into the CPU's memory. Then its layers are coded one by one, where they are to run.
    """

    use_keep_in_fp32_modules = True  # as without a quantizer

    def __init__(self, quantization_config: TQDiTConfig, **kwargs: Any) -> None:
        quantization_config.recipe()  # an InputError now, before any weight is read
        super().__init__(quantization_config, **kwargs)

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """Note the one device of the model, and load its float weights on the CPU."""
        return None if super().update_device_map(device_map) is None else {"": torch.device("cpu")}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Leave the names to diffusers."""
        return loaded_keys

    def check_if_quantized_param(self, *_: Any, **__: Any) -> bool:
        """Leave every tensor to diffusers."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Leave the empty model as it is."""

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Code the layers of the loaded model."""
        from tqdit.integrations.dynamic import quantize_loaded

        quantize_loaded(model, self.quantization_config, self._device)
        if hasattr(model, "hf_device_map"):
            model.hf_device_map = {"": self._device}


def _clear(model: nn.Module) -> None:
    """Remove a model's parts and its own tensors."""
    for held in (model._modules, model._parameters, model._buffers):
        held.clear()


def _add_empty(model: nn.Module, key: str) -> None:
    """Add an empty tensor under a dotted name, and modules on the way."""
    *path, leaf = key.split(".")
    holder = model
    for name in path:
        if name not in holder._modules:
            holder.add_module(name, nn.Module())
        holder = holder.get_submodule(name)
    holder.register_buffer(leaf, torch.empty(0))


class _KeptSetting(logging.Filter):
    """A filter for diffusers' warning that it ignores the timestep keys of a config.

    The warning is dropped while an artifact is loaded, since tqdit heeds these keys. The warning stays for a float
    model that diffusers alone loads: there it is true.
    """

    said = re.compile(rf"The config attributes {{(?:'(?:{'|'.join(KEPT)})': [^,}}]*(?:, )?)+}} were passed")

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a log record is kept."""
        if not self.said.match(record.getMessage()):
            return True
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if isinstance(frame.f_locals.get("hf_quantizer"), TQDiTQuantizer):  # in `from_pretrained`
                return False
        return True


KEPT_SETTING = _KeptSetting()


def register() -> None:
    """Add tqdit to diffusers' tables of quantization methods, without replacing any entry."""
    logging.getLogger(configuration_utils.__name__).addFilter(KEPT_SETTING)  # logging adds a filter only once
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, TQDiTQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, TQDiTConfig)


register()
