"""Traced artifacts and calls that do not fit: one clear `InputError`, and models left as they were."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO

import tqdit
from tqdit.architectures.untraced import untraced_graph
from tqdit.artifact.tensors import MANIFEST_TENSOR
from tqdit.errors import InputError
from tqdit.layers.quantized import QuantizedLinear
from tqdit.runtime.convert import convert
from tqdit.system.files import CONFIG, WEIGHTS

WAN = "WanTransformer3DModel"


def call(**changes: Any) -> dict[str, Any]:
    return {**ZOO[WAN].call(), **changes, "return_dict": False}


@pytest.fixture(scope="module")
def timed() -> nn.Module:
    """A model with static scales of two time groups."""
    calls = [{**ZOO[WAN].call(i), "timestep": torch.full((2,), t)} for i, t in enumerate((100.0, 400.0, 600.0, 900.0))]
    recipe = tqdit.Recipe(
        "plus", input_grid="uniform", groups=2, samples=2, rounds=0, hessian="none", fallback=0.0, rotation=0,
        rounding="nearest",
    )  # fmt: skip
    return tqdit.quantize(ZOO[WAN].build(), recipe, calls=calls)


@pytest.fixture
def folder(timed, tmp_path) -> Path:
    timed.save_pretrained(tmp_path / "artifact")
    return tmp_path / "artifact"


def load(folder: Path) -> nn.Module:
    return diffusers.WanTransformer3DModel.from_pretrained(folder)


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of an artifact, with hashes that fit."""
    tensors = load_file(folder / WEIGHTS)
    manifest = json.loads(tensors[MANIFEST_TENSOR].numpy().tobytes())
    change(manifest)
    data = json.dumps(manifest).encode()
    tensors[MANIFEST_TENSOR] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"]["manifest_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))


