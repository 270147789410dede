"""LoRA on traced models: an adapter reads a layer's own input and adds to its output, as on a float layer."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn
from zoo import ZOO

import tqdit
from tqdit.errors import InputError
from tqdit.layers.quantized import QuantizedLinear
from tqdit.quality.metrics import sqnr_db

peft = pytest.importorskip("peft")

FLUX = "FluxTransformer2DModel"
INNER = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "ff.net.2")
WEIGHT_ONLY = "norm1.linear"  # modulation


def run(model: nn.Module, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**ZOO[FLUX].call(), **changes}, return_dict=False)[0]


def lora(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA as diffusers saves it, of some layers of every kind."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in (f"transformer_blocks.{i}.{inner}" for i in range(2) for inner in (*INNER, WEIGHT_ONLY)):
        out_features, in_features = model.get_submodule(name).weight.shape
        found[f"transformer.{name}.lora_A.weight"] = torch.randn(4, in_features, generator=generator) * 0.1
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(out_features, 4, generator=generator) * 0.1
    return found


def pipeline(transformer: nn.Module) -> FluxPipeline:
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return ZOO[FLUX].build()


@pytest.fixture(scope="module")
def quantized(float_model) -> nn.Module:
    return tqdit.quantize(float_model, tqdit.Recipe("dynamic"), calls=[ZOO[FLUX].call()])


@pytest.fixture
def pipes(float_model, quantized) -> tuple[FluxPipeline, FluxPipeline]:
    """The float and the quantized pipeline, with the same LoRA."""
    both = pipeline(copy.deepcopy(float_model)), pipeline(copy.deepcopy(quantized))
    for pipe in both:
        pipe.load_lora_weights(lora(float_model), adapter_name="first")
    return both


def test_through_a_pipeline(pipes, quantized) -> None:
    expected, found, alone = run(pipes[0].transformer), run(pipes[1].transformer), run(quantized)
    assert sqnr_db(expected, found) > sqnr_db(expected, alone) + 15
    scaled = {"joint_attention_kwargs": {"scale": 0.5}}
    half = run(pipes[1].transformer, **scaled)
    assert sqnr_db(run(pipes[0].transformer, **scaled), half) > 25
    assert not torch.equal(half, found)


def test_several_adapters_on_and_off(pipes, float_model, quantized) -> None:
    alone = run(quantized)
    for pipe in pipes:
        pipe.load_lora_weights(lora(float_model, 1), adapter_name="second")
        pipe.set_adapters(["first", "second"], [0.3, 0.7])
    assert sqnr_db(run(pipes[0].transformer), run(pipes[1].transformer)) > 25
    pipes[1].disable_lora()
    assert torch.equal(run(pipes[1].transformer), alone)
    pipes[1].enable_lora()
    pipes[1].delete_adapters("second")
    for pipe in pipes:
        pipe.set_adapters(["first"], [1.0])
    assert sqnr_db(run(pipes[0].transformer), run(pipes[1].transformer)) > 25
    pipes[1].unload_lora_weights()
    assert torch.equal(run(pipes[1].transformer), alone)
    assert not [m for m in pipes[1].transformer.modules() if type(m).__module__.startswith("peft.tuners.lora.layer")]


@pytest.mark.parametrize("name", [*INNER, WEIGHT_ONLY])
def test_a_layer_adds_exactly_what_its_adapter_does(pipes, name: str) -> None:
    """B A x of the layer's own x, whatever happens to x before it is coded."""
    layer: Any = pipes[1].transformer.get_submodule(f"transformer_blocks.0.{name}")
    base = layer.base_layer
    assert isinstance(base, QuantizedLinear)
    x = torch.randn(2, 7, base.in_features, generator=torch.Generator().manual_seed(0))
    added = layer.lora_B["first"](layer.lora_A["first"](x)) * layer.scaling["first"]
    with torch.no_grad():
        assert torch.equal(layer(x), base(x) + added)


@pytest.mark.parametrize("rotation", [0, 128])
def test_channel_factors_and_rotation_do_not_disturb_it(rotation: int) -> None:
    layer = adapted(rotation)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0))
    plain = x @ layer.base_layer.weight.T.as_subclass(torch.Tensor)
    with torch.no_grad():
        added = layer.lora_B["default"](layer.lora_A["default"](x))
        assert torch.equal(layer(x), layer.base_layer(x) + added)
        assert sqnr_db(plain + added, layer(x)) > 30


def adapted(rotation: int) -> Any:
    from tqdit.layers.clock import Clock
    from tqdit.layers.shared_input import Source
    from tqdit.ops.rotation import rotate
    from tqdit.ops.schema import WeightParams
    from tqdit.search.direct import ALWAYS
    from tqdit.spec import Granularity, Grid, GridParams, Role, SiteSpec

    channels = torch.linspace(-2, 2, 128).exp2()
    spec = SiteSpec("input", Role.INPUT, 8, Grid.ROW, Granularity.PER_TENSOR)
    params = GridParams(spec, torch.full((1, 1), 1 / 127), channels=channels, rotation=rotation)
    source = Source(params, Clock(ALWAYS), readers=1)
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) / channels
    values = rotate(values, rotation) if rotation else values
    scale = values.abs().amax(1) / 127
    weight = WeightParams((values / scale[:, None]).round().to(torch.int8), scale, 8)
    holder = nn.ModuleDict({"to_q": QuantizedLinear(weight, None, source, "auto", torch.float32)})
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, holder)["to_q"]


@pytest.mark.parametrize("options", [{}, {"safe_fusing": True}])
def test_fusing_is_refused(pipes, options: dict[str, Any]) -> None:
    expected = run(pipes[1].transformer)
    with pytest.raises(InputError, match=r"written to its weight or bias would be lost.*do not fuse or merge"):
        pipes[1].fuse_lora(**options)
    assert torch.equal(run(pipes[1].transformer), expected)


def test_dora_reads_the_dequantized_weight(float_model, quantized) -> None:
    config = peft.LoraConfig(r=4, target_modules=["to_q", "ff.net.2"], use_dora=True, init_lora_weights=False)
    expected, found = copy.deepcopy(float_model), copy.deepcopy(quantized)
    for model in (expected, found):
        model.add_adapter(config)
    adapter = {name: value * 1.1 for name, value in expected.state_dict().items() if "lora_" in name}
    for model in (expected, found):
        model.load_state_dict(adapter, strict=False)
    assert sqnr_db(run(expected), run(found)) > 25
    assert sqnr_db(run(expected), run(quantized)) < 20


def test_what_changes_weights_or_biases_is_refused(float_model, quantized) -> None:
    model = copy.deepcopy(quantized)
    with pytest.raises(InputError, match="would be lost"):
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights="pissa"))
    with pytest.raises(InputError, match="biases of a quantized layer stay as they are"):
        model.load_state_dict({"transformer_blocks.0.attn.to_q.bias": torch.ones(64)}, strict=False)


def test_a_model_with_adapters_is_saved_without_them(pipes, quantized, tmp_path) -> None:
    pipes[1].transformer.save_pretrained(tmp_path / "artifact")
    loaded = type(quantized).from_pretrained(tmp_path / "artifact")
    assert torch.equal(run(loaded), run(quantized))
    pipes[1].save_lora_weights(
        tmp_path / "lora", peft.get_peft_model_state_dict(pipes[1].transformer, adapter_name="first")
    )
    again = pipeline(loaded)
    again.load_lora_weights(tmp_path / "lora", adapter_name="first")
    assert torch.equal(run(again.transformer), run(pipes[1].transformer))
