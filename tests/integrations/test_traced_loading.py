"""Traced models through diffusers' loading and saving, and float models that are quantized while they are loaded."""

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from torch import nn
from zoo import ZOO

import tqdit
from tqdit import TQDiTConfig
from tqdit.architectures.untraced import ASKED, untraced_graph
from tqdit.errors import InputError
from tqdit.layers.quantized import QuantizedLinear
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime import traced_assembly

WAN, SANA, DIT = "WanTransformer3DModel", "SanaTransformer2DModel", "DiTTransformer2DModel"
QUICK = (WAN, SANA, DIT)
OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in ZOO if name not in QUICK]


def run(model: nn.Module, name: str, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(**{**ZOO[name].call(), **changes}, return_dict=False)[0]
    return torch.cat([x.flatten() for x in out]) if isinstance(out, list) else out


def states(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: ZOO[WAN].call()[name].to(dtype) for name in ("hidden_states", "encoder_hidden_states")}


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def kind(name: str) -> Any:
    return getattr(diffusers, name)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of float models by class."""
    root = tmp_path_factory.mktemp("float")

    def get(name: str) -> Path:
        if not (root / name).exists():
            ZOO[name].build().save_pretrained(root / name)
        return root / name

    return get


class TestOnLoading:
    @pytest.mark.parametrize("name", [*QUICK, *OTHERS])
    def test_any_class_and_back(self, stored, tmp_path, name: str) -> None:
        model = kind(name).from_pretrained(stored(name), quantization_config=TQDiTConfig("dynamic"))
        expected, found = run(ZOO[name].build(), name), run(model, name)
        assert sqnr_db(expected, found) > 25
        blocks = untraced_graph(ZOO[name].build()).blocks
        assert set(layers(model)) == {name for block in blocks for linear in block.linears for name in linear.modules}
        model.save_pretrained(tmp_path / "artifact")
        assert torch.equal(run(kind(name).from_pretrained(tmp_path / "artifact"), name), found)
        assert torch.equal(run(tqdit.quantize(ZOO[name].build(), tqdit.Recipe("dynamic")), name), found)

    def test_every_float_weight_is_freed_before_the_next_is_coded(self, stored, monkeypatch) -> None:
        model = kind(WAN).from_pretrained(stored(WAN))
        alive = {
            name: weakref.ref(module.weight) for name, module in model.named_modules() if type(module) is nn.Linear
        }
        seen: list[str] = []
        make = traced_assembly._layer

        def watched(solution: Any, name: str, *rest: Any) -> QuantizedLinear:
            assert not [before for before in seen if alive[before]() is not None]
            seen.append(name)
            return make(solution, name, *rest)

        monkeypatch.setattr(traced_assembly, "_layer", watched)
        from tqdit.integrations.dynamic import quantize_loaded

        quantize_loaded(model, TQDiTConfig.dynamic(), torch.device("cpu"))
        assert len(seen) == 20
        assert not [name for name in seen if alive[name]() is not None]

    @pytest.mark.parametrize("device_map", ["cpu", "balanced", {"": "cpu"}])
    def test_where_and_in_which_dtype(self, stored, device_map: Any) -> None:
        config = TQDiTConfig.dynamic(4, 8)
        model = kind(WAN).from_pretrained(
            stored(WAN), quantization_config=config, torch_dtype=torch.bfloat16, device_map=device_map
        )
        assert (model.dtype, model.device.type) == (torch.bfloat16, "cuda" if cuda(device_map) else "cpu")
        assert {layer.bits for layer in layers(model).values()} == {4}
        kept = ("scale_shift_table", "time_embedder", "norm2")  # of `_keep_in_fp32_modules`
        for name, value in model.named_parameters():
            if any(part in name.split(".") for part in kept) and not name.endswith("like"):
                assert value.dtype is torch.float32, name
        assert model.proj_out.weight.dtype is torch.bfloat16

    def test_names_that_stay_in_float(self, stored) -> None:
        names = ["blocks.1", "to_out", "ffn.net.2"]
        config = TQDiTConfig("dynamic", modules_to_not_convert=names)
        model: Any = kind(WAN).from_pretrained(stored(WAN), quantization_config=config)
        inner = [f"attn{i}.to_{part}" for i in (1, 2) for part in "qkv"]
        assert set(layers(model)) == {f"blocks.0.{name}" for name in (*inner, "ffn.net.0.proj")}
        assert model.solution.graph.left["blocks.1.attn1.to_q"] == ASKED
        with pytest.raises(InputError, match="has no linear layer 'to_o' to leave in float"):
            untraced_graph(ZOO[WAN].build(), left=["to_o"])
        with pytest.raises(InputError, match="must be a list of names, got 'to_out'"):
            TQDiTConfig("dynamic", modules_to_not_convert="to_out")

    def test_in_a_pipeline(self, stored, tmp_path) -> None:
        float_model = ZOO[WAN].build()
        wan(float_model).save_pretrained(tmp_path / "pipe")
        mapping = PipelineQuantizationConfig(quant_mapping={"transformer": TQDiTConfig("dynamic")})
        pipe = WanPipeline.from_pretrained(tmp_path / "pipe", quantization_config=mapping, **ALONE)
        assert len(layers(pipe.transformer)) == 20
        assert sqnr_db(run(float_model, WAN), run(pipe.transformer, WAN)) > 25

    @pytest.mark.parametrize("bits", [(1, 8), (8, 3), (9, 8)])
    def test_bits_that_are_not_legal(self, bits: tuple[int, int]) -> None:
        with pytest.raises(InputError, match="_bits' must be"):
            TQDiTConfig.dynamic(*bits)

    @pytest.mark.parametrize("config", [TQDiTConfig(), TQDiTConfig("plus"), TQDiTConfig("unknown")])
    def test_what_has_to_be_calibrated(self, stored, config: TQDiTConfig) -> None:
        with pytest.raises(InputError, match=r'has to be calibrated.*or load it with TQDiTConfig\("dynamic"\)'):
            kind(WAN).from_pretrained(stored(WAN), quantization_config=config)

    def test_a_weight_that_is_not_finite(self, tmp_path) -> None:
        model: Any = ZOO[WAN].build()
        model.blocks[1].ffn.net[2].weight.data[0, 0] = torch.nan
        model.save_pretrained(tmp_path / "float")
        with pytest.raises(InputError, match=r"blocks\.1\.ffn\.net\.2\.weight"):
            kind(WAN).from_pretrained(tmp_path / "float", quantization_config=TQDiTConfig("dynamic"))


def cuda(device_map: Any) -> bool:
    return device_map == "balanced" and torch.cuda.is_available()


ALONE: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": None}


def wan(transformer: nn.Module | None, second: nn.Module | None = None) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(scheduler=scheduler, transformer=transformer, transformer_2=second, boundary_ratio=0.5, **ALONE)


@pytest.fixture(scope="module")
def model() -> Any:
    return tqdit.quantize(ZOO[WAN].build(), tqdit.Recipe("dynamic"), calls=[ZOO[WAN].call()])


class TestSaving:
    def test_what_a_class_keeps_in_fp32_is_so_again(self, stored, tmp_path) -> None:
        """The embedder of Wan's times rounds its input to the dtype that it finds in its first layer."""
        half: Any = {"torch_dtype": torch.bfloat16}
        calls = [{**ZOO[WAN].call(), **states(torch.bfloat16)}]
        made = tqdit.quantize(kind(WAN).from_pretrained(stored(WAN), **half), tqdit.Recipe("dynamic"), calls=calls)
        made.save_pretrained(tmp_path / "made")
        loaded = kind(WAN).from_pretrained(tmp_path / "made", **half)
        embedder = loaded.condition_embedder.time_embedder
        assert isinstance(embedder.linear_1, QuantizedLinear)
        assert embedder.linear_1.weight.dtype is torch.float32
        assert {name: layer.like.dtype for name, layer in layers(loaded).items()} == {
            name: layer.like.dtype for name, layer in layers(made).items()
        }
        given = states(torch.bfloat16)
        assert torch.equal(run(loaded, WAN, **given), run(made, WAN, **given))

    def test_a_pipeline_of_two_transformers(self, model, tmp_path) -> None:
        """A pipeline as Wan 2.2's, whose second transformer is for the low noise, is saved and loaded with both."""
        second = tqdit.quantize(ZOO[WAN].build(1), tqdit.Recipe("dynamic"), calls=[ZOO[WAN].call()])
        wan(model, second).save_pretrained(tmp_path / "pipe")
        pipe = WanPipeline.from_pretrained(tmp_path / "pipe", **ALONE)
        assert torch.equal(run(pipe.transformer, WAN), run(model, WAN))
        assert torch.equal(run(pipe.transformer_2, WAN), run(second, WAN))
        assert type(pipe.transformer) is type(model)
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.bfloat16, **ALONE)
        assert again.transformer.dtype is torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_in_another_dtype_and_back(self, model, tmp_path, dtype: torch.dtype) -> None:
        model.save_pretrained(tmp_path / "one")
        first = kind(WAN).from_pretrained(tmp_path / "one", torch_dtype=dtype)
        first.save_pretrained(tmp_path / "two")
        second = kind(WAN).from_pretrained(tmp_path / "two", torch_dtype=dtype)
        assert torch.equal(run(second, WAN, **states(dtype)), run(first, WAN, **states(dtype)))

    @pytest.mark.parametrize("options", [{"variant": "fp16"}, {"safe_serialization": False}, {"push_to_hub": True}])
    def test_what_an_artifact_does_not_have(self, model, tmp_path, options: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="save_pretrained of an integer model does not support"):
            model.save_pretrained(tmp_path, **options)


