"""LoRA through peft on integer models: an adapter trained on the float model serves the quantized one."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.layers.adapters import AdapterSlot
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.spec import Grid, Solution

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
BACKENDS = ["cpu", "reference", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = pytest.param("triton", marks=[] if DEVICE == "cuda" else pytest.mark.long)  # takes a while


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


@pytest.mark.parametrize("backend", ["cpu", "reference", INTERPRETED])
def test_an_adapter_of_the_float_model_serves(solved, model_inputs, adapter, adapted_float, backend: str) -> None:
    expected = run(adapted_float, model_inputs)
    model = converted(solved("plus"), backend)
    alone = sqnr_db(expected, run(model, model_inputs))
    found = sqnr_db(expected, run(peft.PeftModel.from_pretrained(model, adapter), model_inputs))
    assert found > alone + 15, (alone, found)


FACTORS = torch.linspace(-2, 2, 128).exp2()


def with_factors(model: nn.Module, solution: Solution) -> Solution:
    """A solution whose layers after GELU have factors: W / channels in 8 bits, beside a step for each row."""
    params, codes = dict(solution.params), dict(solution.codes)
    for i in range(2):
        source, weight = f"transformer_blocks.{i}.ff.fc2_input", f"transformer_blocks.{i}.ff.net.2.weight"
        assert params[source].spec.grid is Grid.ROW
        params[source] = replace(params[source], channels=FACTORS)
        values = model.state_dict()[weight] / FACTORS
        scale = values.abs().amax(1) / 127
        params[weight] = replace(params[weight], scale=scale[None])
        codes[weight] = (values / scale[:, None]).round().to(torch.int8)
    return replace(solution, params=params, codes=codes)


def test_an_adapter_reads_a_layers_own_input_where_channels_have_factors(
    model, solved, model_inputs, adapter, adapted_float
) -> None:
    """x, not channels x, which only the layer's weight is made for."""
    expected = run(adapted_float, model_inputs)
    integer = convert(with_factors(model, solved("plus", gelu_grid="row")), "reference")
    assert sqnr_db(run(model, model_inputs), run(integer, model_inputs)) > 30
    alone = sqnr_db(expected, run(integer, model_inputs))
    found = sqnr_db(expected, run(peft.PeftModel.from_pretrained(integer, adapter), model_inputs))
    assert found > alone + 15, (alone, found)


@pytest.mark.parametrize("backend", ["cpu", "reference", INTERPRETED])
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


MERGES = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter, safely": lambda model: model.merge_adapter(safe_merge=True),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload, safely": lambda model: model.merge_and_unload(safe_merge=True),
}


@pytest.mark.parametrize("merge", MERGES)
def test_merging_into_integers_is_refused(solved, model_inputs, adapter, merge: str) -> None:
    """And nothing has changed then: peft's safe merge would write into a copy, and drop the adapter in silence."""
    adapted = peft.PeftModel.from_pretrained(convert(solved("plus")), adapter)
    expected = run(adapted, model_inputs)
    with pytest.raises(InputError, match="integer layers have no weights that an adapter could be merged into"):
        MERGES[merge](adapted)
    assert torch.equal(run(adapted, model_inputs), expected)


SETTINGS = {
    "rsLoRA": {"use_rslora": True},
    "biases of its own": {"lora_bias": True},
    "ranks and alphas by layer": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 16}},
    "one block": {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}


