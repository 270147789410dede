"""LoRA through peft on integer models: an adapter trained on the float model serves the quantized one."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tqdit.convert import convert
from tqdit.errors import InputError
from tqdit.evaluation.metrics import sqnr_db
from tqdit.layers.adapters import AdapterSlot

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
BACKENDS = ["cpu", "reference", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(iter(model.buffers())).device
    with torch.inference_mode():
        return model(**{name: x.to(device) for name, x in inputs.items()}).sample.cpu()


def converted(solution, backend: str) -> nn.Module:
    return convert(solution, backend, DEVICE if backend == "triton" else "cpu")


@pytest.fixture(scope="module")
def adapter(tiny_dit, tmp_path_factory) -> Path:
    """A LoRA of the float model, with effects of its own on every layer, as peft saves it."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_dit(), config)
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapted_float(tiny_dit, adapter) -> nn.Module:
    return peft.PeftModel.from_pretrained(tiny_dit(), adapter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_of_the_float_model_serves(solved, model_inputs, adapter, adapted_float, backend: str) -> None:
    expected = run(adapted_float, model_inputs)
    model = converted(solved("plus"), backend)
    alone = sqnr_db(expected, run(model, model_inputs))
    found = sqnr_db(expected, run(peft.PeftModel.from_pretrained(model, adapter), model_inputs))
    assert found > alone + 15, (alone, found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_of_zeros_changes_nothing(solved, model_inputs, backend: str) -> None:
    """The codes are those of the fused kernels, but for values that fall on the other side of a boundary."""
    model = converted(solved("plus", "w6a6"), backend)
    expected = run(model, model_inputs)
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    found = run(peft.inject_adapter_in_model(config, model), model_inputs)
    assert sqnr_db(expected, found) > 45


def test_without_adapters_blocks_run_fused(solved, model_inputs) -> None:
    model = convert(solved("plus"))
    assert not any(block.adapted for block in model.transformer_blocks)
    config = peft.LoraConfig(r=4, target_modules="transformer_blocks.1.ff.net.2")
    peft.inject_adapter_in_model(config, model)
    assert [block.adapted for block in model.transformer_blocks] == [False, True]


def test_adapters_stay_when_a_model_is_copied_or_converted_again(solved, model_inputs, adapter) -> None:
    model = convert(solved("plus"))
    plain = run(model, model_inputs)
    model = peft.PeftModel.from_pretrained(model, adapter).base_model.model
    expected = run(model, model_inputs)
    assert not torch.equal(expected, plain)
    twin = copy.deepcopy(model)
    twin.prepared_for = "another"
    del model
    assert torch.equal(run(twin, model_inputs), expected)
    assert twin.prepared_for == "cpu"


def test_adapters_can_be_switched_off(solved, model_inputs, adapter) -> None:
    model = convert(solved("plus"), "reference")
    plain = run(model, model_inputs)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    with adapted.disable_adapter():
        assert torch.equal(run(adapted, model_inputs), plain)
    assert torch.equal(run(adapted.unload(), model_inputs), plain)
    assert not any(block.adapted for block in model.transformer_blocks)


def test_merging_into_integers_is_refused(solved, adapter) -> None:
    adapted = peft.PeftModel.from_pretrained(convert(solved("plus")), adapter)
    with pytest.raises(InputError, match="integer layers have no weights"):
        adapted.merge_adapter()


@pytest.mark.parametrize(
    "config",
    [{"cls": "LoraConfig", "r": 4, "use_dora": True, "target_modules": ["to_q"]},
     {"cls": "IA3Config", "target_modules": ["to_q"], "feedforward_modules": []}],
)  # fmt: skip
def test_other_adapters_are_refused(solved, model_inputs, config: dict) -> None:
    """What they add depends on the layer's own weight or output."""
    settings = {key: value for key, value in config.items() if key != "cls"}
    adapted = peft.get_peft_model(convert(solved("plus")), getattr(peft, config["cls"])(**settings))
    with pytest.raises(InputError, match="only plain LoRA"):
        run(adapted, model_inputs)


@pytest.mark.parametrize("target", ["norm1.linear", "linear_1", "proj_out_2"])
def test_layers_without_a_slot_are_refused_by_peft(solved, target: str) -> None:
    with pytest.raises(ValueError, match="not supported"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", target]), convert(solved("plus")))


def test_a_slot_is_no_weight(solved) -> None:
    """It takes no memory and is in no checkpoint."""
    model = convert(solved("plus"))
    slots = [module for module in model.modules() if isinstance(module, AdapterSlot)]
    assert len(slots) == 2 * len(TARGETS)
    assert {slot.anchor.numel() for slot in slots} == {1}
    assert not [name for name in model.state_dict() if "to_q" in name or "net" in name]
