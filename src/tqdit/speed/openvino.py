"""OpenVINO's int8 on a CPU, as a baseline: NNCF quantizes a float model after training, and OpenVINO runs it."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any
from unittest import mock

import torch
from torch import nn

from tqdit.speed.quiet import quiet
from tqdit.system import trees

SAMPLES = 2  # calls that NNCF reads: speed depends on the kinds of layers, not on their scales
OFF = -1  # of NNCF's factors between channels of activations and weights
# With these neither library sends statistics of its use.
PRIVATE = {"NNCF_CI": "1", "CI": "true"}


class OpenVino(nn.Module):
    """A float model that OpenVINO runs in int8, called as diffusers' model with `return_dict=False`.

    Every shape of inputs is quantized and compiled in its first call, for as many threads as torch has.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.float32
        self._compiled: dict[Any, Any] = {}

    @property
    def config(self) -> Any:
        """Return the model's config."""
        return self.model.config

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False, **condition: Any
    ) -> tuple[torch.Tensor]:
        """Return (output,): (B, C, H, W), (B,) and conditions -> (B, C or 2C, H, W), fp32."""
        inputs = (hidden_states, timestep, *trees.tensors(trees.flatten(condition)).values())
        key = tuple(tuple(x.shape) for x in inputs)
        if key not in self._compiled:
            self._compiled[key] = compiled(Positional(self.model, condition), inputs)
        found = self._compiled[key]([x.numpy() for x in inputs])
        return (torch.from_numpy(found[0].copy()),)


class Positional(nn.Module):
    """A diffusers model whose inputs are tensors by position, which OpenVINO's converter traces.

    The tensors of a condition follow the latents and the timestep; other values of it stay as they are.
    """

    def __init__(self, model: nn.Module, condition: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.paths = tuple(trees.tensors(trees.flatten(condition)))
        self.others = {path: leaf for path, leaf in trees.flatten(condition).items() if path not in self.paths}

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return the model's output."""
        condition = trees.unflatten({**self.others, **dict(zip(self.paths, tensors, strict=True))})
        found: torch.Tensor = self.model(hidden_states, timestep=timestep, **condition, return_dict=False)[0]
        return found


def compiled(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """Return OpenVINO's compiled int8 model for inputs of these shapes; it takes and gives numpy arrays.

    NNCF reads the given inputs with other noise and other timesteps. What it does for quality alone is left out.
    """
    with private(), quiet(), redirect_stdout(io.StringIO()):
        import nncf
        import openvino

        nncf.set_log_level("ERROR")
        with torch.no_grad():
            converted = openvino.convert_model(model.eval(), example_input=inputs)
        converted.reshape({number: list(x.shape) for number, x in enumerate(inputs)})
        samples = [[x.numpy() for x in call] for call in _calls(inputs)]
        data = nncf.Dataset(samples)
        smoothing = nncf.AdvancedSmoothQuantParameters(convolution=OFF, matmul=OFF)
        options = nncf.AdvancedQuantizationParameters(disable_bias_correction=True, smooth_quant_alphas=smoothing)
        int8 = nncf.quantize(
            converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=SAMPLES, advanced_parameters=options
        )
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        return openvino.Core().compile_model(int8, "CPU", threads)


def _calls(inputs: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the calls that NNCF reads."""
    latents, timestep, *others = inputs
    generator = torch.Generator().manual_seed(0)
    for number in range(SAMPLES):
        noise = torch.randn(latents.shape, generator=generator)
        yield noise, torch.full_like(timestep, (2 * number + 1) * 1000 // (2 * SAMPLES)), *others


@contextmanager
def private() -> Iterator[None]:
    """Let libraries of Intel send no statistics of their use."""
    with mock.patch.dict(os.environ, PRIVATE):
        yield
