"""Baselines: their names, what they compute, that torchao is really torchao, and what a denoiser call is."""

import importlib.util

import pytest
import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.speed import baselines, openvino
from tqdit.speed.baselines import (
    FAMILIES,
    DenoiserCall,
    build,
    contenders,
    fuse_projections,
    is_compiled,
    missing,
    weights_of,
)
from tqdit.speed.random_weights import random_float
from tqdit.system.capture import CudaGraphed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@pytest.fixture
def config(tiny_dit) -> dict:
    return {"_class_name": "DiTTransformer2DModel", **tiny_dit(in_channels=4, out_channels=8).config}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """torch.compile that does not compile; the options it was given."""
    given: list[dict] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: given.append(options) or model)
    return given


def test_contenders_by_family_and_by_name() -> None:
    assert contenders(("torchao", "float32")) == {
        "float32-eager": "float32", "float32-compiled": "float32", "torchao-int8": "torchao", "torchao-fp8": "torchao",
    }  # fmt: skip
    assert contenders(("torchao-fp8", "bf16-compiled")) == {"bf16-compiled": "bfloat16", "torchao-fp8": "torchao"}
    assert contenders(("bf16-eager", "bfloat16")) == {"bf16-eager": "bfloat16", "bf16-compiled": "bfloat16"}
    assert list(contenders(("bfloat16",), "cuda")) == ["bf16-eager", "bf16-autotuned"]
    assert list(contenders(("bfloat16",), "cuda", tuned=False)) == ["bf16-eager", "bf16-compiled"]
    assert list(contenders(("bfloat16", "bf16-compiled"), "cuda")) == ["bf16-eager", "bf16-autotuned", "bf16-compiled"]
    assert contenders(()) == {}
    with pytest.raises(InputError, match=r"'float16'.*float32, bfloat16, .*torchao, .*bf16-compiled"):
        contenders(("float32", "float16"))


def test_only_what_is_not_changed_in_place_shares_weights() -> None:
    names = contenders(tuple(FAMILIES))
    changed = ["bf16-blocks", "torchao-int8", "torchao-fp8", "openvino-int8"]
    assert [weights_of(name) for name in names] == ["float32"] * 2 + ["bf16"] * 2 + changed
    assert [name for name in names if not is_compiled(name)] == ["float32-eager", "bf16-eager"]
    shared = {name: weights_of(name, "cuda") for name in contenders(("bfloat16", "bf16-compiled"), "cuda")}
    assert shared == {"bf16-eager": "bf16", "bf16-autotuned": "bf16", "bf16-compiled": "bf16-compiled"}
    assert "tuned on CUDA devices alone" in (missing("bf16-autotuned", CPU) or "")


def test_float32_is_the_float_model(config, eager) -> None:
    built = build(("float32-eager", "float32-compiled"), config, CPU)
    (given,) = eager
    assert (given["fullgraph"], given["dynamic"], given["options"]) == (True, False, {"freezing": True})
    reference = DenoiserCall(random_float(config), config, 4, CPU)(500)
    for module in built.values():
        assert torch.equal(DenoiserCall(module, config, 4, CPU)(500), reference)
    assert built["float32-eager"].model is built["float32-compiled"].model, "the weights are there once"


def test_bfloat16_takes_and_gives_fp32(config) -> None:
    reference = DenoiserCall(random_float(config), config, 4, CPU)(500)
    module = build(("bf16-eager",), config, CPU)["bf16-eager"]
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    output = DenoiserCall(module, config, 4, CPU)(500)
    assert output.dtype is torch.float32
    error = (output - reference).norm() / reference.norm()
    assert 1e-4 < error < 0.1


