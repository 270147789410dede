"""Offloading of traced models by accelerate and diffusers: codes move, and the output stays the same bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn
from zoo import ZOO

import tqdit
from tqdit.errors import InputError
from tqdit.layers.quantized import QuantizedLinear

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = {"execution_device": "cpu"}
SD3 = "SD3Transformer2DModel"
WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, **CPU),
    "cpu, buffers": lambda model, _: accelerate.cpu_offload(model, **CPU, offload_buffers=True),
    "disk, buffers": lambda model, folder: accelerate.disk_offload(model, folder, **CPU, offload_buffers=True),
    "dispatched": lambda model, folder: accelerate.dispatch_model(
        model, {name: "disk" for name, _ in model.named_children()}, "cpu", offload_dir=folder
    ),
    "whole blocks": lambda model, _: accelerate.cpu_offload(
        model, **CPU, preload_module_classes=["JointTransformerBlock"]
    ),
}


def run(model: nn.Module, device: str = "cpu", name: str = SD3) -> torch.Tensor:
    call = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in ZOO[name].call().items()}
    with torch.no_grad():
        return model(**call, return_dict=False)[0].cpu()


def away(model: nn.Module) -> float:
    """The share of a model's layers on codes whose codes are on no device."""
    layers = [module.layer for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(next(layer.parameters()).is_meta for layer in layers) / len(layers)


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    """Static scales of two time groups, so that a clock and tables have to be where they are needed."""
    call = ZOO[SD3].call()
    calls = [{**ZOO[SD3].call(i), "timestep": call["timestep"] * f} for i, f in enumerate((0.2, 0.8, 1.2, 1.8))]
    recipe = tqdit.Recipe(
        "plus", input_grid="uniform", groups=2, samples=2, rounds=0, hessian="none", fallback=0.0, rotation=0,
        rounding="nearest",
    )  # fmt: skip
    return tqdit.quantize(ZOO[SD3].build(), recipe, calls=calls)


@pytest.fixture
def model(quantized) -> Any:
    return copy.deepcopy(quantized)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_output(quantized, model, tmp_path, way: str) -> None:
    expected = run(quantized)
    model = WAYS[way](model, tmp_path / "away")
    assert away(model) == 1
    for _ in range(2):
        assert torch.equal(run(model), expected)
        assert away(model) == 1
    remove_hook_from_module(model, recurse=True)
    assert away(model) == 0
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("way", ["cpu, buffers", "disk, buffers"])
def test_saving_and_reading_weights(quantized, model, tmp_path, way: str) -> None:
    model = WAYS[way](model, tmp_path / "away")
    name = "transformer_blocks.0.attn.to_q"
    found, expected = model.get_submodule(name), quantized.get_submodule(name)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)
    model.save_pretrained(tmp_path / "artifact")
    assert torch.equal(run(diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "artifact")), run(quantized))


def test_saving_while_blocks_are_away_as_a_whole(model, tmp_path) -> None:
    model = WAYS["whole blocks"](model, tmp_path)
    with pytest.raises(InputError, match="is offloaded; remove accelerate's hooks before reading it"):
        model.save_pretrained(tmp_path / "artifact")


@pytest.mark.parametrize("way", ["cpu", "cpu, buffers"])
def test_laid_out_anew_for_another_kind_of_device(quantized, model, tmp_path, way: str) -> None:
    """As where a model of the CPU is first called on a GPU: it stays offloaded, and that first call is right."""
    expected, before = run(quantized), model.transformer_blocks[0].attn.to_q.layer
    model = WAYS[way](model, tmp_path)
    model.prepared_for = "another"
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.prepared_for = "another"
    for _ in range(2):
        assert torch.equal(run(model), expected)
        assert away(model) == 1
    assert model.prepared_for == "cpu"
    assert model.transformer_blocks[0].attn.to_q.layer is not before


def test_a_block_that_is_called_before_it_is_laid_out(model, tmp_path) -> None:
    layer = WAYS["cpu"](model, tmp_path).transformer_blocks[0].attn.to_q
    layer.prepared_for = "another"
    with pytest.raises(InputError, match="has to be laid out for cpu before it is offloaded"):
        layer(torch.randn(1, 3, layer.in_features))


GROUPS = {
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "layers": {"offload_type": "leaf_level"},
}


def test_groups_on_disk(quantized, model, tmp_path) -> None:
    """Blocks go to files and come back: on a machine without a GPU, that is where they can be away."""
    device, path = torch.device("cpu"), str(tmp_path)
    with pytest.raises(InputError, match="to disk by offload_type 'block_level' alone, got 'leaf_level'"):
        model.enable_group_offload(device, offload_to_disk_path=path, **GROUPS["layers"])
    model.enable_group_offload(device, offload_to_disk_path=path, **GROUPS["blocks"])
    for _ in range(2):
        assert torch.equal(run(model), run(quantized))
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_in_memory(quantized, model, groups: str) -> None:
    model.enable_group_offload(torch.device("cpu"), **GROUPS[groups])
    assert torch.equal(run(model), run(quantized))


@pytest.mark.gpu
@GPU
class TestOnGPU:
    """A model that was laid out for the CPU is laid out anew by its first call on a GPU."""

    def test_model_offload(self, quantized, model) -> None:
        expected = run(copy.deepcopy(quantized).to("cuda"), "cuda")
        accelerate.cpu_offload_with_hook(model, "cuda")
        for _ in range(2):
            assert torch.equal(run(model, "cuda"), expected)

    @pytest.mark.parametrize("buffers", [False, True])
    def test_sequential_offload(self, quantized, model, buffers: bool) -> None:
        expected = run(copy.deepcopy(quantized).to("cuda"), "cuda")
        accelerate.cpu_offload(model, torch.device("cuda", 0), offload_buffers=buffers)
        for _ in range(2):
            assert torch.equal(run(model, "cuda"), expected)
            assert away(model) == 1
        assert model.quantization_backend == "triton"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("groups", GROUPS)
    def test_groups(self, quantized, model, groups: str, stream: bool) -> None:
        expected = run(copy.deepcopy(quantized).to("cuda"), "cuda")
        model.enable_group_offload(
            torch.device("cuda"), torch.device("cpu"), use_stream=stream and groups == "layers", **GROUPS[groups]
        )
        for _ in range(2):
            assert torch.equal(run(model, "cuda"), expected)

    def test_pipelines(self) -> None:
        flux = ZOO["FluxTransformer2DModel"]
        model = tqdit.quantize(flux.build(), tqdit.Recipe("dynamic"))
        expected = run(copy.deepcopy(model).to("cuda"), "cuda", flux.name)
        for way in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
            pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, copy.deepcopy(model))
            getattr(pipe, way)()
            assert torch.equal(run(pipe.transformer, "cuda", flux.name), expected)
