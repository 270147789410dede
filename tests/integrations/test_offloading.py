"""Offloading by accelerate and diffusers: codes move, and the output stays the same bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import tqdit
from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.runtime.convert import convert

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = {"execution_device": "cpu"}
WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, **CPU),
    "cpu, buffers": lambda model, _: accelerate.cpu_offload(model, **CPU, offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, **CPU),
    "disk, buffers": lambda model, folder: accelerate.disk_offload(model, folder, **CPU, offload_buffers=True),
    "dispatched": lambda model, folder: accelerate.dispatch_model(
        model, {name: "disk" for name, _ in model.named_children()}, "cpu", offload_dir=folder
    ),
    "whole blocks": lambda model, _: accelerate.cpu_offload(
        model, **CPU, preload_module_classes=model._no_split_modules
    ),
}


def run(model: nn.Module, inputs: dict[str, torch.Tensor], device: str = "cpu") -> torch.Tensor:
    with torch.inference_mode():
        return model(**{name: x.to(device) for name, x in inputs.items()}).sample


def hooked(model: nn.Module) -> nn.Module:
    """Give every module a hook that does nothing."""
    for module in list(model.modules()):
        add_hook_to_module(module, ModelHook())
    return model


def away(model: nn.Module) -> float:
    """The share of a model's bytes that are on no device."""
    tensors = [x for name, x in model.state_dict().items() if "extra_state" not in name]
    return sum(x.nbytes for x in tensors if x.is_meta) / sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_same_output(solved, model_inputs, tmp_path, way: str, backend: str) -> None:
    model = convert(solved("plus"), backend)
    expected = run(model, model_inputs)
    model = WAYS[way](model, tmp_path)
    assert away(model) > 0.95
    for _ in range(2):
        assert torch.equal(run(model, model_inputs), expected)
        assert away(model) > 0.95
    remove_hook_from_module(model, recurse=True)
    assert away(model) == 0
    assert torch.equal(run(model, model_inputs), expected)


@pytest.mark.parametrize("backend", ["triton", "triton-packed"])
def test_codes_in_the_layout_of_a_gpu(solved, backend: str) -> None:
    solution = solved("plus", "w4a8")
    model = accelerate.cpu_offload(convert(solution, backend), **CPU, offload_buffers=True)
    assert away(model) > 0.95
    assert all(torch.equal(codes, solution.codes[name]) for name, codes in model.solution.codes.items())


def test_with_an_adapter_no_second_copy_stays(solved, model_inputs) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, convert(solved("plus")))
    expected = run(model, model_inputs)
    for block in model.transformer_blocks:
        block.slots._codes.clear()
    accelerate.cpu_offload(model, **CPU)
    assert torch.equal(run(model, model_inputs), expected)
    assert not [codes for block in model.transformer_blocks for codes in block.slots._codes.values()]


def test_saving_an_offloaded_model(solved, tmp_path) -> None:
    convert(solved("plus")).save_pretrained(tmp_path / "whole")
    accelerate.cpu_offload(convert(solved("plus")), **CPU).save_pretrained(tmp_path / "offloaded")
    assert artifact.read(tmp_path / "offloaded").provenance == artifact.read(tmp_path / "whole").provenance
    files = [(tmp_path / name / tqdit.system.files.WEIGHTS).read_bytes() for name in ("whole", "offloaded")]
    assert files[0] == files[1]


def test_loading_into_an_offloaded_model_is_refused(solved) -> None:
    state = convert(solved("plus")).state_dict()
    model = accelerate.cpu_offload(convert(solved("plus")), **CPU)
    with pytest.raises(InputError, match="is offloaded; remove accelerate's hooks"):
        model.load_state_dict(state)


def test_codes_of_blocks_that_are_away_as_a_whole(solved) -> None:
    model = WAYS["whole blocks"](convert(solved("plus")), Path())
    with pytest.raises(InputError, match=r"the tensors of '.*attn1\.to_q\.weight' are offloaded"):
        model.solution.codes["transformer_blocks.0.attn1.to_q.weight"]


def test_offloaded_models_are_not_captured(solved) -> None:
    """A graph would read memory that is given back after each part."""
    model = convert(solved("plus"))
    blocks = model.transformer_blocks
    assert not model.runtime._changing(blocks)
    accelerate.cpu_offload(model, **CPU)
    assert model.runtime._changing(blocks)
    remove_hook_from_module(model, recurse=True)
    assert not model.runtime._changing(blocks)


def test_auto_device_maps(solved) -> None:
    model = convert(solved("plus"))
    sizes = {"cpu": 10**9}
    assert accelerate.infer_auto_device_map(model, sizes, model._no_split_modules) == {"": "cpu"}


def test_hooks_that_do_nothing(solved, model_inputs) -> None:
    model = convert(solved("plus"))
    expected = run(model, model_inputs)
    assert torch.equal(run(hooked(model), model_inputs), expected)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("prepared", ["cpu", "cuda"])
@pytest.mark.parametrize("buffers", [False, True])
def test_on_a_gpu(solved, model_inputs, prepared: str, buffers: bool) -> None:
    """A model that was laid out for the CPU is laid out anew when it is first called, and stays offloaded.

    A layer with a hook has to be called, so torch computes the first and the last layer and the embedder, as in a
    model whose hooks do nothing. The kernels that else take their place round the last bits of floats differently.
    """
    expected = run(hooked(convert(solved("plus"), device="cuda")), model_inputs, "cuda")
    fused = run(convert(solved("plus"), device="cuda"), model_inputs, "cuda")
    assert (fused - expected).norm() <= 1e-3 * expected.norm()
    model: Any = convert(solved("plus"), device=prepared).to("cpu")
    accelerate.cpu_offload(model, torch.device("cuda", 0), offload_buffers=buffers)
    for _ in range(3):
        assert torch.equal(run(model, model_inputs, "cuda"), expected)
        assert away(model) > 0.95
    assert model.quantization_backend == "triton"
    assert run(model, model_inputs).device.type == "cpu"


@pytest.mark.parametrize("buffers", [False, True])
def test_laid_out_anew_for_another_kind_of_device(solved, model_inputs, buffers: bool) -> None:
    """As where a model of the CPU is first called on a GPU: it stays offloaded, and that first call is right."""
    model: Any = convert(solved("plus"))
    expected, layers = run(model, model_inputs), model.transformer_blocks
    accelerate.cpu_offload(model, **CPU, offload_buffers=buffers)
    model.prepared_for = "another"
    for _ in range(2):
        assert torch.equal(run(model, model_inputs), expected)
        assert away(model) > 0.95
    assert model.prepared_for == "cpu"
    assert model.transformer_blocks is not layers


def test_dispatched_to_several_devices_and_laid_out_for_another(solved, model_inputs) -> None:
    model: Any = accelerate.cpu_offload(convert(solved("plus")), **CPU)
    model.prepared_for, model.hf_device_map = "another", {"transformer_blocks.0": 0, "transformer_blocks.1": 1}
    with pytest.raises(InputError, match="has to be loaded on cpu first"):
        run(model, model_inputs)
