"""MODEL as a user gives it: folders that are right, and every way they can be wrong."""

import ast
import importlib.util
import json
import re
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from published_dit import random_dit
from safetensors.torch import load_file, save_file

from tqdit.architectures.dit_checkpoint import DIFFUSION
from tqdit.errors import AssumptionWarning, InputError
from tqdit.sampling.diffusion import SERVED, make_scheduler
from tqdit.sampling.guidance import Sampling
from tqdit.sources.labels import class_indices
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.sources.sizes import float_sizes
from tqdit.system.files import WEIGHTS


def edit_weights(root, change) -> None:
    path = root / "transformer" / WEIGHTS
    state = load_file(path)
    change(state)
    save_file(state, path)


def edit_config(root, **values: object) -> None:
    path = root / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_pipeline_folder(model, pipeline, scheduler_config) -> None:
    source = resolve(pipeline)
    assert source.name == "tiny-dit"
    assert source.scheduler == scheduler_config
    assert source.labels[3] == "class 3"
    assert source.vae is None
    assert not source.quantized
    loaded = load_float(source)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_transformer_folder_of_a_pipeline_is_that_pipeline(pipeline, monkeypatch) -> None:
    expected = resolve(pipeline)
    assert resolve(pipeline / "transformer") == expected
    monkeypatch.chdir(pipeline / "transformer")
    assert resolve(".").scheduler == expected.scheduler


def test_transformer_folder_alone(model, own_pipeline) -> None:
    shutil.move(own_pipeline / "transformer", own_pipeline.parent / "alone")
    with pytest.warns(AssumptionWarning, match="no scheduler; DiT's is taken"):
        source = resolve(own_pipeline.parent / "alone")
    assert (source.scheduler, source.vae, dict(source.labels)) == (DIFFUSION, None, {})
    assert weights_hash(load_float(source)) == weights_hash(model)


@pytest.mark.parametrize("value", [None, "int4", {"quant_method": "torchao"}])
def test_quantization_config_of_others(model, own_pipeline, value: object) -> None:
    edit_config(own_pipeline, quantization_config=value)
    source = resolve(own_pipeline)
    assert not source.quantized
    loaded = load_float(source)
    assert weights_hash(loaded) == weights_hash(model)
    assert "quantization_config" not in loaded.config


def test_config_that_diffusers_refuses(own_pipeline) -> None:
    edit_config(own_pipeline, dropout="small")
    with pytest.raises(InputError, match=r"config\.json: diffusers refuses it"):
        load_float(resolve(own_pipeline))


@pytest.mark.parametrize("total", ["1000", None, 0, True])
def test_scheduler_without_usable_timesteps(own_pipeline, total: object) -> None:
    (own_pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": total}))
    with pytest.raises(InputError, match=r"scheduler_config\.json: num_train_timesteps"):
        resolve(own_pipeline)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_bad_index_of_shards(own_pipeline, index: dict) -> None:
    (own_pipeline / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="weight_map"):
        load_float(resolve(own_pipeline))


def test_half_precision_weights_are_loaded_as_fp32(own_pipeline) -> None:
    edit_weights(own_pipeline, lambda state: state.update({n: t.half() for n, t in state.items()}))
    assert {p.dtype for p in load_float(resolve(own_pipeline)).parameters()} == {torch.float32}


def test_sharded_weights(model, own_pipeline) -> None:
    folder = own_pipeline / "transformer"
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: state[n] for n in names if weight_map[n] == shard}, folder / shard)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights_hash(load_float(resolve(own_pipeline))) == weights_hash(model)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(InputError, match="part-1"):
        load_float(resolve(own_pipeline))


def test_vae_folder_is_found(own_pipeline) -> None:
    (own_pipeline / "vae").mkdir()
    (own_pipeline / "vae" / "config.json").write_text("{}")
    assert resolve(own_pipeline).vae == own_pipeline / "vae"


def test_unknown_model_says_what_is_known() -> None:
    with pytest.raises(InputError, match=r"unknown model 'no-such-model'.*fashion-dit"):
        resolve("no-such-model")


def test_a_name_like_a_bundled_one_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"unknown model 'fashion-dot'; .*; did you mean 'fashion-dit'\?$"):
        resolve("fashion-dot")
    with pytest.raises(InputError, match=r"bundled model: fashion-dit$"):
        resolve("no-such-model")


