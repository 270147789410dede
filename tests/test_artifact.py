"""Artifacts: bit-exact, reproducible, and every damage found and named."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tqdit.artifact import folder as artifact
from tqdit.artifact import tensors
from tqdit.artifact.tensors import MANIFEST_TENSOR
from tqdit.errors import InputError
from tqdit.provenance import Provenance
from tqdit.runtime import fitting
from tqdit.runtime.convert import convert
from tqdit.spec import Grid, Role
from tqdit.system import files
from tqdit.system.files import CONFIG, INDEX, MANIFEST, TRANSFORMER, WEIGHTS

FC1, FC2 = "transformer_blocks.0.ff.net.0.proj.weight", "transformer_blocks.0.ff.net.2.weight"
TABLES = [f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in range(2)]
SOFTMAX, QUERY = "transformer_blocks.1.attn1.softmax", "transformer_blocks.1.attn1.query"
RECIPES = [("paper", "w8a8"), ("plus", "w6a6"), ("plus", "w4a8"), ("paper", "w2a5")]


@pytest.fixture
def folder(tmp_path, solved):
    artifact.write(solved("plus", "w6a6"), tmp_path)
    return tmp_path


def edit_json(path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1) + "\n")


def manifest_of(folder) -> dict:
    return json.loads(bytes(load_file(folder / WEIGHTS)[MANIFEST_TENSOR].tolist()))


def forge(folder, change_manifest=lambda _: None, change_tensors=lambda _: None) -> None:
    """Change an artifact and make all of its hashes right again."""
    stored = load_file(folder / WEIGHTS)
    manifest = json.loads(bytes(stored.pop(MANIFEST_TENSOR).tolist()))
    change_tensors(stored)
    manifest["tensors"] = {name: tensors._describe(tensor).model_dump() for name, tensor in stored.items()}
    change_manifest(manifest)
    data = json.dumps(manifest).encode()
    stored[MANIFEST_TENSOR] = torch.tensor(list(data), dtype=torch.uint8)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    edit_json(folder / CONFIG, lambda config: config["quantization_config"].update(manifest_sha256=digest))


@pytest.mark.parametrize(("preset", "bits"), RECIPES)
def test_round_trip_is_bit_exact(tmp_path, solved, preset: str, bits: str) -> None:
    assert_round_trip(solved(preset, bits), tmp_path)


@pytest.mark.parametrize("bits", ["w8a8", "w4a6"])
def test_round_trip_of_rows_factors_and_float_ends(tmp_path, solved, bits: str) -> None:
    solution = factored(solved("plus", bits, attended_grid="row"))
    grids = {params.spec.grid for params in solution.params.values()}
    assert {Grid.ROW, Grid.SOFTMAX_ROW} <= grids
    assert "proj_out_2.weight" in solution.floats
    assert_round_trip(solution, tmp_path)


def factored(solution):
    """A solution with factors for each channel after GELU, whatever the search chose."""
    factors = torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.01
    params = {
        name: replace(p, channels=factors * (i + 1)) if p.spec.role is Role.GELU else p
        for i, (name, p) in enumerate(solution.params.items())
    }
    return replace(solution, params=params)


def assert_round_trip(solution, tmp_path) -> None:
    artifact.write(solution, tmp_path)
    loaded = artifact.read(tmp_path)
    assert list(loaded.params) == list(solution.params)
    for name, params in solution.params.items():
        other = loaded.params[name]
        assert other.spec == params.spec
        assert torch.equal(other.scale, params.scale)
        assert other.scale.dtype is torch.float32
        assert (other.zero_point is None) == (params.zero_point is None)
        if params.zero_point is not None:
            assert torch.equal(other.zero_point, params.zero_point)
            assert other.zero_point.dtype is torch.int32
        assert (other.channels is None) == (params.channels is None)
        if params.channels is not None:
            assert torch.equal(other.channels, params.channels)
            assert other.channels.dtype is torch.float32
    for ours, theirs in ((solution.codes, loaded.codes), (solution.floats, loaded.floats)):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.dtype is theirs[name].dtype
    assert loaded.time_groups == solution.time_groups
    assert loaded.provenance == solution.provenance
    assert loaded.model_config.keys() == solution.model_config.keys()


def test_loaded_model_gives_the_same_output(folder, solved, model_inputs) -> None:
    with torch.inference_mode():
        expected = convert(solved("plus", "w6a6"))(**model_inputs).sample
        assert torch.equal(convert(artifact.read(folder))(**model_inputs).sample, expected)


def test_same_solution_same_bytes(tmp_path, solved) -> None:
    copies = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for copy in copies:
        copy.mkdir()
    artifact.write(solved("plus", "w6a6"), copies[0])
    artifact.write(solved("plus", "w6a6"), copies[1])
    artifact.write(artifact.read(copies[0]), copies[2])
    for name in (CONFIG, MANIFEST, WEIGHTS):
        assert len({(copy / name).read_bytes() for copy in copies}) == 1, name


def test_codes_are_stored_packed(folder, solved) -> None:
    solution = solved("plus", "w6a6")
    stored = load_file(folder / WEIGHTS)
    for name, codes in solution.codes.items():
        bits = solution.params[name].spec.bits
        assert stored[f"{name}.codes"].numel() == -(-codes.numel() * bits // 8)
    assert artifact.size_bytes(folder) == (folder / WEIGHTS).stat().st_size


# Equal tensors -----------------------------------------------------------------------------------------------------


def with_equal_tensors(solution):
    """Both blocks with one label table and one weight, as separate tensors."""
    floats = {**solution.floats, TABLES[1]: solution.floats[TABLES[0]].clone()}
    name = FC1.replace("blocks.0", "blocks.1")
    codes = {**solution.codes, name: solution.codes[FC1].clone()}
    return replace(solution, floats=floats, codes=codes), name


def test_equal_tensors_are_stored_once_and_shared_after_loading(tmp_path, solved) -> None:
    solution, name = with_equal_tensors(solved())
    artifact.write(solution, tmp_path)
    aliases = manifest_of(tmp_path)["aliases"]
    assert aliases[TABLES[1]] == TABLES[0]
    assert aliases[f"{name}.codes"] == f"{FC1}.codes"
    assert not set(aliases) & set(load_file(tmp_path / WEIGHTS))
    loaded = artifact.read(tmp_path)
    assert torch.equal(loaded.floats[TABLES[1]], solution.floats[TABLES[0]])
    assert loaded.floats[TABLES[0]].data_ptr() == loaded.floats[TABLES[1]].data_ptr()
    assert loaded.codes[FC1].data_ptr() == loaded.codes[name].data_ptr()


def test_equal_bytes_of_another_shape_stay_what_they_are(tmp_path, solved) -> None:
    """fc1 (4w, w) and fc2 (w, 4w) with the same packed bytes."""
    solution = solved()
    codes = {name: torch.full_like(solution.codes[name], 7) for name in (FC1, FC2)}
    artifact.write(replace(solution, codes={**solution.codes, **codes}), tmp_path)
    loaded = artifact.read(tmp_path)
    for name, expected in codes.items():
        assert torch.equal(loaded.codes[name], expected), name


def test_alias_to_nowhere_is_named(tmp_path, solved) -> None:
    artifact.write(with_equal_tensors(solved())[0], tmp_path)
    forge(tmp_path, lambda manifest: manifest["aliases"].update({TABLES[1]: "nowhere"}))
    with pytest.raises(InputError, match=f"'{re.escape(TABLES[1])}' refers to 'nowhere'"):
        artifact.read(tmp_path)


# Damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_truncated_weights(folder, keep: float) -> None:
    path = folder / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=WEIGHTS):
        artifact.read(folder)


@pytest.mark.parametrize("position", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_one_flipped_bit_in_the_data(folder, position: float) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    where = header + int((len(data) - header - 1) * position)
    data[where] ^= 1 << 3
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"tensor '.+' has sha256"):
        artifact.read(folder)


def test_one_flipped_bit_in_the_header(folder) -> None:
    path = folder / WEIGHTS
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    start = original.index(b'"proj_out_1.bias"')
    for where in [*range(8), *range(start, min(start + 90, header))]:
        data = bytearray(original)
        data[where] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match=re.escape(str(folder))):
            artifact.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"proj_out_1.bias": t["proj_out_1.bias"].half()}), "'proj_out_1.bias' has dtype float16"),
        (lambda t: t.update({f"{QUERY}.scale": t[f"{QUERY}.scale"].T.contiguous()}), f"'{QUERY}.scale' has shape"),
        (lambda t: t.pop(f"{FC1}.codes"), f"lacks tensor '{FC1}.codes'"),
        (lambda t: t.update(stranger=torch.zeros(1)), "unexpected tensor 'stranger'"),
        (lambda t: t[f"{QUERY}.zero_point"].add_(1), f"'{QUERY}.zero_point' has sha256"),
    ],
)
def test_changed_tensor_is_named(folder, change, message: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=re.escape(message)):
        artifact.read(folder)


def set_first(name: str, value: float):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_first(f"{QUERY}.scale", -0.1), f"'{QUERY}.scale' has a scale that is not finite and positive"),
        (set_first(f"{QUERY}.scale", 0.0), f"'{QUERY}.scale' has a scale"),
        (set_first(f"{FC1}.scale", float("nan")), f"'{FC1}.scale' has a scale"),
        (set_first(f"{SOFTMAX}.scale", float("inf")), f"'{SOFTMAX}.scale' has a scale"),
        (set_first(f"{QUERY}.zero_point", 1000), f"'{QUERY}.zero_point' has a zero point outside"),
        (set_first(f"{QUERY}.zero_point", 32), f"'{QUERY}.zero_point' has a zero point outside"),
        (set_first(f"{QUERY}.zero_point", -33), f"'{QUERY}.zero_point' has a zero point outside"),
        (set_first("proj_out_1.bias", float("nan")), "'proj_out_1.bias' must be finite"),
        (set_first("proj_out_1.bias", float("inf")), "'proj_out_1.bias' must be finite"),
        (set_first("proj_out_1.bias", float("-inf")), "'proj_out_1.bias' must be finite"),
        (lambda t: t.update({"proj_out_1.bias": t["proj_out_1.bias"].double()}), "'proj_out_1.bias' must be finite"),
        (lambda t: t.update({f"{QUERY}.scale": t[f"{QUERY}.scale"].double()}), f"'{QUERY}.scale' is torch.float64"),
        (lambda t: t.update({f"{QUERY}.scale": t[f"{QUERY}.scale"][:1].clone()}), f"'{QUERY}.scale' is torch.float32"),
        (lambda t: t.update({f"{QUERY}.zero_point": t[f"{QUERY}.zero_point"].long()}), f"'{QUERY}.zero_point' is"),
        (lambda t: t.update({f"{QUERY}.zero_point": t[f"{QUERY}.zero_point"][:1].clone()}), f"'{QUERY}.zero_point' is"),
        (lambda t: t.update({f"{QUERY}.zero_point": t[f"{QUERY}.zero_point"].reshape(-1)}), f"'{QUERY}.zero_point' is"),
        (lambda t: t.pop(f"{QUERY}.zero_point"), f"lacks tensor '{QUERY}.zero_point'"),
        (lambda t: t.update({f"{FC1}.codes": t[f"{FC1}.codes"][:-1].clone()}), f"'{FC1}.codes'"),
        (lambda t: t.pop(f"{QUERY}.scale"), f"lacks tensor '{QUERY}.scale'"),
        (lambda t: t.update(stranger=torch.zeros(1, dtype=torch.int32)), "'stranger' must be finite float32"),
    ],
)
def test_values_are_checked_even_if_all_hashes_are_right(folder, change, message: str) -> None:
    forge(folder, change_tensors=change)
    with pytest.raises(InputError, match=re.escape(message)):
        artifact.read(folder)


GELU = "transformer_blocks.0.ff.fc2_input"
CHANNELS = f"{GELU}.channels"
BAD_CHANNELS = {
    "type": lambda x: x.double(),
    "integers": lambda x: x.int(),
    "axes": lambda x: x[None],
    "nan": lambda x: x.index_fill(0, torch.tensor(3), torch.nan),
    "infinite": lambda x: x.index_fill(0, torch.tensor(3), torch.inf),
    "negative": lambda x: x.index_fill(0, torch.tensor(3), -1.0),
    "zero": lambda x: x.index_fill(0, torch.tensor(3), 0.0),
    "subnormal": lambda x: x.index_fill(0, torch.tensor(3), 1e-40),
}


@pytest.mark.parametrize("damage", BAD_CHANNELS)
def test_factors_are_checked_even_if_all_hashes_are_right(tmp_path, solved, damage: str) -> None:
    artifact.write(factored(solved("plus")), tmp_path)
    forge(tmp_path, change_tensors=lambda t: t.update({CHANNELS: BAD_CHANNELS[damage](t[CHANNELS])}))
    with pytest.raises(InputError, match=f"tensor '{re.escape(CHANNELS)}'"):
        artifact.read(tmp_path)


def test_factors_of_another_number_are_found_by_the_model(tmp_path, solved) -> None:
    artifact.write(factored(solved("plus")), tmp_path)
    forge(tmp_path, change_tensors=lambda t: t.update({CHANNELS: t[CHANNELS][:-1].clone()}))
    with pytest.raises(InputError, match=rf"'{re.escape(GELU)}' has channels of shape \(127,\), not \(128,\)"):
        fitting.read(tmp_path)


def test_factors_that_are_missing_are_named(tmp_path, solved) -> None:
    artifact.write(factored(solved("plus")), tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    del stored[CHANNELS]
    save_file(stored, tmp_path / WEIGHTS)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(InputError, match=f"lacks tensor '{re.escape(CHANNELS)}'"):
        artifact.read(tmp_path)


def test_equal_factors_are_stored_once(tmp_path, solved) -> None:
    """Of at least 256 channels; an alias to nowhere is named."""
    solution, other = solved("plus"), GELU.replace("blocks.0", "blocks.1")
    factors = torch.rand(256) + 0.5
    params = {name: replace(solution.params[name], channels=factors.clone()) for name in (GELU, other)}
    artifact.write(replace(solution, params={**solution.params, **params}), tmp_path)
    assert manifest_of(tmp_path)["aliases"][f"{other}.channels"] == CHANNELS
    loaded = artifact.read(tmp_path)
    assert all(torch.equal(loaded.params[name].channels, factors) for name in (GELU, other))
    forge(tmp_path, lambda manifest: manifest["aliases"].update({f"{other}.channels": "nowhere"}))
    with pytest.raises(InputError, match=f"'{re.escape(other)}.channels' refers to 'nowhere'"):
        artifact.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["sites"][0].update(grid="cubic"), "cubic"),
        (lambda m: m["sites"][0].update(role="poet"), "poet"),
        (lambda m: m["sites"][0].update(colour="red"), "colour"),
        (lambda m: m["sites"][0].pop("role"), "role"),
        (lambda m: m["sites"][0].update(bits=9), "bits"),
        (lambda m: m["sites"][-2].update(bits=0), "0 bits, legal are 2 to 8"),
        (lambda m: m["sites"][-2].update(bits=1), "1 bits, legal are 2 to 8"),
        (lambda m: m["sites"][-2].update(bits=9), "9 bits, legal are 2 to 8"),
        (lambda m: m["sites"][-2].update(groups=2), "2 groups, legal are 1 and 4"),
        (lambda m: m["sites"][-2].update(groups=3), "3 groups, legal are 1 and 4"),
        (lambda m: m["shapes"].pop(FC1), FC1),
        (lambda m: m["shapes"].update({FC1: [3, 5]}), FC1),
        (lambda m: m.pop("sites"), "sites"),
        (lambda m: m.pop("provenance"), "provenance"),
        (lambda m: m.update(provenance=3), "is malformed"),
        (lambda m: m["provenance"].update(recipe=[]), "provenance: recipe must be a table"),
        (lambda m: m["provenance"].update(preset=3), "provenance: preset must be text"),
        (lambda m: m["provenance"].update(versions={"torch": 2}), "provenance: the version of 'torch' must be text"),
        (lambda m: m.update(aliases=[1]), "is malformed"),
        (lambda m: m["tensors"].update({f"{FC1}.codes": {}}), "is malformed"),
        (lambda m: m["shapes"].update({FC1: ["a"]}), "is malformed"),
    ],
)
def test_manifest_is_checked_even_if_all_hashes_are_right(folder, change, message: str) -> None:
    forge(folder, change)
    with pytest.raises(InputError, match=re.escape(message)):
        artifact.read(folder)


def test_edited_manifest(folder) -> None:
    stored = load_file(folder / WEIGHTS)
    data = bytes(stored[MANIFEST_TENSOR].tolist()).replace(b'"source": null', b'"source": true')
    stored[MANIFEST_TENSOR] = torch.tensor([*data, ord(" ")], dtype=torch.uint8)
    save_file(stored, folder / WEIGHTS)
    with pytest.raises(InputError, match=f"'{MANIFEST_TENSOR}' has sha256 .*, config.json says"):
        artifact.read(folder)


@pytest.mark.parametrize("version", [0, 1, 6, None, "2"])
def test_other_format_version(folder, version: object) -> None:
    edit_json(folder / CONFIG, lambda c: c["quantization_config"].update(format_version=version))
    with pytest.raises(InputError, match=f"format {version} is not supported; this tqdit reads 2, 3, 4, 5"):
        artifact.read(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file_is_named(folder, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        artifact.read(folder)


@pytest.mark.parametrize("quantization", [None, {"quant_method": "bitsandbytes"}, "tqdit"])
def test_folder_of_another_method(folder, quantization: object) -> None:
    edit_json(folder / CONFIG, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(InputError, match="no quantization_config of method 'tqdit'"):
        artifact.read(folder)


@pytest.mark.parametrize(("key", "value"), [("num_layers", 3), ("sample_size", 16), ("patch_size", 4)])
def test_edited_config_is_named(folder, key: str, value: int) -> None:
    edit_json(folder / CONFIG, lambda config: config.update({key: value}))
    with pytest.raises(InputError, match=f"config.json was changed: {key} is {value}"):
        artifact.read(folder)


def test_a_setting_that_was_added_to_the_config_or_taken_from_it_is_named(folder) -> None:
    """Either would change what the model computes, and no tensor's hash says so."""
    original = (folder / CONFIG).read_text()
    edit_json(folder / CONFIG, lambda config: config.update(norm_type="layer_norm_of_another_kind"))
    with pytest.raises(InputError, match=r"config\.json was changed: norm_type"):
        artifact.read(folder)
    (folder / CONFIG).write_text(original)
    edit_json(folder / CONFIG, lambda config: config.update(a_setting_of_tomorrow=1))
    with pytest.raises(InputError, match=r"config\.json was changed: a_setting_of_tomorrow"):
        artifact.read(folder)
    (folder / CONFIG).write_text(original)
    edit_json(folder / CONFIG, lambda config: config.pop("num_layers"))
    with pytest.raises(InputError, match=r"config\.json was changed: num_layers"):
        artifact.read(folder)