@needs_torchao
def test_torchao_quantizes_every_linear_layer_once(config, eager) -> None:
    module = build(("torchao-int8",), config, CPU)["torchao-int8"]
    linears = {m for m in module.modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 2 * 7 + 2 + 2, "the embedder's two are shared by the blocks"
    assert {type(m.weight).__module__.partition(".")[0] for m in linears} == {"torchao"}
    assert eager[0]["options"]["force_fuse_int_mm_with_mul"]
    reference = DenoiserCall(random_float(config), config, 4, CPU)(500)
    output = DenoiserCall(module, config, 4, CPU)(500)
    assert 1e-3 < (output - reference).norm() / reference.norm() < 0.1


@needs_torchao
def test_on_a_gpu_torchao_is_compiled_block_by_block(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the final layer, which stays as it is; it asks the embedder of a block, which is quantized."""
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(module))
    for name in ("torchao-int8", "bf16-blocks"):
        compiled.clear()
        model = build((name,), config, CUDA)[name].module.model
        assert compiled == [*model.transformer_blocks, model.transformer_blocks[0].norm1.emb]
        libraries = {
            module: {type(m.weight).__module__.partition(".")[0] for m in module.modules() if isinstance(m, nn.Linear)}
            for module in (model.transformer_blocks, model.proj_out_1, model.proj_out_2)
        }
        blocks, *others = libraries.values()
        assert blocks == {"torchao" if name == "torchao-int8" else "torch"}
        assert others == [{"torch"}] * 2
    assert "CUDA" in (missing("bf16-blocks", CPU) or "")


def test_torchao_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'torchao" in (missing("torchao-int8", CPU) or "")
    assert "pip install 'torchao" in (missing("torchao-fp8", CPU) or "")
    assert missing("float32-eager", CPU) is None


def test_openvino_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("openvino-int8", CUDA) == "OpenVINO is timed on the CPU alone"
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None if name == "nncf" else object())
    reason = missing("openvino-int8", CPU) or ""
    assert "pip install" in reason
    assert "openvino" in reason


def test_openvino_gets_the_tensors_of_a_call_by_position(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for each shape; here what is compiled runs in torch."""
    shapes = []

    def compiled(model, inputs):
        shapes.append([tuple(x.shape) for x in inputs])
        return lambda arrays: [model(*map(torch.from_numpy, arrays)).detach().numpy()]

    monkeypatch.setattr(openvino, "compiled", compiled)
    module = build(("openvino-int8",), config, CPU)["openvino-int8"]
    for batch in (2, 2, 4):
        given = DenoiserCall(module, config, batch, CPU)
        want = DenoiserCall(module.model, config, batch, CPU)(500)
        torch.testing.assert_close(given(500), want, rtol=0, atol=0)
    assert [shape[0][0] for shape in shapes] == [2, 4]
    assert [len(shape) for shape in shapes] == [3, 3]  # latents, timestep and classes


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs openvino and nncf")
def test_openvino_quantizes_linear_layers(config, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is near the float model's but no float model's, and nothing is printed."""
    module = build(("openvino-int8",), config, CPU)["openvino-int8"]
    want = DenoiserCall(module.model, config, 2, CPU)(500)
    error = ((DenoiserCall(module, config, 2, CPU)(500) - want).norm() / want.norm()).item()
    assert 1e-4 < error < 0.5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("device", "capability", "reason"),
    [
        (CPU, None, "capability 8.9; cpu has none"),
        (CUDA, (8, 0), "capability 8.9; cuda has 8.0"),
        (CUDA, (8, 9), None),
        (CUDA, (9, 0), None),
        (CUDA, (10, 0), None),
    ],
)
def test_fp8_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch, device, capability, reason) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = missing("torchao-fp8", device)
    assert found is None if reason is None else reason in (found or "")
    assert missing("torchao-int8", device) is None


def test_fused_projections_are_the_same_model(config) -> None:
    model = random_float(config)
    expected = DenoiserCall(baselines.Baseline(model, model), config, 4, CPU)(500)
    fuse_projections(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert not any("to_q." in f"{name}." or "to_k" in name or "to_v" in name for name in linears)
    assert sum("to_qkv" in name for name in linears) == 2
    assert not any(parameter.requires_grad for parameter in model.parameters())
    actual = DenoiserCall(baselines.Baseline(model, model), config, 4, CPU)(500)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_on_a_gpu_compiled_baselines_are_tuned_graphs_of_fused_models(config, eager, monkeypatch) -> None:
    """Built as if for a GPU; nothing is run."""
    monkeypatch.setattr(nn.Module, "to", lambda model, *_: model)
    built = build(("bf16-eager", "bf16-autotuned"), config, CUDA)
    assert isinstance(built["bf16-autotuned"], CudaGraphed)
    assert not isinstance(built["bf16-eager"], CudaGraphed)
    (given,) = eager
    assert given["options"] == {"max_autotune": True, "coordinate_descent_tuning": True}
    assert hasattr(built["bf16-eager"].model.transformer_blocks[0].attn1, "to_qkv")
    assert built["bf16-autotuned"].config["num_layers"] == 2


def test_without_tuning_blocks_are_compiled_with_torch_s_own_choices(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as if for a GPU; nothing is run."""
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)
    given: list[dict] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: given.append(options))
    built = build(("bf16-compiled",), config, CUDA)["bf16-compiled"]
    assert isinstance(built, CudaGraphed)
    assert given == [{"dynamic": False, "fullgraph": True, "options": {}}] * 3, "two blocks and their embedder"


def test_tuning_options_are_known_to_torch() -> None:
    """torch.compile refuses unknown options, on the GPU too late."""
    from torch._inductor import list_mode_options, list_options

    known = set(list_options())
    for options in (*baselines.COMPILE_OPTIONS.values(), baselines.AUTOTUNED, baselines.TORCHAO_OPTIONS):
        assert set(options) <= known
    assert dict(baselines.AUTOTUNED) == list_mode_options("max-autotune-no-cudagraphs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16-compiled", "bf16-autotuned", "torchao-int8", "torchao-fp8"])