class TestModule:
    """What code does with any module of torch."""

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, model, twin: Callable[[nn.Module], nn.Module], tmp_path) -> None:
        copied: Any = twin(model)
        assert torch.equal(run(copied, WAN), run(model, WAN))
        copied.save_pretrained(tmp_path)
        assert torch.equal(run(kind(WAN).from_pretrained(tmp_path), WAN), run(model, WAN))

    def test_dtypes_and_devices(self, model) -> None:
        expected, other = run(model, WAN), copy.deepcopy(model)
        assert (other.dtype, other.device.type) == (torch.float32, "cpu")
        for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half()):
            changed = change(copy.deepcopy(model))
            found = run(changed, WAN, **states(changed.dtype))
            assert found.dtype is changed.dtype is not torch.float32
            assert sqnr_db(expected, found.float()) > 25
            assert changed.blocks[0].attn1.to_q.weight.dtype is changed.dtype
            scales = [layer.layer.scale.dtype for layer in layers(changed).values()]
            assert set(scales) == {torch.float32}
        assert torch.equal(run(other.to("cpu"), WAN), expected)

    def test_state_and_sizes(self, model) -> None:
        state = model.state_dict()
        assert model.load_state_dict(state) is not None
        assert model.get_memory_footprint() < 0.4 * ZOO[WAN].build().get_memory_footprint()
        assert not any(parameter.requires_grad for parameter in model.parameters())
        config = {key: value for key, value in ZOO[WAN].build().config.items() if not key.startswith("_")}
        assert {key: model.config[key] for key in config} == config
        with pytest.raises(InputError, match=r"linear_1\.weight' cannot be loaded: the layer has integer weights"):
            model.load_state_dict(ZOO[WAN].build().state_dict(), strict=False)
        with pytest.raises(InputError, match="biases of a quantized layer stay"):
            model.load_state_dict({"blocks.0.attn1.to_q.bias": torch.ones(64)}, strict=False)
        model.load_state_dict({"blocks.0.attn1.to_q.bias": model.blocks[0].attn1.to_q.bias}, strict=False)

    def test_other_code_that_reads_weights(self, model) -> None:
        embedder = model.condition_embedder.time_embedder
        assert isinstance(embedder.linear_1, QuantizedLinear)
        assert next(iter(embedder.parameters())).dtype is torch.float32
        half = copy.deepcopy(model).half()
        assert next(iter(half.condition_embedder.time_embedder.parameters())).dtype is torch.float16
        for attention in (model.blocks[0].attn1, model.blocks[0].attn2):
            with pytest.raises(InputError, match="projections of a quantized model cannot be fused"):
                attention.fuse_projections()

    def test_another_attention_processor(self, model) -> None:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        called = []

        class Watched(WanAttnProcessor):
            def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
                called.append(1)
                return super().__call__(*arguments, **named)

        other = copy.deepcopy(model)
        other.set_attn_processor(Watched())
        assert torch.equal(run(other, WAN), run(model, WAN))
        other.set_attention_backend("native")
        assert torch.equal(run(other, WAN), run(model, WAN))
        assert len(called) == 8