def test_folder_without_a_config(tmp_path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        resolve(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_unreadable_config(own_pipeline, text: str) -> None:
    (own_pipeline / "transformer" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        resolve(own_pipeline)


def test_unsupported_class_is_named(own_pipeline) -> None:
    edit_config(own_pipeline, _class_name="UNet2DModel")
    with pytest.raises(InputError, match=r"config\.json: .*'UNet2DModel' is not supported"):
        resolve(own_pipeline)


def set_value(name: str, value: float):
    def change(state) -> None:
        state[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("proj_out_1.weight", float("nan")), "tensor 'proj_out_1.weight' is nan at index ["),
        (set_value("transformer_blocks.1.ff.net.2.bias", float("-inf")), "'transformer_blocks.1.ff.net.2.bias'"),
        (lambda s: s.pop("pos_embed.proj.bias"), "lack tensor 'pos_embed.proj.bias'"),
        (lambda s: s.update({"proj_out_2.weight": torch.zeros(8, 31)}), "'proj_out_2.weight' has shape (8, 31)"),
        (lambda s: s.update({"stranger": torch.zeros(1)}), "unexpected tensor 'stranger'"),
    ],
)
def test_bad_tensor_is_named(own_pipeline, change, message: str) -> None:
    edit_weights(own_pipeline, change)
    with pytest.raises(InputError, match=re.escape(message)):
        load_float(resolve(own_pipeline))


def test_config_of_another_size(own_pipeline) -> None:
    edit_config(own_pipeline, num_layers=3)
    with pytest.raises(InputError, match="num_layers = 3, the weights have 2 blocks"):
        load_float(resolve(own_pipeline))


def test_pickled_weights_are_refused(own_pipeline) -> None:
    folder = own_pipeline / "transformer"
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"pickled \.bin"):
        load_float(resolve(own_pipeline))


def test_no_weights_and_truncated_weights(own_pipeline) -> None:
    path = own_pipeline / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=WEIGHTS):
        load_float(resolve(own_pipeline))
    path.unlink()
    with pytest.raises(InputError, match=WEIGHTS):
        load_float(resolve(own_pipeline))


def test_classes_by_name_and_number(pipeline) -> None:
    source = resolve(pipeline)
    assert class_indices(source, ["class 3", "9", " Class 0 "]) == [3, 9, 0]


def test_class_with_several_names(own_pipeline) -> None:
    (own_pipeline / "model_index.json").write_text(json.dumps({"id2label": {"4": "tench, Tinca tinca"}}))
    assert class_indices(resolve(own_pipeline), ["tench", "tinca TINCA"]) == [4, 4]


@pytest.mark.parametrize("name", ["boot", "10", "-1", ""])
def test_unknown_class_is_named(pipeline, name: str) -> None:
    with pytest.raises(InputError, match=f"unknown class '{name}'; known: class 0.*from 0 to 9"):
        class_indices(resolve(pipeline), ["class 1", name])


def test_hash_sees_every_value_and_name(model, tiny_dit) -> None:
    other = tiny_dit()
    assert weights_hash(other) == weights_hash(model)
    other.proj_out_2.bias[0] += 1e-6
    assert weights_hash(other) != weights_hash(model)


def test_class_table_with_a_wrong_key(own_pipeline) -> None:
    (own_pipeline / "model_index.json").write_text('{"id2label": {"zero": "cat"}}')
    with pytest.raises(InputError, match="'zero'"):
        resolve(own_pipeline)
    (own_pipeline / "model_index.json").write_text('{"id2label": [1]}')
    with pytest.raises(InputError, match="id2label"):
        resolve(own_pipeline)


# What lies beside a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["transformer_ema", "checkpoint-500/transformer", "checkpoint-500/transformer_ema"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_transformer_in_a_pipeline_has_its_scheduler(
    own_pipeline, scheduler_config, place: str, indexed: bool
) -> None:
    shutil.copytree(own_pipeline / "transformer", own_pipeline / place)
    edit_weights_of(own_pipeline / place, lambda state: state.update({"proj_out_1.bias": state["proj_out_1.bias"] + 1}))
    if not indexed:
        (own_pipeline / "model_index.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        source = resolve(own_pipeline / place)
    assert source.scheduler == scheduler_config
    assert (source.labels.get(3) == "class 3") == indexed
    assert source.folder.resolve() == (own_pipeline / place).resolve()
    assert weights_hash(load_float(source)) != weights_hash(load_float(resolve(own_pipeline)))


def test_the_scheduler_of_a_neighbour_is_not_a_models_own(own_pipeline) -> None:
    """Two levels up is another matter, but for a trainer's checkpoint."""
    shutil.copytree(own_pipeline / "transformer", own_pipeline / "mine" / "transformer")
    with pytest.warns(AssumptionWarning, match="no scheduler"):
        resolve(own_pipeline / "mine" / "transformer")


def edit_weights_of(folder, change) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchLCMScheduler"}, "FlowMatchLCMScheduler' is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas is True"),
        ({"_class_name": "MyScheduler"}, "MyScheduler' is not supported; supported are DDIMScheduler"),
        ({"_class_name": ["my", "Scheduler"]}, "is not supported"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous"),
    ],
)
def test_a_scheduler_that_is_not_served_is_refused_by_name(own_pipeline, config: dict, message: str) -> None:
    (own_pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"scheduler_config\.json: .*{message}"):
        resolve(own_pipeline)