def test_every_baseline_runs_on_a_gpu(config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At two batch sizes in turn, so that each graph is replayed after the other; fp8 and int8 are coarse.

    torch's product of int8 needs more than 16 rows, and adaLN has a row for each sample.

    Products are chosen among cuBLAS's own: to time a hundred candidates of a tiny layer takes minutes.
    """
    monkeypatch.setattr(baselines, "AUTOTUNED", {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"})
    monkeypatch.setattr(baselines, "TORCHAO_OPTIONS", {"force_fuse_int_mm_with_mul": True})
    if reason := missing(name, CUDA):
        pytest.skip(reason)
    module = build((name,), config, CUDA)[name]
    reference = baselines.Baseline(model := random_float(config).cuda(), model)
    for batch, t in ((32, 500), (20, 20), (32, 900), (20, 700)):
        expected = DenoiserCall(reference, config, batch, CUDA)(t)
        actual = DenoiserCall(module, config, batch, CUDA)(t)
        assert (actual - expected).norm() / expected.norm() < (0.15 if name.startswith("torchao") else 0.05)


@pytest.mark.parametrize(("batch", "null"), [(1, 0), (2, 1), (5, 2), (16, 8)])
def test_denoiser_call(config, batch: int, null: int) -> None:
    """Half of the labels are the null class; t is the argument; inputs stay the same."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x, timestep, class_labels, return_dict):
            seen.append((x, timestep, class_labels, return_dict))
            return (x * 2,)

    call = DenoiserCall(Spy(), config, batch, CPU)
    output = call(7)
    call(8)
    (x, t, labels, return_dict), (x2, t2, labels2, _) = seen
    assert x.shape == (batch, 4, 8, 8)
    assert torch.equal(output, 2 * x)
    assert (labels == config["num_embeds_ada_norm"]).sum() == null
    assert labels.max() <= config["num_embeds_ada_norm"]
    assert t.tolist() == [7] * batch
    assert t2.tolist() == [8] * batch
    assert (x2 is x, labels2 is labels, return_dict) == (True, True, False)
    assert x.is_inference(), "as in the sampler: torch.compile would compile again"
