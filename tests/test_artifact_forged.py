"""Files whose hashes are right and whose content is not, and what seals vouch for."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_artifact import FC1, QUERY, SOFTMAX, edit_json, forge, set_first
from tqdit import workflow
from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.imaging.images import Images
from tqdit.sampling.guidance import Sampling
from tqdit.sources.resolve import resolve
from tqdit.system.files import CONFIG, INDEX, MANIFEST, TRANSFORMER, read_json
from tqdit.timegroups import TimeGroups

NAME = "transformer_blocks.1.attn1.key"


@pytest.fixture
def folder(tmp_path, solved):
    artifact.write(solved("plus", "w6a6"), tmp_path)
    return tmp_path


@pytest.fixture
def sealed(tmp_path, pipeline, solved):
    """A pipeline artifact that the test may damage."""
    root = tmp_path / "sealed"
    workflow.save(solved("plus", "w6a6"), resolve(pipeline), root)
    return root


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError) as error:
        artifact.read(folder)
    assert message in str(error.value), error.value
    assert str(error.value).isprintable()


# Types of the manifest ---------------------------------------------------------------------------------------------


def update_site(**values):
    return lambda manifest: next(s for s in manifest["sites"] if s["name"] == QUERY).update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (update_site(bits=6.0), "bits"),
        (update_site(bits=True), "bits"),
        (update_site(bits="6"), "bits"),
        (update_site(groups=4.0), "groups"),
        (update_site(groups=True), "groups"),
        (update_site(units=2.0), "units"),
        (update_site(units=-2), "units"),
        (update_site(units=10**18), "units"),
        (update_site(name=7), "name"),
        (update_site(name=NAME), f"'{NAME}' is listed twice"),
        (lambda m: m["shapes"].update({FC1: [-1, -4096]}), FC1),
        (lambda m: m["shapes"].update({FC1: [128, 32.0]}), FC1),
        (lambda m: m["shapes"].update({FC1: [0, 0]}), FC1),
        (lambda m: m["shapes"].update({FC1: []}), FC1),
        (lambda m: m["shapes"].update({FC1: [1] * 9}), FC1),
        (lambda m: m["time_groups"].update(extra=1), "extra"),
        (lambda m: m["time_groups"].pop("closed"), "closed"),
        (lambda m: m["time_groups"].update(closed=0), "closed"),
        (lambda m: m["time_groups"].update(high=10**12), "high must be between -1000000 and 1000000"),
        (lambda m: m["time_groups"].update(high=True), "high"),
        (lambda m: m["time_groups"].update(high="1000"), "high"),
        (lambda m: m["time_groups"].update(high=float("inf")), "Infinity"),
        (lambda m: m["time_groups"].update(low=1000.0), "low must be less than high"),
        (lambda m: m["time_groups"].update(edges=[250.0, 500.0]), "4 groups, legal are 1 and 3"),
        (
            lambda m: m["time_groups"].update(edges=[250.0, 500.0, 500.0]),
            "edges must increase strictly inside [0, 1000)",
        ),
        (lambda m: m["time_groups"].update(edges=[0.0, 500.0, 750.0]), "got 0.0 after 0.0"),
        (lambda m: m["time_groups"].update(edges=[250.0, 500.0, 1000.0]), "got 1000.0 after 500.0"),
        (lambda m: m["time_groups"].update(edges=[250.0, 500.0, float("nan")]), "NaN"),
        (lambda m: m["time_groups"].update(edges=[250.0, True, 750.0]), "edges"),
        (lambda m: m["time_groups"].update(edges=[250.0, None, 750.0]), "edges"),
        (lambda m: m["time_groups"].update(edges=[i / 20 for i in range(1, 10**4 + 2)]), "at most 10000 items"),
        (lambda m: m.update(time_groups={"num_timesteps": 1000, "num_groups": 4}), "edges"),
        (lambda m: m["tensors"][f"{QUERY}.scale"].update(shape=[4.0, 2]), "shape"),
        (lambda m: m["tensors"][f"{QUERY}.scale"].update(sha256=5), "sha256"),
        (lambda m: m["aliases"].update({"a": 1}), "aliases"),
        (lambda m: m["aliases"].update({f"{QUERY}.scale": f"{NAME}.scale"}), "is stored, and refers"),
        (lambda m: m["provenance"].update(seed=float("nan")), "NaN"),
        (lambda m: m["provenance"].update(seed=10**40), "64 bits"),
        (lambda m: m.update(model_config=[]), "model_config"),
    ],
)
def test_types_of_the_manifest_are_strict(folder, change, message: str) -> None:
    forge(folder, change)
    refused(folder, message)


def as_format_2(folder: Path, num_timesteps: object = 1000, num_groups: object = 4) -> None:
    """Rewrite an artifact as the former format had it."""
    forge(folder, lambda m: m.update(time_groups={"num_timesteps": num_timesteps, "num_groups": num_groups}))
    edit_json(folder / CONFIG, lambda config: config["quantization_config"].update(format_version=2))
    edit_json(folder / MANIFEST, lambda seal: seal.update(format_version=2))


def test_an_artifact_and_a_seal_of_format_2_are_read_and_written_as_format_4(folder, tmp_path) -> None:
    newer = artifact.read(folder)
    as_format_2(folder)
    older = artifact.read(folder)
    assert older.time_groups == newer.time_groups == TimeGroups((250, 500, 750), 0, 1000)
    assert older.provenance == newer.provenance
    again = tmp_path / "again"
    again.mkdir()
    artifact.write(older, again)
    assert artifact.read(again).time_groups == newer.time_groups
    assert read_json(again / MANIFEST)["format_version"] == 4
    assert read_json(again / CONFIG)["quantization_config"]["format_version"] == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_timesteps": 10**12}, "num_timesteps"),
        ({"num_timesteps": 0}, "num_timesteps"),
        ({"num_timesteps": 1000.0}, "num_timesteps"),
        ({"num_groups": True}, "num_groups"),
        ({"num_groups": 0}, "num_groups"),
        ({"num_groups": 10**5}, "num_groups"),
        ({"num_timesteps": 3}, "groups must be between 1 and 3"),
    ],
)
def test_time_groups_of_format_2_are_strict(folder, values: dict, message: str) -> None:
    as_format_2(folder, **values)
    refused(folder, message)


def test_a_format_that_the_manifest_does_not_have(folder) -> None:
    edit_json(folder / CONFIG, lambda config: config["quantization_config"].update(format_version=2))
    refused(folder, "'time_groups.num_timesteps' is wrong")


def test_control_characters_do_not_reach_a_terminal(folder) -> None:
    forge(folder, update_site(name="\x1b[31mred\nline"))
    refused(folder, r"\x1b[31mred\nline")


def test_control_characters_of_the_provenance_are_escaped(folder) -> None:
    forged = {"source": "\x1b[31mred", "versions": {"a\n": "\x07"}, "more": ["\n"]}
    forge(folder, lambda manifest: manifest["provenance"].update(forged))
    provenance = artifact.read(folder).provenance
    assert provenance.source == r"\x1b[31mred"
    assert provenance.versions == {r"a\n": r"\x07"}
    assert provenance.further == {"more": [r"\n"]}


# Values ------------------------------------------------------------------------------------------------------------


def reshaped(name: str):
    return lambda tensors: tensors.update({name: tensors[name].reshape(-1).clone()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_first(f"{QUERY}.zero_point", -33), "zero point outside the codes of 6 bits"),
        (set_first(f"{QUERY}.zero_point", 32), "zero point outside the codes of 6 bits"),
        (reshaped(f"{QUERY}.zero_point"), f"'{QUERY}.zero_point' is torch.int32 (8,)"),
        (lambda t: t.update({f"{QUERY}.zero_point": t[f"{QUERY}.zero_point"][:1].clone()}), "zero_point' is torch"),
        (set_first("proj_out_1.bias", float("inf")), "'proj_out_1.bias' must be finite"),
        (set_first("proj_out_1.bias", float("-inf")), "'proj_out_1.bias' must be finite"),
        (set_first(f"{FC1}.scale", 1e-39), f"'{FC1}.scale' has a scale that is not finite and positive, or is sub"),
        (set_first(f"{SOFTMAX}.scale", 1e-45), f"'{SOFTMAX}.scale' has a scale"),
        (lambda t: t.update({f"{FC1}.scale": t[f"{FC1}.scale"][:, :5].clone()}), f"'{FC1}.scale' is torch.float32 (1"),
    ],
)
def test_values_that_no_solver_writes(folder, change, message: str) -> None:
    forge(folder, change_tensors=change)
    refused(folder, message)


def test_the_extremes_of_a_zero_point_are_legal(folder) -> None:
    forge(folder, change_tensors=lambda t: t[f"{QUERY}.zero_point"].view(-1)[:2].copy_(torch.tensor([-32, 31])))
    assert artifact.read(folder).params[QUERY].zero_point.view(-1)[:2].tolist() == [-32, 31]


def test_shared_codes_of_two_widths(folder) -> None:
    """One tensor cannot be the codes of 6 bits and those of 8."""
    other = FC1.replace("blocks.0", "blocks.1")

    def change(manifest) -> None:
        manifest["aliases"][f"{other}.codes"] = f"{FC1}.codes"
        next(site for site in manifest["sites"] if site["name"] == other)["bits"] = 8

    forge(folder, change, lambda tensors: tensors.pop(f"{other}.codes"))
    refused(folder, f"'{other}.codes'")


# config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"stranger": 1},
        {"": 1},
        {"timestep_downscale_freq_shift": 0},
        {"timestep_downscale_freq_shift": 0, "_use_default_values": ["timestep_downscale_freq_shift"]},
        {"stranger": 1, "_use_default_values": ["stranger"]},
        {"num_layers": 1, "_use_default_values": ["num_layers"]},
        {"attention_bias": 1},
        {"norm_eps": 0},
    ],
)
def test_a_key_of_the_config_that_was_added_or_changed(folder, settings: dict) -> None:
    edit_json(folder / CONFIG, lambda config: config.update(settings))
    refused(folder, "config.json was changed: ")


def test_a_setting_that_diffusers_has_got_since(folder) -> None:
    """diffusers adds it to the config with its default; another value is another model."""

    def older(manifest) -> None:
        del manifest["model_config"]["dropout"]

    forge(folder, older)
    note = {"_use_default_values": ["dropout", "norm_type"]}
    edit_json(folder / CONFIG, lambda config: config.update(note))
    artifact.read(folder)
    for value in (0.5, 0, "0"):
        edit_json(folder / CONFIG, lambda config, value=value: config.update(dropout=value))
        refused(folder, "config.json was changed: dropout")
    edit_json(folder / CONFIG, lambda config: config.update(dropout=0.0, _use_default_values=5))
    refused(folder, "config.json was changed: dropout")


@pytest.mark.parametrize("version", [2.0, 3.0, True, [2], {}])
def test_format_versions_that_are_no_number(folder, version: object) -> None:
    edit_json(folder / CONFIG, lambda config: config["quantization_config"].update(format_version=version))
    refused(folder, "is not supported; this tqdit reads 2, 3, 4")


def test_a_tensor_in_two_shards(tmp_path, solved) -> None:
    artifact.write(solved(), tmp_path, shard_bytes=20_000)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    refused(tmp_path, f"and so has another file of {INDEX}")


# Seals -------------------------------------------------------------------------------------------------------------

SCHEDULER = "scheduler/scheduler_config.json"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", [SCHEDULER, "model_index.json", MANIFEST, f"{TRANSFORMER}/{MANIFEST}"])
@pytest.mark.parametrize("damage", [cut, replace_by_pipe, Path.unlink])
@pytest.mark.timeout(30)
def test_a_sealed_pipeline_that_was_damaged(sealed, name: str, damage) -> None:
    damage(sealed / name)
    if damage is Path.unlink and name.endswith(MANIFEST):
        return artifact.check_seal(sealed)  # diffusers downloads a model without it
    for folder in (sealed, sealed / TRANSFORMER):
        with pytest.raises(InputError, match=Path(name).name):
            artifact.check_seal(folder)
        refused(folder, Path(name).name)


def test_every_command_checks_the_seal_of_a_pipeline(sealed, pipeline) -> None:
    edit_json(sealed / SCHEDULER, lambda config: config.update(beta_end=0.5))
    expected = r"scheduler_config\.json was changed"
    with pytest.raises(InputError, match=expected):
        workflow.load(sealed)
    with pytest.raises(InputError, match=expected):
        workflow.inspect(sealed / TRANSFORMER)
    with pytest.raises(InputError, match=expected):
        workflow.sample_images(Images(resolve(sealed), (0,), 1, Sampling("ddim", 1)))


@pytest.mark.parametrize("name", [SCHEDULER, "id2label.json", "vae/config.json", "vae/x.safetensors"])
def test_a_file_added_to_a_sealed_folder(folder, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    refused(folder, f"{name} was added")


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache/huggingface/x.json", "vae/README.md"])
def test_a_file_beside_the_model_that_nothing_reads(folder, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    before = artifact.read(folder)
    (folder / name).write_text("hello")
    assert artifact.read(folder).codes.keys() == before.codes.keys()


@pytest.mark.parametrize(
    "change", [{"format_version": 1}, {"format_version": 2.0}, {"format_version": [2]}, {"files": []}, {"more": 1}]
)
def test_a_seal_that_is_none(sealed, change: dict) -> None:
    edit_json(sealed / MANIFEST, lambda seal: seal.update(change))
    refused(sealed, MANIFEST)


def test_a_pipeline_reached_by_a_link(sealed, tmp_path) -> None:
    (tmp_path / "link").symlink_to(sealed / TRANSFORMER)
    (sealed / SCHEDULER).unlink()
    refused(tmp_path / "link", f"{SCHEDULER} is missing")


def test_a_saved_transformer_in_a_folder_without_a_pipeline(tmp_path, sealed) -> None:
    before = artifact.read(sealed)
    shutil.move(sealed / TRANSFORMER, tmp_path / TRANSFORMER)
    assert artifact.read(tmp_path / TRANSFORMER).codes.keys() == before.codes.keys()


DTYPES = ("bool", "complex64", "uint64", "float64", "float8_e4m3fn", "float8_e8m0fnu", "int8", "bfloat16")


@pytest.mark.parametrize("name", ["proj_out_1.bias", f"{QUERY}.scale", f"{QUERY}.zero_point", f"{FC1}.codes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_a_dtype_that_artifacts_do_not_have(folder, name: str, dtype: str) -> None:
    forge(folder, change_tensors=lambda t: t.update({name: torch.ones(64).to(getattr(torch, dtype))}))
    refused(folder, f"'{name}'")
