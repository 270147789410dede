"""State dicts of integer models: their own, or none at all; never a mixture of two artifacts."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tqdit.backends import onednn, panels
from tqdit.backends.onednn import PackedLinear
from tqdit.errors import InputError
from tqdit.ops.schema import WeightParams
from tqdit.runtime.convert import convert
from tqdit.spec import Grid, GridParams
from tqdit.timegroups import TimeGroups

BACKENDS = ["cpu", "reference", "triton", "triton-packed"]


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).sample


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("assign", [False, True])
def test_its_own_state_is_loaded(solved, backend: str, assign: bool) -> None:
    state = convert(solved("plus"), backend).state_dict()
    result = convert(solved("plus"), backend).load_state_dict(through_a_file(state), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []


def test_copies_and_pickles_run_alike(solved, model_inputs) -> None:
    model = convert(solved("plus"))
    expected = run(model, model_inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(model.state_dict())
        assert torch.equal(run(twin, model_inputs), expected)


def with_other_scales(params: GridParams) -> GridParams:
    """Other parameters of a site, but for softmax rows: there is one step for them."""
    return params if params.spec.grid is Grid.SOFTMAX_ROW else replace(params, scale=params.scale * 1.5)


Change = Callable[[Any], Any]
OTHERS: dict[str, Change] = {
    "other weights": lambda s: replace(s, codes={name: codes ^ 1 for name, codes in s.codes.items()}),
    "other scales": lambda s: replace(s, params={n: with_other_scales(p) for n, p in s.params.items()}),
    "other biases": lambda s: replace(s, floats={name: x + 1 for name, x in s.floats.items()}),
    "other time groups": lambda s: replace(s, time_groups=TimeGroups.uniform(0, 500, 4)),
    "another provenance": lambda s: replace(s, provenance=replace(s.provenance, source="another")),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_that_of_another_artifact_is_refused(solved, model_inputs, other: str, strict: bool) -> None:
    """Whether it differs in tensors or only in what no tensor of a state dict has; nothing has changed then."""
    model = convert(solved("plus"))
    expected = run(model, model_inputs)
    state = convert(OTHERS[other](solved("plus"))).state_dict()
    with pytest.raises(InputError, match="of another artifact, backend or kind of device"):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(run(model, model_inputs), expected)


@pytest.mark.parametrize(("name", "message"), [
    ("reference", "of another artifact, backend or kind of device"), ("float", "no place for 'pos_embed.proj.weight'"),
])  # fmt: skip
def test_other_layouts_are_refused(solved, tiny_dit, name: str, message: str) -> None:
    solution = solved("plus", ends="codes")
    state = tiny_dit().state_dict() if name == "float" else convert(solution, name).state_dict()
    with pytest.raises(InputError, match=message):
        convert(solution).load_state_dict(state, strict=False)


def test_a_part_of_another_artifact_is_refused(solved, model_inputs) -> None:
    model, other = convert(solved("plus")), convert(OTHERS["other scales"](solved("plus")))
    expected = run(model, model_inputs)
    with pytest.raises(InputError, match=r"has another 'qkv\.source\.table'"):
        model.transformer_blocks[0].load_state_dict(other.transformer_blocks[0].state_dict())
    with pytest.raises(InputError, match=r"has another 'proj_out_1\.layer\.bias'"):
        model.load_state_dict({"proj_out_1.layer.bias": other.state_dict()["proj_out_1.layer.bias"] + 1}, strict=False)
    assert torch.equal(run(model, model_inputs), expected)


@pytest.mark.skipif(onednn.reason() is not None, reason="oneDNN packs nothing here")
def test_codes_that_onednn_has_packed_are_in_no_tensor_but_count() -> None:
    codes = torch.arange(128, dtype=torch.int8).reshape(8, 16)
    layer, same, other = (PackedLinear(WeightParams(c, torch.ones(8), 8), None) for c in (codes, codes, codes ^ 1))
    layer.load_state_dict(same.state_dict())
    with pytest.raises(InputError, match="is not this integer model's"):
        layer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_converting_names_the_state_without_hashing_codes(solved, monkeypatch, backend: str) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("packed codes are hashed when a state dict is asked for, not before")

    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "get_extra_state", unwanted)
        patch.setattr(panels, "supported", lambda _depth: False)  # else the cpu backend packs without oneDNN
        model = convert(solved("plus"), backend)
    assert model.fixed == set(model.state_dict())


TAMPERED = [
    "proj_out_2.weight",
    "proj_out_1.layer.scale",
    "transformer_blocks.1.qkv.layer.bias",
    "transformer_blocks.0.operands.key.table",
]


@pytest.mark.parametrize("name", TAMPERED)
def test_a_model_changed_by_hand_is_not_saved(solved, tmp_path, name: str) -> None:
    """An artifact has the grids that were solved, which the model no longer has."""
    model = convert(solved("plus"))
    model.save_pretrained(tmp_path / "before")
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensors = owner._parameters if leaf in owner._parameters else owner._buffers
    tensors[leaf] = type(tensors[leaf])(tensors[leaf] * 2)
    with pytest.raises(InputError, match="was changed in the integer model"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()


IN_PLACE = [*TAMPERED, "transformer_blocks.1.fc2.source.channels", "transformer_blocks.0.operands.softmax.table"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_changed_in_place_is_not_saved_and_changes_no_other(solved, tmp_path, name: str, backend: str) -> None:
    """A model shares no table, scale or bias with its solution, of which other models are converted."""
    solution = solved("plus")
    model, other = convert(solution, backend), convert(solution, backend)
    path, _, leaf = name.rpartition(".")
    tensor, same = (getattr(m.get_submodule(path), leaf) for m in (model, other))
    before = same.clone()
    tensor.data.add_(1)
    try:
        assert torch.equal(same, before)
        with pytest.raises(InputError, match="was changed in the integer model"):
            model.save_pretrained(tmp_path / "after")
    finally:
        tensor.data.copy_(before)


def test_what_diffusers_says_of_a_model(solved, tiny_dit) -> None:
    """Codes count as parameters, and casting changes inputs and outputs alone."""
    model = convert(solved("plus"), "reference")
    count = sum(p.numel() for p in tiny_dit().parameters())
    assert count <= model.num_parameters() < 1.1 * count
    assert model.num_parameters(only_trainable=True) == 0
    assert 0.9 * count < model.get_memory_footprint() - 2 * 4 * 1000 * 256  # two tables of sinusoids
    before = {name: x.dtype for name, x in model.state_dict().items()}
    for cast in (model.half, model.bfloat16, model.float, lambda: model.to(torch.float16)):
        cast()
        assert {name: x.dtype for name, x in model.state_dict().items()} == before
    assert model.dtype is torch.float16
