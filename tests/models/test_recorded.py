"""Models of ten classes of diffusers, with random weights: recorded, quantized, saved, loaded, and run."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO

import tqdit
from tqdit.layers.quantized import QuantizedLinear
from tqdit.ops.dispatch import get_backend
from tqdit.ops.schema import RowCodes
from tqdit.runtime.convert import convert

CLASSES = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "WanTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "ZImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "SanaTransformer2DModel",
)
SHIFT = 128  # a code of the CPU backend is the code plus this
UNSEEN = 9  # seed of a call that calibration did not see
LEAST = 30.0  # dB of a model's output at 8 bits


def output(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The first tensor of what a model returns."""
    found: Any = model(**arguments, return_dict=False)
    while not isinstance(found, torch.Tensor):
        found = found[0]
    return found


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    error = (reference.double() - other.double()).square().mean()
    return float(10 * torch.log10(reference.double().square().mean() / error))


@cache
def quantized(name: str) -> tuple[nn.Module, Any]:
    """The float model of a class, and its integer model, calibrated on four calls."""
    entry = ZOO[name]
    model = entry.build().requires_grad_(False)
    with tqdit.record(model, per_group=2) as calls:
        for seed in range(4):
            model(**entry.call(seed))
    recipe = tqdit.Recipe("plus", "w8a8", samples=2, rows=128, candidates=10, rounds=1)
    return model, tqdit.quantize(model, recipe, calls=calls)


@pytest.mark.parametrize("name", CLASSES)
def test_output_is_near_the_float_models(name: str) -> None:
    model, integer = quantized(name)
    arguments = ZOO[name].call(UNSEEN)
    assert sqnr(output(model, arguments), output(integer, arguments)) > LEAST


@pytest.mark.parametrize("name", CLASSES)
def test_loaded_model_equals_the_saved_one(name: str, tmp_path: Path) -> None:
    model, integer = quantized(name)
    integer.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, type(model))
    arguments = ZOO[name].call(UNSEEN)
    assert torch.equal(output(loaded, arguments), output(integer, arguments))


@pytest.mark.parametrize("name", CLASSES)
def test_codes_are_the_reference_ones(name: str) -> None:
    """Every layer is given the input that it has in a call, by the CPU backend and by the reference."""
    _, integer = quantized(name)
    seen: dict[str, torch.Tensor] = {}
    layers = {layer: module for layer, module in integer.named_modules() if isinstance(module, QuantizedLinear)}
    assert layers
    hooks = [
        module.register_forward_pre_hook(lambda _, given, layer=layer: seen.update({layer: given[0]}))
        for layer, module in layers.items()
    ]
    output(integer, ZOO[name].call(UNSEEN))
    for hook in hooks:
        hook.remove()
    backends = get_backend("cpu"), get_backend("reference")
    for layer, x in seen.items():
        source = layers[layer].source
        if source is None:
            continue
        target = source.operand(len(x))
        mine, expected = (source.codes(x.reshape(1, -1, x.shape[-1]), target, backend) for backend in backends)
        assert isinstance(mine, RowCodes)
        assert torch.equal(mine.codes.short() - SHIFT, expected.codes.short()), layer
        assert torch.equal(mine.scale, expected.scale), layer


@pytest.mark.parametrize("name", CLASSES[:2])
def test_backends_agree(name: str) -> None:
    """The products are exact; what follows them is fp32 in another order, and float code turns it into other codes."""
    _, integer = quantized(name)
    reference, arguments = convert(integer.solution, "reference"), ZOO[name].call(UNSEEN)
    assert sqnr(output(reference, arguments), output(integer, arguments)) > LEAST + 10


def test_layers_of_one_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, integer = quantized("FluxTransformer2DModel")
    kernels = type(get_backend("cpu"))
    made, quantize = [], kernels.quantize
    monkeypatch.setattr(kernels, "quantize", lambda self, *args: made.append(args) or quantize(self, *args))
    output(integer, ZOO["FluxTransformer2DModel"].call(UNSEEN))
    graph = integer.solution.graph
    assert len(made) == sum(len(block.linears) for block in graph.blocks)
    assert len(made) < sum(len(linear.modules) for block in graph.blocks for linear in block.linears)


def test_planted_outlier_channels_survive() -> None:
    """Some channels of what a feed-forward layer reads are a thousand times as large as the rest, as in Z-Image."""
    entry = ZOO["ZImageTransformer2DModel"]
    model = entry.build().requires_grad_(False)
    block = model.layers[0].feed_forward
    block.w3.weight[:3] *= 1000  # three channels of the product of both
    block.w2.weight[:, :3] /= 1000
    with tqdit.record(model, per_group=2) as calls:
        for seed in range(4):
            model(**entry.call(seed))
    recipe = tqdit.Recipe("plus", "w8a8", samples=2, rows=128, candidates=10, rounds=1)
    found = {}
    for channels in ("best", "one"):
        changed = recipe.model_copy(update={"input_channels": channels})
        integer = tqdit.quantize(model, changed, calls=calls)
        arguments = entry.call(UNSEEN)
        found[channels] = sqnr(output(model, arguments), output(integer, arguments))
    assert found["best"] > LEAST
    assert found["best"] > found["one"] + 3


def test_a_compiled_model_is_quantized_as_the_model_in_it() -> None:
    name = "FluxTransformer2DModel"
    model, calls = ZOO[name].build(), [ZOO[name].call()]
    made = tqdit.quantize(model, tqdit.Recipe("dynamic"), calls=calls)
    compiled = torch.compile(model, backend="eager")
    again = tqdit.quantize(compiled, tqdit.Recipe("dynamic"), calls=calls)  # type: ignore[call-overload]
    assert type(again) is type(made)
    assert torch.equal(output(again, calls[0]), output(made, calls[0]))


def test_a_model_of_compiled_blocks_is_calibrated_as_it_is_written() -> None:
    name = "FluxTransformer2DModel"
    calls, recipe = [ZOO[name].call()], tqdit.Recipe("plus", samples=1, groups=1, rows=32, rounds=0)
    model = ZOO[name].build().requires_grad_(False)
    made = tqdit.quantize(model, recipe, calls=calls)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    output(model, calls[0])  # compiles
    assert torch.equal(output(tqdit.quantize(model, recipe, calls=calls), calls[0]), output(made, calls[0]))


def test_a_model_in_training_is_calibrated_without_dropout() -> None:
    name = "PixArtTransformer2DModel"
    calls, recipe = [ZOO[name].call()], tqdit.Recipe("plus", samples=1, groups=1, rows=32, rounds=0)
    model = ZOO[name].build()
    made = tqdit.quantize(model, recipe, calls=calls)
    dropping = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropping:
        module.p = 0.5
    model.train()
    model.proj_out.eval()  # each module keeps the mode that it had
    again = tqdit.quantize(model, recipe, calls=calls)
    assert dropping
    assert torch.equal(output(again, calls[0]), output(made, calls[0]))
    assert model.training
    assert all(module.training for module in dropping)
    assert not model.proj_out.training
