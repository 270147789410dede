"""`tqdit convert`: a checkpoint becomes a folder that runs as published, here and as far as diffusers can."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from published_dit import random_dit

from tqdit.architectures.registry import FREQUENCY_SHIFT
from tqdit.calibration.recorder import record
from tqdit.calibration.trajectories import collect
from tqdit.errors import InputError
from tqdit.provenance import Provenance
from tqdit.search.solver import solve
from tqdit.sources.export import convert_checkpoint
from tqdit.sources.labels import LABELS, class_indices
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.system.files import CONFIG, WEIGHTS, read_json
from tqdit.timegroups import TimeGroups


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"ema": random_dit().state_dict(), "args": {}}, tmp_path / "official.pt")
    return tmp_path / "official.pt"


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vae"
    AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), latent_channels=4).save_pretrained(folder)
    return folder


def published_output(model: torch.nn.Module) -> bool:
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    with torch.inference_mode():
        found = model(x, timestep=t, class_labels=y).sample
        return torch.allclose(random_dit()(x, t, y), found, rtol=0, atol=1e-5)


def test_converted_and_loaded_it_is_the_published_model(file, tmp_path) -> None:
    result = convert_checkpoint(file, tmp_path / "dit", num_heads=2)
    assert (result["name"], result["weights"]) == ("official", "ema")
    assert result["bytes"] > 100_000
    source = resolve(tmp_path / "dit")
    model = load_float(source)
    assert published_output(model)
    assert source.config[FREQUENCY_SHIFT] == 0
    assert weights_hash(model) == weights_hash(load_float(resolve(file, num_heads=2)))
    assert sorted(p.name for p in (tmp_path / "dit").iterdir()) == ["scheduler", "transformer"]
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "dit" / "scheduler")
    assert torch.allclose(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))


def test_saved_again_it_stays_as_published(file, tmp_path) -> None:
    convert_checkpoint(file, tmp_path / "dit", num_heads=2)
    load_float(resolve(tmp_path / "dit")).save_pretrained(tmp_path / "saved")
    assert published_output(load_float(resolve(tmp_path / "saved")))


def test_diffusers_loads_every_tensor(file, tmp_path) -> None:
    convert_checkpoint(file, tmp_path / "dit", num_heads=2)
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "dit" / "transformer")
    assert not published_output(model), "diffusers has its own frequencies"
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert published_output(model)


def test_with_a_vae_it_is_a_pipeline(file, vae, tmp_path) -> None:
    convert_checkpoint(file, tmp_path / "dit", 2, vae)
    pipe = DiTPipeline.from_pretrained(tmp_path / "dit")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    pipe.transformer = load_float(resolve(tmp_path / "dit"))
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape[0] == 2
    assert resolve(tmp_path / "dit" / "transformer").vae == (tmp_path / "dit" / "vae").resolve()


def test_what_was_written_may_be_written_anew(file, vae, tmp_path) -> None:
    """A decoder with a card and a history, a component and code of the pipeline's own; what people edit is kept."""
    theirs, out = tmp_path / "theirs", tmp_path / "ours"
    convert_checkpoint(file, theirs, 2, vae)
    for name in ("vae/README.md", "vae/.git/HEAD", "tokenizer/vocab.json", "own.py"):
        (theirs / name).parent.mkdir(exist_ok=True)
        (theirs / name).touch()
    for name in ("vae/.git", "tokenizer"):
        (theirs / name / "deep").mkdir()
    index = read_json(theirs / "model_index.json")
    index |= {"_class_name": ["own", "OwnPipeline"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (theirs / "model_index.json").write_text(json.dumps(index))
    convert_checkpoint(theirs, out, official=True)
    (out / "README.md").write_text("my own words")
    (out / ".DS_Store").touch()
    convert_checkpoint(theirs, out, official=True, overwrite=True)
    assert (out / "README.md").read_text() == "my own words"
    assert (out / "tokenizer" / "vocab.json").is_file()
    assert not (out / "vae" / ".git").exists()
    (out / "notes.txt").touch()
    with pytest.raises(InputError, match="refusing to overwrite"):
        convert_checkpoint(theirs, out, official=True, overwrite=True)


def test_official_marks_a_folder(file, vae, tmp_path) -> None:
    folder = tmp_path / "theirs"
    convert_checkpoint(file, folder, 2, vae)
    path = folder / "transformer" / CONFIG
    theirs = {k: v for k, v in read_json(path).items() if k != FREQUENCY_SHIFT} | {"norm_eps": 1e-5}
    path.write_text(json.dumps(theirs))
    index = folder / "model_index.json"
    index.write_text(json.dumps(read_json(index) | {"id2label": {"3": "cat"}}))
    assert not published_output(load_float(resolve(folder)))
    with pytest.raises(InputError, match="in diffusers' format already; call it official"):
        convert_checkpoint(folder, tmp_path / "ours")
    convert_checkpoint(folder, tmp_path / "ours", official=True)
    source = resolve(tmp_path / "ours")
    assert published_output(load_float(source))
    assert source.config["norm_eps"] == 1e-6
    assert (source.scheduler, dict(source.labels)) == (resolve(folder).scheduler, {3: "cat"})
    assert source.vae is not None


def test_class_names_without_a_vae(pipeline, own_pipeline, tmp_path) -> None:
    convert_checkpoint(pipeline, tmp_path / "pipeline", official=True)
    (own_pipeline / LABELS).write_text(json.dumps(read_json(own_pipeline / "model_index.json")["id2label"]))
    (own_pipeline / "model_index.json").unlink()
    convert_checkpoint(own_pipeline, tmp_path / "alone", official=True)
    for name, file in (("pipeline", "model_index.json"), ("alone", LABELS)):
        assert (tmp_path / name / file).is_file()
        assert resolve(tmp_path / name).labels[3] == "class 3"


def test_class_names_from_a_file(file, vae, tmp_path) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"0": "tench, Tinca tinca", "9": "ostrich"}')
    convert_checkpoint(file, tmp_path / "alone", 2, labels=names)
    convert_checkpoint(file, tmp_path / "whole", 2, vae, names)
    for folder in ("alone", "whole"):
        assert class_indices(resolve(tmp_path / folder), ["tinca tinca", "ostrich"]) == [0, 9]
    names.write_text('{"tench": 0}')
    with pytest.raises(InputError, match=r"names\.json has the key 'tench', keys are class numbers"):
        convert_checkpoint(file, tmp_path / "dit", 2, labels=names)
    names.write_text('{"0": "tench", "1000": "no such class"}')
    with pytest.raises(InputError, match=r"names\.json names class 1000, the model has classes 0 to 9"):
        convert_checkpoint(file, tmp_path / "dit", 2, labels=names)
    assert not (tmp_path / "dit").exists()


def test_quantized_directly_or_as_a_folder_it_is_the_same(tmp_path, tiny_recipe) -> None:
    torch.save(random_dit(channels=1).state_dict(), tmp_path / "official.pt")
    convert_checkpoint(tmp_path / "official.pt", tmp_path / "dit", 2)
    recipe, source = tiny_recipe(rounds=0), resolve(tmp_path / "official.pt", 2)
    solutions = []
    for found in (source, resolve(tmp_path / "dit")):
        model = load_float(found)
        records = record(model, collect(model, found.scheduler, recipe), recipe)
        solutions.append(solve(model, records, recipe, TimeGroups.uniform(0, 1000, recipe.groups), Provenance()))
    first, second = solutions
    assert all(torch.equal(codes, second.codes[name]) for name, codes in first.codes.items())
    assert all(torch.equal(params.scale, second.params[name].scale) for name, params in first.params.items())
    assert first.model_config[FREQUENCY_SHIFT] == second.model_config[FREQUENCY_SHIFT] == 0


@pytest.mark.parametrize("shift", [2, -1, 0.0, True, "0", None])
def test_a_shift_that_is_none(file, tmp_path, shift: object) -> None:
    convert_checkpoint(file, tmp_path / "dit", 2)
    path = tmp_path / "dit" / "transformer" / CONFIG
    path.write_text(json.dumps(read_json(path) | {FREQUENCY_SHIFT: shift}))
    with pytest.raises(InputError, match=rf"config\.json: .*{FREQUENCY_SHIFT} = .*0 or 1"):
        resolve(tmp_path / "dit")


def test_nothing_is_overwritten_and_nothing_half_written(file, vae, tmp_path) -> None:
    refused = {"official.pt": r"official\.pt is a file; an artifact is a folder", ".": "exists; choose another folder"}
    for path, message in refused.items():
        with pytest.raises(InputError, match=message):
            convert_checkpoint(file, tmp_path / path, 2)
    with pytest.raises(InputError, match=r"config\.json is missing; a diffusers autoencoder has one"):
        convert_checkpoint(file, tmp_path / "dit", 2, tmp_path)
    (tmp_path / "empty").mkdir()
    decoder = {"_class_name": "AutoencoderKL", "latent_channels": 4}
    for config, message in [
        ({}, "has the class None, a decoder is an AutoencoderKL"),
        (decoder | {"latent_channels": 16}, "decodes latents of 16 channels, the model's have 4"),
        (decoder, r"no \.safetensors weights"),
    ]:
        (tmp_path / "empty" / CONFIG).write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            convert_checkpoint(file, tmp_path / "dit", 2, tmp_path / "empty")
    with pytest.raises(InputError, match=r"is inside .*, which is copied into it"):
        convert_checkpoint(file, vae / "dit", 2, vae)
    assert not (vae / "dit").exists()
    with pytest.raises(InputError, match="num_heads"):
        convert_checkpoint(file, tmp_path / "dit")
    assert not (tmp_path / "dit").exists()


def test_written_tensors_are_separate_and_fp32(tmp_path) -> None:
    from safetensors.torch import load_file

    state = {name: tensor.half() for name, tensor in random_dit().state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    convert_checkpoint(tmp_path / "half.pt", tmp_path / "dit", 2)
    tensors = load_file(tmp_path / "dit" / "transformer" / WEIGHTS)
    name = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight"
    assert torch.equal(tensors[name.format(0)], tensors[name.format(1)])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