@pytest.mark.parametrize("name", SERVED)
def test_every_served_scheduler_has_the_process_that_ddim_samples_from(name: str) -> None:
    """The cumulative alphas of diffusers' own class are those that DDIM makes of its config."""
    if (kind := getattr(diffusers, name, None)) is None:
        pytest.skip(f"{name} is not in this diffusers")
    settings = {"beta_schedule": "scaled_linear", "num_train_timesteps": 500}
    try:
        own = kind(**settings)
    except ImportError:
        pytest.skip(f"{name} needs another package")
    for config in (own.config, {"_class_name": name, **settings}):  # with every setting, and with what is no default
        served = make_scheduler(config, Sampling("ddim", 10), learned_variance=False)
        assert torch.allclose(served.alphas_cumprod, own.alphas_cumprod)
        assert served.config.num_train_timesteps == 500


@pytest.mark.parametrize(
    ("name", "module"), [("LMSDiscrete", "lms_discrete"), ("SASolver", "sasolver"), ("DPMSolverSDE", "dpmsolver_sde")]
)
def test_a_class_whose_package_is_missing_has_its_own_betas(monkeypatch, name: str, module: str) -> None:
    """The defaults that the source of the class says, while diffusers has only a stand-in without them."""

    class StandIn:
        def __init__(self, *args: object, **kwargs: object) -> None:
            raise ImportError("another package is needed")

    found = importlib.util.find_spec(f"diffusers.schedulers.scheduling_{module}")
    init = next(
        method
        for kind in ast.walk(ast.parse(Path(found.origin).read_text()))
        if isinstance(kind, ast.ClassDef) and kind.name == f"{name}Scheduler"
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
    )
    defaults = dict(zip([argument.arg for argument in init.args.args][1:], init.args.defaults, strict=True))
    monkeypatch.setattr(diffusers, f"{name}Scheduler", StandIn)
    served = make_scheduler({"_class_name": f"{name}Scheduler"}, Sampling("ddim", 10), learned_variance=False)
    for setting in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert served.config[setting] == ast.literal_eval(defaults[setting]), setting


# What weights are stored as ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool])
def test_weights_that_are_no_floats_are_refused_by_name(own_pipeline, dtype: torch.dtype) -> None:
    name = "proj_out_1.weight"
    edit_weights(own_pipeline, lambda state: state.update({name: state[name].to(dtype)}))
    with pytest.raises(InputError, match=f"tensor '{name}' is stored as {str(dtype).removeprefix('torch.')}"):
        load_float(resolve(own_pipeline))


def test_the_first_value_that_is_no_number_is_named(own_pipeline) -> None:
    def change(state) -> None:
        state["proj_out_1.weight"][3, 5] = float("nan")
        state["proj_out_1.weight"][9, 2] = float("inf")

    edit_weights(own_pipeline, change)
    with pytest.raises(InputError, match=r"'proj_out_1\.weight' is nan at index \[3, 5\]"):
        load_float(resolve(own_pipeline))


def test_weights_of_a_compiled_model(model, own_pipeline) -> None:
    def change(state) -> None:
        for name in list(state):
            state[f"_orig_mod.{name}"] = state.pop(name)

    edit_weights(own_pipeline, change)
    assert weights_hash(load_float(resolve(own_pipeline))) == weights_hash(model)


def test_weights_as_one_variant_alone(model, own_pipeline) -> None:
    folder = own_pipeline / "transformer"
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.warns(AssumptionWarning, match="variant fp16"):
        assert weights_hash(load_float(resolve(own_pipeline))) == weights_hash(model)
    shutil.copy(folder / "diffusion_pytorch_model.fp16.safetensors", folder / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(InputError, match="variants ema, fp16 only"):
        load_float(resolve(own_pipeline))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 100_000},
        {"num_embeds_ada_norm": 10**6},
        {"sample_size": 2**20},
        {"attention_head_dim": 2**20},
        {"in_channels": 2**20, "out_channels": 2**21},
    ],
)
def test_a_config_that_claims_more_than_the_weights_is_refused_before_anything_is_built(own_pipeline, change) -> None:
    edit_config(own_pipeline, **change)
    with pytest.raises(InputError, match=r"num_layers|num_embeds_ada_norm|tokens; at most|pos_embed\.proj\.weight"):
        load_float(resolve(own_pipeline))