def test_notes_of_diffusers_in_the_config_may_change(folder) -> None:
    """Their names start with "_", and another version of diffusers writes others; the model is the same."""
    before = artifact.read(folder)
    edit_json(folder / CONFIG, lambda config: config.update(_diffusers_version="99.0", _name_or_path="elsewhere"))
    assert artifact.read(folder).codes.keys() == before.codes.keys()


def test_ends_of_the_codes_are_legal_zero_points(folder) -> None:
    """A range that starts or ends at 0 has its zero point there: -32 or 31 at 6 bits."""
    ends = torch.tensor([-32, 31], dtype=torch.int32)

    def change(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{QUERY}.zero_point"].view(-1)[:2] = ends

    forge(folder, change_tensors=change)
    assert torch.equal(artifact.read(folder).params[QUERY].zero_point.view(-1)[:2], ends)


def test_codes_that_two_sites_share_must_have_the_width_of_both(tmp_path, solved) -> None:
    solution, name = with_equal_tensors(solved())
    artifact.write(solution, tmp_path)

    def narrow(manifest: dict) -> None:
        next(site for site in manifest["sites"] if site["name"] == name)["bits"] = 4

    forge(tmp_path, narrow)
    with pytest.raises(InputError, match=re.escape(name)):
        artifact.read(tmp_path)


def test_parameters_of_any_float_type_are_stored_as_float32(solved) -> None:
    """fp32 holds every bf16 and fp16 number; the scales are fp32 whatever they came as."""
    solution = solved("plus", "w6a6")
    floats = {name: tensor.bfloat16() for name, tensor in solution.floats.items()}
    params = {name: replace(p, scale=p.scale.double()) for name, p in solution.params.items()}
    stored, config = tensors.pack(replace(solution, floats=floats, params=params))
    loaded = tensors.unpack(stored, config, "here")
    for name, tensor in floats.items():
        assert loaded.floats[name].dtype is torch.float32
        assert torch.equal(loaded.floats[name], tensor.float())
    for name, p in solution.params.items():
        assert torch.equal(loaded.params[name].scale, p.scale)


def test_zeros_of_two_types_are_no_copies_of_each_other() -> None:
    """int32 and float32 zeros have the same bytes; one stored for both would come back with the wrong type."""
    found = {"a": torch.zeros(512), "b": torch.zeros(512, dtype=torch.int32), "c": torch.zeros(2, 256)}
    found["d"] = torch.zeros(512)
    stored, aliases = tensors._deduplicated(found)
    assert list(stored) == ["a", "b", "c"]
    assert aliases == {"d": "a"}


def test_what_the_config_says_of_the_quantization(solved) -> None:
    """Enough for diffusers to find this library, and for a person to see what was done."""
    solution = solved("plus", "w6a6")
    solution = replace(solution, provenance=replace(solution.provenance, preset="plus"))
    stored, config = tensors.pack(solution)
    assert list(stored) == sorted(stored)
    digest = hashlib.sha256(bytes(stored[MANIFEST_TENSOR].tolist())).hexdigest()
    assert config == {
        **solution.model_config,
        "quantization_config": {
            "quant_method": "tqdit", "format_version": 4, "preset": "plus", "weight_bits": 6, "activation_bits": 6,
            "manifest_sha256": digest,
        },
    }  # fmt: skip
    plain, config = tensors.pack(replace(solution, provenance=Provenance()))
    assert config["quantization_config"]["weight_bits"] is None
    assert tensors.unpack(plain, config, "here").provenance == Provenance()


@pytest.mark.parametrize("layers", [1, 3])
def test_solution_of_another_depth_does_not_convert(solved, layers: int) -> None:
    solution = solved()
    with pytest.raises(InputError, match=rf"transformer_blocks\.{min(layers, 2)}"):
        convert(replace(solution, model_config={**solution.model_config, "num_layers": layers}))


def test_files_beside_the_weights_are_hashed(tmp_path, solved) -> None:
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text("{}")
    artifact.write(solved(), tmp_path)
    artifact.read(tmp_path)
    file.write_text('{"beta_end": 1}')
    with pytest.raises(InputError, match=r"scheduler_config\.json was changed"):
        artifact.read(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"scheduler_config\.json is missing; tqdit\.json lists it"):
        artifact.read(tmp_path)


@pytest.mark.parametrize("name", [".ipynb_checkpoints/x.json", "._scheduler_config.json"])
def test_what_editors_and_file_managers_leave_is_no_added_file(folder, name: str) -> None:
    file = folder / "scheduler" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    artifact.read(folder)
    (folder / "scheduler" / "x.json").write_text("{}")
    with pytest.raises(InputError, match=r"x\.json was added"):
        artifact.read(folder)


def test_a_pipeline_is_verified_as_a_whole(tmp_path, solved) -> None:
    (tmp_path / TRANSFORMER).mkdir()
    file = tmp_path / "model_index.json"
    file.write_text("{}")
    artifact.write(solved(), tmp_path / TRANSFORMER)
    artifact.seal(tmp_path)
    for folder in (tmp_path, tmp_path / TRANSFORMER):
        assert artifact.read(folder).time_groups == solved().time_groups
    file.write_text('{"id2label": {}}')
    for folder in (tmp_path, tmp_path / TRANSFORMER):
        with pytest.raises(InputError, match=r"model_index\.json was changed"):
            artifact.read(folder)


def test_a_folder_without_its_seal_is_read(folder) -> None:
    """diffusers downloads config and weights, and nothing else."""
    sealed = artifact.read(folder)
    (folder / MANIFEST).unlink()
    loaded = artifact.read(folder)
    assert loaded.provenance == sealed.provenance
    assert all(torch.equal(codes, sealed.codes[name]) for name, codes in loaded.codes.items())


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors"])
def test_shards_outside_the_folder_are_not_read(tmp_path, solved, name: str) -> None:
    artifact.write(solved(), tmp_path, shard_bytes=20_000)
    edit_json(tmp_path / INDEX, lambda index: index["weight_map"].update({"proj_out_1.bias": name}))
    with pytest.raises(InputError, match=f"names '{name}', which is not a file of the folder"):
        artifact.read(tmp_path)
    edit_json(tmp_path / MANIFEST, lambda seal: seal["files"].update({name: "0"}))
    with pytest.raises(InputError, match=f"names '{name}', which is not in the folder"):
        artifact.read(tmp_path)


def test_shards(tmp_path, solved) -> None:
    artifact.write(solved(), tmp_path, shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for name in shards:
        held = load_file(tmp_path / name)
        assert {key for key, shard in weight_map.items() if shard == name} == set(held)
        assert sum(tensor.nbytes for tensor in held.values()) <= 20_000 or len(held) == 1
    codes = artifact.read(tmp_path).codes
    assert all(torch.equal(codes[name], expected) for name, expected in solved().codes.items())
    (tmp_path / shards[1]).unlink()
    with pytest.raises(InputError, match=shards[1]):
        artifact.read(tmp_path)


def test_full_disk_is_an_os_error(tmp_path, solved, monkeypatch) -> None:
    """safetensors has an exception of its own for it."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        artifact.write(solved(), tmp_path)


def test_tensors_that_share_memory_are_written(tmp_path, solved) -> None:
    """Small ones are stored as often as they are named; safetensors refuses them as they are."""
    solution = solved("plus", "w6a6")
    same = torch.ones(32)
    names = [f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.bias" for i in range(2)]
    assert all(solution.floats[name].shape == same.shape for name in names)
    floats = {**solution.floats, **dict.fromkeys(names, same)}
    artifact.write(replace(solution, floats=floats), tmp_path)
    again = artifact.read(tmp_path).floats
    assert all(torch.equal(again[name], value) for name, value in floats.items())
    copies = {name: value.clone() for name, value in floats.items()}
    (tmp_path / "copies").mkdir()
    artifact.write(replace(solution, floats=copies), tmp_path / "copies")
    assert (tmp_path / "copies" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
def test_a_converted_model_does_not_hold_its_file(folder) -> None:
    """8-bit codes are views of the mapped file until they are packed: the model must not keep it in memory."""
    loaded = artifact.read(folder)
    models = [convert(loaded, backend) for backend in ("cpu", "reference")]
    del loaded
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert models