def _renamed(manifest: dict[str, Any]) -> None:
    """An artifact is refused by the name of a layer that diffusers has renamed since."""
    text = json.dumps(manifest).replace("blocks.0.ffn.net.2", "blocks.0.ffn.net.3")
    manifest.clear()
    manifest.update(json.loads(text))


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no blocks": (lambda m: m["graph"].update(blocks=[]), r"'graph\.blocks' is wrong"),
    "a role": (lambda m: m["graph"]["blocks"][0]["matmuls"][0]["source"].update(role="key"), r"role' is wrong"),
    "a field": (lambda m: m["graph"].update(more=1), r"'graph\.more' is wrong"),
    "a layer": (lambda m: m["graph"]["outside"].append("nowhere"), "layer 'nowhere', which the model does not have"),
    "a layer twice": (lambda m: m["graph"]["outside"].append(m["graph"]["outside"][0]), "twice"),
    "the time": (lambda m: m["graph"].update(timestep="sigma"), "forward has no argument 'sigma'"),
    "the model as the time": (lambda m: m["graph"].update(timestep="self"), "forward has no argument 'self'"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_graph_that_was_forged(folder, case: str) -> None:
    change, message = FORGED[case]
    forge(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_texts_of_a_forged_artifact_are_printable(folder) -> None:
    """They are shown in terminals and on pages."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["notes"] = {"\x1b[2Ja": "b\x1b[31m\n"}
        manifest["graph"]["left"]["patch_embedding"] = "\x1b]0;c\x07"
        manifest["graph"]["blocks"][0]["matmuls"][0]["source"]["feed"] = "d\r"

    forge(folder, change)
    solution = load(folder).solution
    assert solution.notes == {r"\x1b[2Ja": r"b\x1b[31m\n"}
    assert solution.graph.left["patch_embedding"] == r"\x1b]0;c\x07"
    assert solution.graph.blocks[0].matmuls[0].source.feed == r"d\r"


def test_a_rotation_in_a_format_that_has_none(folder) -> None:
    def change(manifest: dict[str, Any]) -> None:
        next(site for site in manifest["sites"] if site["role"] == "input")["rotation"] = 128

    forge(folder, change)
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"]["format_version"] = 4
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="has a rotation, which formats before 5 do not have"):
        load(folder)


def test_a_layer_that_diffusers_renamed(folder) -> None:
    tensors = load_file(folder / WEIGHTS)
    old, new = "blocks.0.ffn.net.2", "blocks.0.ffn.net.3"
    save_file({name.replace(old, new): x for name, x in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    forge(folder, _renamed)
    with pytest.raises(InputError, match=r"(no value for|no place for|has) .*'blocks\.0\.ffn\.net\.[23]\.bias'"):
        load(folder)


def test_a_class_that_diffusers_does_not_have(timed) -> None:
    config = {**timed.solution.model_config, "_class_name": "WanTransformer4DModel"}
    with pytest.raises(
        InputError, match="no model class 'WanTransformer4DModel'; did you mean 'WanTransformer3DModel'"
    ):
        convert(replace(timed.solution, model_config=config))


def test_calls_and_their_times(timed) -> None:
    with torch.no_grad():
        expected = timed(**call())[0]
        by_position = {key: value for key, value in call().items() if key not in ("hidden_states", "timestep")}
        assert torch.equal(timed(call()["hidden_states"], call()["timestep"], **by_position)[0], expected)
    without = {key: value for key, value in call().items() if key != "timestep"}
    with pytest.raises(InputError, match="the call has no 'timestep', which the time groups of the model are of"):
        timed(**without)
    with pytest.raises(InputError, match=r"timestep -1\.0 is outside"):
        timed(**call(timestep=torch.full((2,), -1.0)))
    assert torch.equal(timed(**call())[0], expected)


def test_the_groups_of_mixed_times(timed) -> None:
    both = timed(**call(timestep=torch.tensor([100.0, 900.0])))[0]
    for index, t in enumerate((100.0, 900.0)):
        alone = timed(**call(timestep=torch.full((2,), t)))[0]
        assert torch.allclose(both[index], alone[index], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_numbers_that_layers_do_not_take(timed, dtype: torch.dtype) -> None:
    states = call()["encoder_hidden_states"].to(dtype)
    with pytest.raises(InputError, match=f"inputs in float32, float16 or bfloat16 was given .* of {dtype}"):
        timed(**call(encoder_hidden_states=states))


def test_a_model_that_is_quantized_already(timed) -> None:
    with pytest.raises(InputError, match="already quantized; give the float model"):
        tqdit.quantize(timed, tqdit.Recipe("dynamic"))


def test_a_float_model_with_an_adapter() -> None:
    model = ZOO[WAN].build()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for calls in (None, [call()]):
        with pytest.raises(InputError, match=r"has an adapter on 'blocks\.0\.attn1\.to_q'; fuse adapters and unload"):
            tqdit.quantize(model, tqdit.Recipe("dynamic"), calls=calls)


def test_a_float_model_that_is_offloaded() -> None:
    model = ZOO[WAN].build()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(InputError, match=r"tensor '.*' of the model is offloaded; remove accelerate's hooks first"):
        tqdit.quantize(model, tqdit.Recipe("dynamic"))


def test_a_float_model_of_another_quantization() -> None:
    model = ZOO[WAN].build()
    model.register_to_config(quantization_config={"quant_method": "torchao"})
    with pytest.raises(InputError, match="already quantized; give the float model"):
        tqdit.quantize(model, tqdit.Recipe("dynamic"))


def test_a_model_without_repeated_blocks() -> None:
    with pytest.raises(InputError, match=r"has no linear layer of .* in repeated blocks"):
        untraced_graph(nn.Sequential(nn.Linear(512, 512)))


def test_layers_are_left_as_a_failed_load_found_them(folder) -> None:
    """A second load is not disturbed by a first one that failed."""
    whole = (folder / WEIGHTS).read_bytes()
    forge(folder, FORGED["a layer"][0])
    with pytest.raises(InputError):
        load(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / WEIGHTS).write_bytes(whole)
    manifest = load_file(folder / WEIGHTS)[MANIFEST_TENSOR].numpy().tobytes()
    config["quantization_config"]["manifest_sha256"] = hashlib.sha256(manifest).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))
    assert [module for module in load(folder).modules() if isinstance(module, QuantizedLinear)]


def test_two_threads_on_the_grid_of_rows() -> None:
    import threading

    model = tqdit.quantize(ZOO[WAN].build(), tqdit.Recipe("dynamic"), calls=[ZOO[WAN].call()])
    calls = [{**ZOO[WAN].call(seed), "return_dict": False} for seed in range(2)]
    expected = [copy.deepcopy(model)(**each)[0] for each in calls]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            if not torch.equal(model(**calls[index])[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