def trained(folder: Path, float_model: nn.Module, config: object, change: float = 0.3) -> Path:
    """An adapter of a float model as peft saves it, everything in it trained."""
    torch.manual_seed(0)
    model = peft.get_peft_model(float_model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                lora = name.endswith("default.weight")
                parameter.mul_(0.5).add_(torch.randn_like(parameter) * 0.03) if lora else parameter.add_(change)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_plain_lora_are_applied(solved, model_inputs, tiny_dit, tmp_path, setting: str) -> None:
    options = {"r": 4, "target_modules": ["to_q", "to_v"], "init_lora_weights": False, **SETTINGS[setting]}
    folder = trained(tmp_path, tiny_dit(), peft.LoraConfig(**options))
    expected = run(peft.PeftModel.from_pretrained(tiny_dit(), folder), model_inputs)
    model = convert(solved("plus"))
    alone = sqnr_db(expected, run(model, model_inputs))
    found = sqnr_db(expected, run(peft.PeftModel.from_pretrained(model, folder), model_inputs))
    assert found > max(25, alone + 4), (alone, found)


TARGET = {"target_modules": ["to_q"]}
REFUSED = {
    "biases of its layers": ("LoraConfig", {"bias": "lora_only"}, r"no place for '.*attn1\.to_q\.bias'"),
    "all biases": ("LoraConfig", {"bias": "all"}, r"no place for 'pos_embed\.proj\.bias'"),
    "a layer outside": ("LoraConfig", {"modules_to_save": ["proj_out_2"]}, "ModulesToSaveWrapper for 'proj_out_2'"),
    "a layer inside": ("LoraConfig", {"modules_to_save": ["to_k"]}, "for 'to_k': peft.*ModulesToSaveWrapper"),
    "adaLN": ("LoraConfig", {"modules_to_save": ["norm1.linear"]}, "for 'linear': peft.*ModulesToSaveWrapper"),
    "the class table": ("LoraConfig", {"modules_to_save": ["embedding_table"]}, "ModulesToSaveWrapper for 'embed"),
    "a block": ("LoraConfig", {"target_modules": ["1.attn1.to_q"], "modules_to_save": ["transformer_blocks.0"]},
                "ModulesToSaveWrapper for '0'"),
    "some classes": ("LoraConfig", {"trainable_token_indices": {"embedding_table": [1]}}, "TrainableTokensWrapper for"),
    "LoRA of the class table": ("LoraConfig", {"target_modules": ["to_q", "embedding_table"]}, "Embedding for 'embed"),
    "LoRA of a parameter": ("LoraConfig", {"target_parameters": ["to_k.weight"]}, "no place for '.*attn1.to_k.lora_A"),
    "DoRA": ("LoraConfig", {"use_dora": True}, "as merging, DoRA and PiSSA need"),
    "PiSSA": ("LoraConfig", {"init_lora_weights": "pissa"}, "as merging, DoRA and PiSSA need"),
    "IA3": ("IA3Config", {"feedforward_modules": []}, "for 'to_q': peft.tuners.ia3"),
    "LoHa": ("LoHaConfig", {}, "for 'to_q': peft.tuners.loha"),
    "LoKr": ("LoKrConfig", {}, "for 'to_q': peft.tuners.lokr"),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}, "for 'to_q': peft.tuners.oft"),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9}, "for 'to_q': peft.tuners.adalora"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:target_parameters")
@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_has_beside_plain_lora_is_refused_by_name(
    solved, model_inputs, tiny_dit, tmp_path, case: str
) -> None:
    """peft itself would drop it in silence, or fail with a KeyError."""
    cls, options, message = REFUSED[case]
    folder = trained(tmp_path, tiny_dit(), getattr(peft, cls)(**TARGET | options))
    model = convert(solved("plus", ends="codes"))
    with pytest.raises(InputError, match=message) as caught:
        peft.PeftModel.from_pretrained(model, folder)
    assert "\n" not in str(caught.value)


def test_biases_that_were_not_trained_are_no_obstacle(solved, model_inputs, tiny_dit, tmp_path) -> None:
    config = peft.LoraConfig(**TARGET, bias="all", init_lora_weights=False)
    folder = trained(tmp_path, tiny_dit(), config, change=0.0)
    expected = run(peft.PeftModel.from_pretrained(tiny_dit(), folder), model_inputs)
    assert sqnr_db(expected, run(peft.PeftModel.from_pretrained(convert(solved("plus")), folder), model_inputs)) > 25


def test_a_second_adapter_of_another_kind(solved, model_inputs, adapter) -> None:
    """peft changes the first one's layers in place; the call says so at the latest."""
    adapted = peft.PeftModel.from_pretrained(convert(solved("plus")), adapter)
    with pytest.raises(InputError, match="DoRA"):
        adapted.add_adapter("second", peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True))


def test_integers_are_not_trained(solved) -> None:
    """peft leaves all but the adapter without gradients, and integers could not have any."""
    model = convert(solved("plus", ends="codes"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(**TARGET))
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    for part in (model, model.transformer_blocks[0], model.proj_out_2, model.proj_out_2.layer):
        with pytest.raises(InputError, match="cannot be trained"):
            part.requires_grad_()
        assert part.requires_grad_(False) is part


@pytest.mark.parametrize("target", ["norm1.linear", "linear_1", "proj_out_2"])
def test_layers_without_a_slot_are_refused_by_peft(solved, target: str) -> None:
    model = convert(solved("plus", ends="codes"))
    with pytest.raises(ValueError, match="not supported"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", target]), model)


@pytest.mark.parametrize("target", ["proj_out_2", "pos_embed.proj"])
def test_an_adapter_of_an_end_in_float_is_refused_by_name(solved, target: str) -> None:
    """peft would wrap it, as every layer in float; nothing would run the adapter."""
    model = convert(solved("plus"), "reference")
    with pytest.raises(InputError, match=f"for '{target.rpartition('.')[2]}'; on an integer model only plain LoRA"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", target]), model)


def test_a_slot_is_no_weight(solved) -> None:
    """It takes no memory and is in no checkpoint."""
    model = convert(solved("plus"))
    slots = [module for module in model.modules() if isinstance(module, AdapterSlot)]
    assert len(slots) == 2 * len(TARGETS)
    assert {slot.anchor.numel() for slot in slots} == {1}
    assert not [name for name in model.state_dict() if "to_q" in name or "net" in name]
