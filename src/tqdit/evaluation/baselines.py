"""What a quantized model is timed against: float models of its shape with random weights, and torchao's int8."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.evaluation.machine import synchronise
from tqdit.models.random_weights import random_float

# Family -> its contenders. The best one of a family is what a speed-up is over.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "float32": ("float32-eager", "float32-compiled"),
    "bfloat16": ("bfloat16-eager", "bfloat16-compiled"),
    "torchao": ("torchao-compiled",),
}
# What torchao would set for the whole process: torchao.quantization.utils.recommended_inductor_config_setter.
TORCHAO_OPTIONS: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
    "triton.unique_kernel_names": True,
}


def check_families(names: tuple[str, ...]) -> None:
    """`InputError` naming an unknown baseline and the known ones."""
    for name in names:
        if name not in FAMILIES:
            raise InputError(f"unknown baseline '{name}'; known: {', '.join(FAMILIES)}")


def missing(family: str) -> str | None:
    """Why the baselines of a family cannot be built here, or None."""
    if family == "torchao" and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed; pip install 'tqdit[bench]'"
    return None


def build(names: tuple[str, ...], config: Mapping[str, Any], device: torch.device) -> dict[str, nn.Module]:
    """Contenders of one family, on `device`; they share their weights. Compilation happens in their first call."""
    family = names[0].partition("-")[0]
    model = random_float(config, torch.float32 if family == "float32" else torch.bfloat16)
    nn.Module.to(model, device)
    options: dict[str, Any] = (
        {"freezing": True} if device.type == "cpu" else {}
    )  # packed weights: the stronger baseline
    if family == "torchao":
        quantize_with_torchao(model)
        options |= TORCHAO_OPTIONS
    built: dict[str, nn.Module] = {}
    for name in names:
        compiled = name.endswith("-compiled")
        built[name] = Baseline(model, torch.compile(model, dynamic=False, options=options) if compiled else model)
    return built


def quantize_with_torchao(model: nn.Module) -> None:
    """torchao's dynamic int8 for every linear layer, in place; a layer that blocks share is quantized once."""
    with quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    done: set[int] = set()

    def is_new_linear(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or id(module) in done:
            return False
        done.add(id(module))
        return True

    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), is_new_linear)


class Baseline(nn.Module):
    """A float model that takes and gives fp32, whatever its own dtype: what the sampler calls. `run` computes it."""

    def __init__(self, model: nn.Module, run: Any) -> None:
        super().__init__()
        self.model = model
        self.run = run
        self.dtype = next(model.buffers()).dtype

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """(B, C, H, W), (B,), (B,) -> ((B, C or 2C, H, W),) as diffusers' model with `return_dict=False`."""
        x = hidden_states.to(self.dtype)
        return (self.run(x, timestep=timestep, class_labels=class_labels, return_dict=False)[0].float(),)


class DenoiserCall:
    """One denoiser call of a sampler with guidance: half of the labels are the null class, t is the same for all.

    Its inputs are fixed but for t. It returns when the device has finished.
    """

    def __init__(self, module: nn.Module, config: Mapping[str, Any], batch: int, device: torch.device) -> None:
        channels, side, classes = (int(config[key]) for key in ("in_channels", "sample_size", "num_embeds_ada_norm"))
        labels = torch.arange(batch) % classes
        labels[(batch + 1) // 2 :] = classes
        with torch.inference_mode():  # as the sampler's states are: torch.compile tells the two kinds apart
            noise = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))
            self.x, self.labels = noise.to(device).clone(), labels.to(device).clone()
        self.module = module
        self.device = device

    @torch.inference_mode()
    def __call__(self, t: int) -> torch.Tensor:
        """The model's output for the training timestep t, (B, C or 2C, H, W)."""
        timestep = torch.full_like(self.labels, t)
        output = self.module(self.x, timestep=timestep, class_labels=self.labels, return_dict=False)[0]
        synchronise(self.device)
        return output


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of other libraries about what they would like to be installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
