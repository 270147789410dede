"""The parts of a pipeline beside its transformer: copied so that diffusers loads the copy, or refused by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from safetensors.torch import load_file

from tqdit.errors import InputError
from tqdit.sources.resolve import resolve
from tqdit.workflow import prepare, save

OWN_CODE = """from diffusers import DiTPipeline


class MyDiT(DiTPipeline):
    def __init__(self, transformer, vae, scheduler, vae2, id2label=None):
        super().__init__(transformer, vae, scheduler, id2label=id2label)
        self.register_modules(vae2=vae2)
"""
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def whole(tiny_dit, tmp_path) -> Path:
    """A pipeline with a VAE, as diffusers writes it."""
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=1, norm_num_groups=4, layers_per_block=1)
    DiTPipeline(tiny_dit(), vae, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def edit_index(root: Path, **values: object) -> None:
    path = root / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def copied(solved, whole: Path) -> Path:
    source = resolve(whole)
    source.check_components()
    save(solved("plus"), source, whole.parent / "copy")
    return whole.parent / "copy"


def same_decoder(a: Path, b: Path) -> bool:
    first, second = (load_file(path / "vae" / VAE_WEIGHTS) for path in (a, b))
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_vae_is_copied(solved, whole) -> None:
    copy = copied(solved, whole)
    assert same_decoder(whole, copy)
    assert type(DiTPipeline.from_pretrained(copy).vae) is AutoencoderKL


def test_pickled_weights_alone_are_refused_before_any_work(whole, tiny_recipe) -> None:
    weights = whole / "vae" / VAE_WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    stages: list[str] = []
    copied_anyway = weights.with_suffix(".bin")
    weights.unlink()
    with pytest.raises(InputError, match=r"vae has only pickled weights \(diffusion_pytorch_model\.bin\)"):
        prepare(whole, tiny_recipe(), lambda stage, _: stages.append(stage), "cpu")
    assert not stages
    assert copied_anyway.is_file()


@pytest.mark.parametrize(
    "config", [{"_class_name": "AutoencoderKL"}, {"model_type": "t5", "architectures": ["T5EncoderModel"]}]
)
def test_a_model_without_weights_is_refused(whole, config: dict) -> None:
    (whole / "extra").mkdir()
    (whole / "extra" / "config.json").write_text(json.dumps(config))
    edit_index(whole, extra=["some_library", "SomeModel"])
    with pytest.raises(InputError, match=r"extra is of a model \((AutoencoderKL|T5EncoderModel)\), but has no"):
        resolve(whole).check_components()


def test_a_part_that_needs_no_weights_is_copied(solved, whole) -> None:
    (whole / "tokenizer").mkdir()
    (whole / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (whole / "tokenizer" / "merges.txt").write_text("a b")
    edit_index(whole, tokenizer=["transformers", "CLIPTokenizer"])
    assert (copied(solved, whole) / "tokenizer" / "merges.txt").is_file()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_vae_that_the_index_does_not_name_is_checked_as_well(whole, indexed: bool) -> None:
    path = whole / "model_index.json"
    path.write_text(json.dumps({"_class_name": "DiTPipeline"})) if indexed else path.unlink()
    os.mkfifo(whole / "vae" / "notes.txt")
    with pytest.raises(InputError, match=r"notes\.txt is not a regular file"):
        resolve(whole).check_components()
    (whole / "vae" / "notes.txt").unlink()
    weights = whole / "vae" / VAE_WEIGHTS
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="vae has only pickled weights"):
        resolve(whole).check_components()


def test_pickled_weights_beside_others_are_left_out(solved, whole) -> None:
    weights = whole / "vae" / VAE_WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    copy = copied(solved, whole)
    assert {path.name for path in (copy / "vae").iterdir()} == {"config.json", VAE_WEIGHTS}


def test_a_variant_alone_gets_the_name_that_is_loaded(solved, whole) -> None:
    shutil.copytree(whole / "vae", whole / "extra")
    (whole / "extra" / VAE_WEIGHTS).rename(whole / "extra" / "diffusion_pytorch_model.fp16.safetensors")
    edit_index(whole, extra=["diffusers", "AutoencoderKL"])
    assert (copied(solved, whole) / "extra" / VAE_WEIGHTS).is_file()


def test_a_variant_in_several_files_is_refused(whole) -> None:
    for number in (1, 2):
        name = f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors"
        shutil.copy(whole / "vae" / VAE_WEIGHTS, whole / "vae" / name)
    (whole / "vae" / VAE_WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"vae has weights only as .*fp16-00001.*without a variant"):
        resolve(whole).check_components()


def test_a_pipeline_with_code_and_a_component_of_its_own(solved, whole) -> None:
    shutil.copytree(whole / "vae", whole / "vae2")
    (whole / "my_dit.py").write_text(OWN_CODE)
    edit_index(whole, _class_name=["my_dit", "MyDiT"], vae2=["diffusers", "AutoencoderKL"])
    copy = copied(solved, whole)
    assert {"my_dit.py", "vae", "vae2"} <= set(json.loads((copy / "tqdit.json").read_text())["files"]) | {
        path.name for path in copy.iterdir()
    }
    pipe = DiffusionPipeline.from_pretrained(copy, trust_remote_code=True)
    assert type(pipe).__name__ == "MyDiT"
    assert type(pipe.vae2) is AutoencoderKL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae2": ["diffusers", "AutoencoderKL"]}, "component 'vae2', but has no folder"),
        ({"../up": ["diffusers", "AutoencoderKL"]}, "no folder of it"),
        ({"_class_name": ["my_dit", "MyDiT"]}, r"no file my_dit\.py"),
        ({"_class_name": ["../my_dit", "MyDiT"]}, r"is \[module, class\]"),
        ({"_class_name": ["my_dit"]}, r"is \[module, class\]"),
    ],
)
def test_a_part_that_is_not_there_is_refused(whole, change: dict, message: str) -> None:
    edit_index(whole, **change)
    with pytest.raises(InputError, match=message):
        resolve(whole).check_components()


def test_a_part_that_is_null_is_none(solved, whole) -> None:
    edit_index(whole, safety_checker=[None, None])
    assert not (copied(solved, whole) / "safety_checker").exists()


def test_a_pipe_in_a_part_is_refused(whole) -> None:
    os.mkfifo(whole / "vae" / "notes.txt")
    with pytest.raises(InputError, match=r"notes\.txt is not a regular file"):
        resolve(whole).check_components()


def test_a_pipeline_without_a_scheduler_becomes_one_that_diffusers_loads(solved, whole) -> None:
    shutil.rmtree(whole / "scheduler")
    with pytest.warns(UserWarning, match="no scheduler; DiT's is taken"):
        copy = copied(solved, whole)
    assert DiTPipeline.from_pretrained(copy).scheduler.config.beta_end == 0.02


def test_an_index_that_names_no_parts_becomes_one_that_does(solved, whole) -> None:
    (whole / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    pipe = DiTPipeline.from_pretrained(copied(solved, whole))
    assert (type(pipe.scheduler), type(pipe.vae)) == (DDIMScheduler, AutoencoderKL)


@pytest.mark.parametrize("config", [None, {"num_train_timesteps": 1000}])
def test_a_scheduler_class_that_only_the_index_names(whole, config: object) -> None:
    edit_index(whole, scheduler=["diffusers", "FlowMatchLCMScheduler"])
    path = whole / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config)) if config else path.unlink()
    with pytest.raises(InputError, match=r"model_index\.json: scheduler class 'FlowMatchLCMScheduler'"):
        resolve(whole)


def test_a_flow_matching_class_that_only_the_index_names(whole) -> None:
    edit_index(whole, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    path = whole / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"shift": 3.0}))
    assert resolve(whole).scheduler == {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    path.unlink()
    with pytest.raises(InputError, match=r"scheduler_config\.json is missing; model_index\.json names a FlowMatch"):
        resolve(whole)


def test_the_schedule_that_was_taken_is_written(solved, model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "alone")
    with pytest.warns(UserWarning, match="DiT's is taken"):
        source = resolve(tmp_path / "alone")
    save(solved("plus"), source, tmp_path / "copy")
    assert resolve(tmp_path / "copy").scheduler == source.scheduler
    assert (tmp_path / "copy" / "scheduler" / "scheduler_config.json").is_file()