# Files of a model's folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}"])
def test_a_file_of_a_models_folder_means_the_folder(own_pipeline, name: str) -> None:
    assert resolve(own_pipeline / name).scheduler == resolve(own_pipeline).scheduler


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.fp16.safetensors", f"{WEIGHTS[:-12]}-00001-of-00002{WEIGHTS[-12:]}"]
)
def test_weights_that_are_not_read_with_their_folder_are_refused(own_pipeline, name: str) -> None:
    folder = own_pipeline / "transformer"
    shutil.copy(folder / WEIGHTS, folder / name)
    with pytest.raises(InputError, match=rf"{name} is not read with the config\.json beside it: {WEIGHTS} comes first"):
        resolve(folder / name)
    assert resolve(folder / WEIGHTS).folder == folder


def test_shards_come_before_a_file_with_everything(own_pipeline) -> None:
    folder = own_pipeline / "transformer"
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    shutil.copy(folder / WEIGHTS, folder / "part.safetensors")
    for name in ("part.safetensors", f"{WEIGHTS}.index.json"):
        assert resolve(folder / name).folder == folder
    with pytest.raises(InputError, match=r"part\.safetensors comes first"):
        resolve(folder / WEIGHTS)


def test_a_variant_alone_means_its_folder(own_pipeline) -> None:
    folder = own_pipeline / "transformer"
    variant = (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert resolve(variant).folder == folder


def test_a_checkpoint_beside_a_diffusers_model_is_that_checkpoint(own_pipeline) -> None:
    official = own_pipeline / "transformer" / "official.safetensors"
    save_file(random_dit().state_dict(), official)
    assert resolve(official, num_heads=2).checkpoint == official


@pytest.mark.parametrize("name", ["notes.json", "diffusion_pytorch_model.bin"])
def test_any_other_file_of_a_models_folder_is_no_model(own_pipeline, name: str) -> None:
    (own_pipeline / "transformer" / name).write_text("{}")
    with pytest.raises(InputError, match="neither a model's folder nor a checkpoint file"):
        resolve(own_pipeline / "transformer" / name)


def test_any_other_file_is_no_model(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="neither a model's folder nor a checkpoint file"):
        resolve(tmp_path / "notes.txt")


def test_classes_are_names_or_numbers(pipeline) -> None:
    source = resolve(pipeline)
    assert class_indices(source, ["class 3", 5, "7"]) == [3, 5, 7]
    for wrong in (10, -1, True, "9" * 5000, 1.5, None):
        with pytest.raises(InputError, match="unknown class"):
            class_indices(source, [wrong])


def test_a_number_is_a_number_even_where_a_name_is_one(own_pipeline) -> None:
    (own_pipeline / "model_index.json").write_text(json.dumps({"id2label": {"4": "7", "5": "tench"}}))
    assert class_indices(resolve(own_pipeline), [7, "7", "tench"]) == [7, 4, 5]


@pytest.mark.parametrize("label", [7, None, ["tench"], {"en": "tench"}])
def test_a_label_that_is_no_name_is_refused(own_pipeline, label: object) -> None:
    (own_pipeline / "model_index.json").write_text(json.dumps({"id2label": {"4": label}}))
    with pytest.raises(InputError, match="for class 4, names are strings"):
        resolve(own_pipeline)


@pytest.mark.parametrize("key", ["9" * 5000, "-1", "1.5", "²", ""])
def test_a_label_of_no_class_number_is_refused(own_pipeline, key: str) -> None:
    (own_pipeline / "model_index.json").write_text(json.dumps({"id2label": {key: "tench"}}))
    with pytest.raises(InputError, match="keys are class numbers"):
        resolve(own_pipeline)


def test_a_tensor_without_dimensions_is_named(own_pipeline) -> None:
    name = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    edit_weights(own_pipeline, lambda state: state.update({name: torch.zeros(())}))
    with pytest.raises(InputError, match="num_embeds_ada_norm = 10"):
        load_float(resolve(own_pipeline))


def test_many_blocks_of_small_tensors_are_refused_before_a_model_is_built(own_pipeline) -> None:
    """The file has the width in one tensor only; the weights of a block of that width would need 3 GiB each."""
    edit_config(own_pipeline, num_attention_heads=2**14, attention_head_dim=1)
    edit_weights(own_pipeline, lambda state: state.update({"pos_embed.proj.weight": torch.zeros(2**14, 1, 2, 2)}))
    with pytest.raises(InputError, match=r"has shape .* the config needs"):
        load_float(resolve(own_pipeline))


def test_the_size_of_a_variant_alone(model, own_pipeline) -> None:
    folder = own_pipeline / "transformer"
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.warns(AssumptionWarning, match="variant fp16"):
        loaded = load_float(resolve(own_pipeline))
    sizes = float_sizes(resolve(own_pipeline), loaded)
    assert sizes.file_bytes == sizes.float32_bytes == 4 * sum(p.numel() for p in model.parameters())
