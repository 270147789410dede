"""OpenVINO's int8 by NNCF: a float model converted, quantized with calibration data and run by OpenVINO on a CPU.

NNCF's settings are its own for transformers: symmetric weights per channel, asymmetric static activations per tensor
(its preset "mixed"), SmoothQuant and bias correction with their default settings, and at most 300 calibration samples.
The layers that this project's methods leave in float are excluded by their names. Attention stays in float: NNCF 3.4
quantizes the projections around the converted graph's one operation of attention, not its operands. OpenVINO would
compute the rest in bf16 where the processor has it, so fp32 is asked for.
"""

import importlib.util
import logging
import re
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.calibration.states import CalibrationSet
from tqdit.speed.openvino import Positional, private

PACKAGES = ("openvino", "nncf")


def missing() -> str | None:
    """Return why OpenVINO's row cannot be measured here, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def versions() -> dict[str, str]:
    """Return the versions of OpenVINO and NNCF."""
    return {name: version(name) for name in PACKAGES}


def int8(model: nn.Module, states: CalibrationSet) -> nn.Module:
    """Return OpenVINO's int8 model of a DiT in fp32 on the CPU, calibrated on `states`."""
    with private():
        import nncf
        import openvino

        logging.getLogger("nncf").setLevel(logging.ERROR)
        config = registry.config_of(model)
        example = _inputs(states, [0, 0], config)
        graph = openvino.convert_model(Positional(model, {"class_labels": example[2]}), example_input=tuple(example))
        order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))  # NNCF takes the first 300
        items = [_inputs(states, [index, index], config) for index in order.tolist()]
        quantized = nncf.quantize(
            graph,
            nncf.Dataset(items, lambda item: [part.numpy() for part in item]),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=_float_layers(graph, model), validate=False),
        )
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        return Compiled(model, openvino.compile_model(quantized, "CPU", options))


class Compiled(nn.Module):
    """A model that OpenVINO runs, called as diffusers' DiT is."""

    def __init__(self, model: nn.Module, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled
        self.model = model  # says of which class and on which device this model is; it does not run

    @property
    def config(self) -> Any:
        """Return the float model's config."""
        return self.model.config

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """Return (output,) as diffusers' model with `return_dict=False`."""
        inputs = [part.cpu().numpy() for part in (hidden_states, timestep.long(), class_labels)]
        return (torch.from_numpy(self.compiled(inputs)[0].copy()),)


def _inputs(states: CalibrationSet, indices: list[int], config: Any) -> list[torch.Tensor]:
    """Return sample, timestep and class of states. Every second one has the null class, as guidance calls the model."""
    labels = states.labels[indices].clone()
    labels[1::2] = int(config["num_embeds_ada_norm"])
    return [states.x[indices], states.t[indices].long(), labels]


def _float_layers(graph: Any, model: nn.Module) -> list[str]:
    """Return the names of the graph's products and convolutions that belong to layers on float inputs."""
    layers = registry.graph(registry.config_of(model)).float_input
    pattern = re.compile(r"(^|\.)(" + "|".join(re.escape(name) for name in layers) + r")(/|\.|$)")
    nodes = [node for node in graph.get_ops() if node.get_type_name() in ("MatMul", "Convolution")]
    return [node.get_friendly_name() for node in nodes if pattern.search(node.get_friendly_name())]
