"""Artifacts through diffusers' own methods: the same model bit for bit, and every trap on the way."""

import copy
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook, init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models import modeling_utils
from diffusers.quantizers import PipelineQuantizationConfig, auto
from safetensors.torch import load_file, save_file
from torch import nn

import tqdit
from tqdit import workflow
from tqdit.artifact import folder as artifact
from tqdit.artifact.tensors import MANIFEST_TENSOR
from tqdit.errors import InputError
from tqdit.integrations import on_import
from tqdit.integrations.diffusers import METHOD, TQDiTConfig, TQDiTQuantizer
from tqdit.runtime.convert import convert
from tqdit.runtime.integer import integer_class
from tqdit.sources.resolve import load_float, resolve
from tqdit.system.files import CONFIG, INDEX, MANIFEST, WEIGHTS

QUERY = "transformer_blocks.1.attn1.query"
RECIPES = [("paper", "w8a8"), ("plus", "w6a6"), ("plus", "w4a8")]


def load(folder: Path, **options: Any) -> Any:
    return DiTTransformer2DModel.from_pretrained(folder, **options)


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).sample


@pytest.fixture
def folder(tmp_path, solved) -> Path:
    """An artifact that a test may change."""
    (tmp_path / "artifact").mkdir()
    artifact.write(solved("plus", "w6a6"), tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture(scope="module")
def quantized_pipeline(tiny_dit, tiny_recipe, scheduler_config, tmp_path_factory) -> Path:
    """A pipeline with everything that `DiTPipeline` needs, its transformer in integers."""
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=1, block_out_channels=(8,), norm_num_groups=4).eval()
    transformer = tiny_dit(num_embeds_ada_norm=1000)  # the null class that DiTPipeline has in its code
    labels = {number: f"class {number}" for number in range(1000)}
    scheduler = DDIMScheduler.from_config(scheduler_config)
    DiTPipeline(transformer, vae, scheduler, id2label=labels).save_pretrained(root / "float")
    recipe = tiny_recipe("plus", "w6a6", rounds=0, hessian=False, samples=1, groups=2, steps=4)
    workflow.quantize(root / "float", root / "w6a6", recipe)
    return root / "w6a6"


def images_of(pipeline: DiTPipeline) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([3, 7], guidance_scale=1.5, generator=generator, num_inference_steps=2, output_type="np").images


class TestLoading:
    @pytest.mark.parametrize(("preset", "bits"), RECIPES)
    def test_the_same_model_as_ours(self, tmp_path, solved, model_inputs, preset: str, bits: str) -> None:
        artifact.write(solved(preset, bits), tmp_path)
        found = load(tmp_path)
        assert type(found) is integer_class("DiTTransformer2DModel")
        assert not found.training
        assert torch.equal(run(found, model_inputs), run(convert(solved(preset, bits)), model_inputs))
        assert found.quantization_report == convert(solved(preset, bits)).quantization_report

    def test_shards(self, folder, solved, model_inputs) -> None:
        expected = run(load(folder), model_inputs)
        artifact.write(solved("plus", "w6a6"), folder, shard_bytes=20_000)
        (folder / WEIGHTS).unlink()
        assert torch.equal(run(load(folder), model_inputs), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_scales_are_not_cast(self, folder, solved, model_inputs, dtype: torch.dtype) -> None:
        """`torch_dtype` is the dtype of inputs and outputs, and bf16 that of the residual stream, alone."""
        found = load(folder, torch_dtype=dtype)
        x = model_inputs["hidden_states"].to(dtype)
        output = run(found, model_inputs | {"hidden_states": x})
        assert found.dtype is output.dtype is dtype
        plain = convert(solved("plus", "w6a6"), dtype=found.stream_dtype)
        expected = run(plain, model_inputs | {"hidden_states": x.float()})
        assert expected.dtype is torch.float32
        assert torch.equal(output, expected.to(dtype))

    def test_moving_to_another_dtype_and_back_changes_nothing(self, solved, model_inputs) -> None:
        """diffusers refuses it for models that it has loaded itself."""
        found = convert(solved("plus", "w6a6"))
        expected = run(found, model_inputs)
        half = run(found.half(), model_inputs | {"hidden_states": model_inputs["hidden_states"].half()})
        assert found.dtype is half.dtype is torch.float16
        assert found.float().dtype is torch.float32
        assert torch.equal(run(found, model_inputs), expected)

    @pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}])
    def test_device_maps(self, folder, model_inputs, device_map: object) -> None:
        device = "cuda" if device_map in ("auto", "balanced") and torch.cuda.is_available() else "cpu"
        inputs = {name: x.to(device) for name, x in model_inputs.items()}
        found = load(folder, device_map=device_map)
        assert found.device.type == device
        assert torch.equal(run(found, inputs), run(load(folder).to(device), inputs))

    def test_several_devices_are_refused(self, folder) -> None:
        several = {"transformer_blocks.0": "cpu", "transformer_blocks.1": "cuda:0"}
        for device_map in (several, {"": "disk"}, {"": "meta"}, {}):
            with pytest.raises(InputError, match=f"one device; device_map is {re.escape(str(device_map))}"):
                load(folder, device_map=device_map)

    def test_settings_that_diffusers_has_got_since(self, folder, model_inputs, monkeypatch) -> None:
        """It fills them in with their defaults; the artifact was written before there were any."""
        expected = run(load(folder), model_inputs)
        stored = load_file(folder / WEIGHTS)
        manifest = json.loads(bytes(stored[MANIFEST_TENSOR].tolist()))
        del manifest["model_config"]["norm_eps"]
        data = json.dumps(manifest).encode()
        stored[MANIFEST_TENSOR] = torch.tensor(list(data), dtype=torch.uint8)
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((folder / CONFIG).read_text())
        del config["norm_eps"]
        config["quantization_config"]["manifest_sha256"] = hashlib.sha256(data).hexdigest()
        (folder / CONFIG).write_text(json.dumps(config))
        assert torch.equal(run(load(folder), model_inputs), expected)
        assert torch.equal(run(tqdit.load(folder), model_inputs), expected)

    def test_tensors_that_diffusers_drops(self, folder) -> None:
        with pytest.raises(InputError, match=r"diffusers gave no '.*'; load without ignore_mismatched_sizes"):
            load(folder, ignore_mismatched_sizes=True)

    def test_through_the_class_of_an_integer_model(self, folder, pipeline, model_inputs) -> None:
        kind = type(load(folder))
        assert torch.equal(run(kind.from_pretrained(folder), model_inputs), run(load(folder), model_inputs))
        assert type(kind.from_pretrained(pipeline / "transformer")) is DiTTransformer2DModel
        assert type(kind.from_config(load(folder).config)) is DiTTransformer2DModel

    def test_a_float_model_is_not_quantized_on_loading(self, pipeline, quantized_pipeline) -> None:
        with pytest.raises(InputError, match="calibrated: run `tqdit quantize"):
            load(pipeline / "transformer", quantization_config=TQDiTConfig())
        mapping = PipelineQuantizationConfig(quant_mapping={"transformer": TQDiTConfig()})
        with pytest.raises(InputError, match="calibrated: run `tqdit quantize"):
            DiTPipeline.from_pretrained(quantized_pipeline.parent / "float", quantization_config=mapping)
        with pytest.warns(UserWarning, match="already has"):
            assert DiTPipeline.from_pretrained(quantized_pipeline, quantization_config=mapping)


class TestDamage:
    """diffusers warns about a missing tensor and sees neither a flipped bit nor another dtype."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop(f"{QUERY}.scale"), rf"lacks tensor '{QUERY}\.scale'"),
            (lambda t: t.pop("tqdit.manifest"), r"lacks tensor 'tqdit\.manifest'"),
            (lambda t: t[f"{QUERY}.zero_point"].add_(1), rf"'{QUERY}\.zero_point' has sha256"),
            (lambda t: t.update({"proj_out_1.bias": t["proj_out_1.bias"].half()}), r"'proj_out_1\.bias' has dtype"),
            (lambda t: t.update(stranger=torch.zeros(3)), "unexpected tensor 'stranger'"),
        ],
    )
    def test_is_an_error_that_names_the_tensor(self, folder, change, message: str) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            load(folder)

    def test_of_the_config(self, folder) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"sample_size": 16}))
        with pytest.raises(InputError, match=r"config\.json was changed: sample_size is 16, not 8"):
            load(folder)

    def test_of_the_config_that_is_another_format(self, folder) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["quantization_config"] |= {"format_version": 1, "manifest": "tqdit.json"}
        (folder / CONFIG).write_text(json.dumps(config))
        with pytest.raises(InputError, match="artifact format 1 is not supported"):
            load(folder)


class TestSaving:
    @pytest.mark.parametrize("backend", ["auto", "cpu", "reference", "simulated"])
    def test_gives_the_same_bytes(self, folder, solved, tmp_path, backend: str) -> None:
        convert(solved("plus", "w6a6"), backend).save_pretrained(tmp_path / "saved")
        for name in (WEIGHTS, CONFIG, MANIFEST):
            assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes(), name

    def test_codes_that_onednn_packed(self, folder, solved, tmp_path, monkeypatch) -> None:
        from tqdit.backends import panels

        monkeypatch.setattr(panels, "supported", lambda depth: False)
        convert(solved("plus", "w6a6"), "cpu").save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()

    def test_a_loaded_model_with_shards(self, folder, tmp_path, model_inputs) -> None:
        found = load(folder)
        found.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
        assert (tmp_path / "saved" / INDEX).is_file()
        again = load(tmp_path / "saved")
        assert torch.equal(run(again, model_inputs), run(found, model_inputs))
        assert torch.equal(run(tqdit.load(tmp_path / "saved"), model_inputs), run(found, model_inputs))
        again.save_pretrained(tmp_path / "saved")
        assert not list((tmp_path / "saved").glob("*-of-*"))
        assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()

    def test_an_interrupted_one_leaves_the_former(self, folder, solved, model_inputs, monkeypatch) -> None:
        expected = run(load(folder), model_inputs)
        other = convert(solved("paper", "w8a8"))

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(artifact, "seal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(folder)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        assert torch.equal(run(load(folder), model_inputs), expected)

    @pytest.mark.parametrize("name", ["README.md", "vae", ".git"])
    def test_over_other_files_is_refused(self, folder, solved, name: str) -> None:
        (folder / name).mkdir()
        before = sorted(folder.iterdir())
        with pytest.raises(InputError, match=f"has '{name}', which saving would remove"):
            convert(solved()).save_pretrained(folder)
        assert sorted(folder.iterdir()) == before

    def test_over_what_programs_leave(self, folder, solved) -> None:
        (folder / ".cache" / "huggingface").mkdir(parents=True)
        (folder / ".DS_Store").touch()
        convert(solved()).save_pretrained(folder)
        assert not (folder / ".DS_Store").exists()

    def test_over_a_float_model_is_refused(self, own_pipeline, solved) -> None:
        with pytest.raises(InputError, match="is not an artifact; refusing to overwrite it"):
            convert(solved()).save_pretrained(own_pipeline / "transformer")

    @pytest.mark.parametrize(
        ("options", "name"),
        [({"variant": "fp16"}, "variant='fp16'"), ({"safe_serialization": False}, "safe_serialization=False"),
         ({"push_to_hub": True}, "push_to_hub=True")],
    )  # fmt: skip
    def test_what_an_artifact_does_not_have(self, solved, tmp_path, options: dict, name: str) -> None:
        with pytest.raises(InputError, match=f"does not support {name}"):
            convert(solved()).save_pretrained(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


class TestPipelines:
    def test_load_and_sample(self, quantized_pipeline) -> None:
        found = DiTPipeline.from_pretrained(quantized_pipeline)
        assert type(found.transformer) is integer_class("DiTTransformer2DModel")
        images = images_of(found)
        assert images.shape == (2, 8, 8, 3)
        ours = DiTPipeline.from_pretrained(quantized_pipeline, transformer=tqdit.load(quantized_pipeline))
        assert (images_of(ours) == images).all()

    def test_the_example_of_the_readme(self, quantized_pipeline, tmp_path, monkeypatch) -> None:
        text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
        (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "DiTPipeline" in block]
        monkeypatch.chdir(tmp_path)
        Path("dit-w8a8").symlink_to(quantized_pipeline)
        asked: list[Any] = []
        monkeypatch.setattr(tqdit, "quantize", lambda *given: asked.extend(given))  # the fixture has done it
        names: dict[str, Any] = {}
        exec(code, names)
        assert asked[1] == "dit-w8a8"
        assert names["pipe"].transformer.quantization_backend == "cpu"
        assert len(names["images"]) == 2

    def test_save_and_load_again(self, quantized_pipeline, tmp_path) -> None:
        found = DiTPipeline.from_pretrained(quantized_pipeline)
        found.save_pretrained(tmp_path / "saved")
        name = Path("transformer", WEIGHTS)
        assert (tmp_path / "saved" / name).read_bytes() == (quantized_pipeline / name).read_bytes()
        assert (images_of(DiTPipeline.from_pretrained(tmp_path / "saved")) == images_of(found)).all()
        assert tqdit.sample(tmp_path / "saved", ["3"], 1, tqdit.Sampling("ddim", 2, 1.5)).shape == (1, 3, 8, 8)

    def test_saved_over_itself(self, quantized_pipeline, tmp_path) -> None:
        """diffusers writes model_index.json anew: the seal of what was there no longer holds."""
        copied = shutil.copytree(quantized_pipeline, tmp_path / "copy")
        DiTPipeline.from_pretrained(copied).save_pretrained(copied)
        tqdit.load(copied)
        assert (copied / "transformer" / MANIFEST).is_file()

    @pytest.mark.parametrize("how", ["from another", "beside another"])
    def test_from_pipe(self, quantized_pipeline, tmp_path, how: str) -> None:
        """diffusers compares classes: an integer model's is equal to that of the model which it stands for."""
        found = DiTPipeline.from_pretrained(quantized_pipeline)
        if how == "from another":
            made = DiTPipeline.from_pipe(found)
        else:
            float_one = DiTPipeline.from_pretrained(quantized_pipeline.parent / "float")
            made = DiTPipeline.from_pipe(float_one, transformer=found.transformer)
        assert made.transformer is found.transformer
        assert (images_of(made) == images_of(found)).all()
        made.save_pretrained(tmp_path / "saved")
        again = DiTPipeline.from_pretrained(tmp_path / "saved")
        assert type(again.transformer) is integer_class("DiTTransformer2DModel")
        assert (images_of(again) == images_of(found)).all()
        assert type(DiTPipeline.from_pipe(again).transformer) is integer_class("DiTTransformer2DModel")

    @pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "vae/config.json", "model_index.json"])
    def test_a_sealed_file_that_was_changed(self, quantized_pipeline, tmp_path, name: str) -> None:
        copied = Path(shutil.copytree(quantized_pipeline, tmp_path / "copy"))
        (copied / name).write_text((copied / name).read_text() + " ")
        with pytest.raises(InputError, match=rf"{re.escape(str(copied / name))} was changed"):
            load(copied / "transformer")

    def test_in_half_precision(self, quantized_pipeline) -> None:
        found = DiTPipeline.from_pretrained(quantized_pipeline, torch_dtype=torch.bfloat16)
        assert found.vae.dtype is found.transformer.dtype is torch.bfloat16
        assert images_of(found).shape == (2, 8, 8, 3)

    def test_a_published_one_names_its_transformer_by_an_older_class(self, quantized_pipeline, tmp_path) -> None:
        root = Path(shutil.copytree(quantized_pipeline.parent / "float", tmp_path / "old"))
        index = json.loads((root / "model_index.json").read_text())
        index["transformer"] = ["diffusers", "Transformer2DModel"]
        (root / "model_index.json").write_text(json.dumps(index))
        recipe = tqdit.Recipe("paper", rounds=0, hessian=False, samples=1, groups=2, steps=4)
        tqdit.quantize(root, tmp_path / "w8a8", recipe)
        assert type(DiTPipeline.from_pretrained(tmp_path / "w8a8").transformer) is integer_class(
            "DiTTransformer2DModel"
        )


class TestMessages:
    @pytest.mark.parametrize("name", ["proj_out_1.bias.copy", "forward.x", "a..b", "config", "dtype", "_modules", "x"])
    def test_tensors_of_any_name(self, folder, name: str) -> None:
        stored = load_file(folder / WEIGHTS)
        save_file(stored | {name: torch.zeros(2)}, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError) as caught:
            load(folder)
        assert str(caught.value) == f"{folder}: has an unexpected tensor '{name}'"

    def test_a_missing_tensor(self, folder) -> None:
        stored = load_file(folder / WEIGHTS)
        del stored["proj_out_1.bias"]
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"^{re.escape(str(folder))}: lacks tensor 'proj_out_1.bias'$"):
            load(folder)

    def test_a_setting_that_is_kept_is_not_said_to_be_ignored(self, tiny_dit, solved, tmp_path, caplog) -> None:
        """Of a float model diffusers says it, and there it is true."""
        setting = {"timestep_downscale_freq_shift": 0}
        solution = replace(solved("plus"), model_config={**solved("plus").model_config, **setting})
        (tmp_path / "artifact").mkdir()
        artifact.write(solution, tmp_path / "artifact")
        tiny_dit().save_pretrained(tmp_path / "float")
        config = json.loads((tmp_path / "float" / CONFIG).read_text())
        (tmp_path / "float" / CONFIG).write_text(json.dumps(config | setting))
        logger = logging.getLogger("diffusers.configuration_utils")
        logger.addHandler(caplog.handler)
        try:
            assert load(tmp_path / "artifact").config.timestep_downscale_freq_shift == 0
            assert not caplog.records
            load(tmp_path / "float")
            assert "will be ignored" in caplog.text
        finally:
            logger.removeHandler(caplog.handler)


class TestThreads:
    """accelerate changes torch for all threads while one of them makes an empty model."""

    def test_tqdit_changes_nothing_for_others(self, folder, monkeypatch) -> None:
        def refused(*_: Any) -> None:
            raise AssertionError("accelerate's context is not for libraries")

        monkeypatch.setattr("accelerate.big_modeling.init_on_device", refused)
        before = nn.Module.register_parameter
        building = threading.Event(), threading.Event()
        original = DiTTransformer2DModel.from_config.__func__

        def watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
            building[0].set()
            assert building[1].wait(10)
            return original(cls, *args, **kwargs)

        monkeypatch.setattr(DiTTransformer2DModel, "from_config", classmethod(watched))
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(tqdit.load, folder)
            assert building[0].wait(10)
            assert nn.Linear(2, 2).weight.device.type == "cpu"
            assert nn.Module.register_parameter is before
            building[1].set()
            job.result()

    @pytest.mark.parametrize("loader", ["tqdit", "diffusers"])
    def test_loads_are_right_while_another_thread_makes_empty_models(self, folder, model_inputs, loader: str) -> None:
        expected = run(tqdit.load(folder), model_inputs)
        with init_empty_weights():  # as another thread's would be, if that had begun before and ended after
            found = tqdit.load(folder) if loader == "tqdit" else load(folder)
        assert torch.equal(run(found, model_inputs), expected)

    def test_a_float_model_too(self, pipeline, model) -> None:
        with init_empty_weights():
            found = load_float(resolve(pipeline))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())

    @pytest.mark.parametrize("loader", ["tqdit", "diffusers"])
    def test_eight_threads(self, folder, model_inputs, loader: str) -> None:
        expected = run(tqdit.load(folder), model_inputs)
        make = tqdit.load if loader == "tqdit" else load
        before = nn.Module.register_parameter
        try:
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda _: run(make(folder), model_inputs), range(16)))
            assert nn.Module.register_parameter is before or loader == "diffusers"  # diffusers may leave it changed
        finally:
            nn.Module.register_parameter = before
        assert all(torch.equal(one, expected) for one in found)


class TestModel:
    def test_deep_copies(self, folder, model_inputs) -> None:
        found = load(folder)
        twin = copy.deepcopy(found)
        expected = run(found, model_inputs)
        del found
        assert torch.equal(run(twin, model_inputs), expected)
        assert twin.solution.codes["proj_out_1.weight"].dtype is torch.int8
        places = twin.solution.codes._places.values()
        assert {id(place.layer) for place in places} <= {id(module) for module in twin.modules()}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_whatever_torch_makes_tensors_of(self, folder, model_inputs, dtype: torch.dtype) -> None:
        expected = run(load(folder), model_inputs)
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(run(load(folder), model_inputs), expected)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_blocks_have_the_names_that_diffusers_asks_for(self, folder) -> None:
        found = load(folder)
        names = {type(block).__name__ for block in found.transformer_blocks}
        assert names == set(found._no_split_modules) == set(found._repeated_blocks)

    def test_loading_and_converting_in_several_threads(self, folder, model_inputs) -> None:
        shared = load(folder)
        expected = run(shared, model_inputs)
        shared.prepared_for = "another"
        with ThreadPoolExecutor(4) as pool:
            loaded = list(pool.map(lambda _: run(tqdit.load(folder), model_inputs), range(6)))
            called = list(pool.map(lambda _: run(shared, model_inputs), range(6)))
        assert all(torch.equal(found, expected) for found in loaded + called)
        assert nn.Linear(1, 1).weight.device.type == "cpu"

    def test_a_call_on_another_kind_of_device_converts_again(self, folder, model_inputs) -> None:
        found = load(folder)
        expected, layers = run(found, model_inputs), found.transformer_blocks
        found.prepared_for = "another"
        assert torch.equal(run(found, model_inputs), expected)
        assert found.transformer_blocks is not layers
        assert found.prepared_for == "cpu"
        again = found.transformer_blocks
        run(found, model_inputs)
        assert found.transformer_blocks is again

    def test_converted_again_for_a_gpu_calls_are_graphs(self, folder) -> None:
        """The backend for CPUs has none; a pipeline that is loaded on the CPU and moved must not lose them."""
        found = load(folder)
        assert not found.runtime.graphs
        assert found.adopt(convert(found.solution, "triton")).runtime.graphs

    def test_a_backend_that_was_asked_for_does_not_change(self, solved, model_inputs, monkeypatch) -> None:
        model = convert(solved(), "reference")
        model.prepared_for = "another"
        run(model, model_inputs)
        assert model.quantization_backend == "reference"

    def test_offloading(self, folder, model_inputs) -> None:
        found = load(folder)
        expected = run(found, model_inputs)
        found, hook = cpu_offload_with_hook(found, "cpu")
        assert torch.equal(run(found, model_inputs), expected)
        hook.offload()
        assert torch.equal(run(found, model_inputs), expected)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_pipeline_that_offloads_runs_on_the_gpu(self, quantized_pipeline) -> None:
        found = DiTPipeline.from_pretrained(quantized_pipeline)
        found.enable_model_cpu_offload()
        first = images_of(found)
        assert found.transformer.quantization_backend == "triton"
        assert found.transformer.device.type == "cpu"
        assert (images_of(found) == first).all()


class TestConfig:
    def test_is_small_and_prints(self, folder) -> None:
        config = load(folder).config.quantization_config
        most = getattr(modeling_utils, "_MAX_QUANT_CONFIG_USER_AGENT_CHARS", 2048)  # from diffusers 0.40 on
        assert len(json.dumps(config.to_dict())) < most
        assert '"weight_bits": 6' in repr(config)
        assert config.quant_method.value == "tqdit"
        assert TQDiTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    def test_of_another_method(self) -> None:
        with pytest.raises(InputError, match="quant_method is 'gguf'"):
            TQDiTConfig(quant_method="gguf")


class TestRegistration:
    def test_twice_is_once(self) -> None:
        before = list(sys.meta_path)
        on_import.register_with_diffusers()
        assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is TQDiTQuantizer
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is TQDiTConfig
        assert sys.meta_path == before

    def test_does_not_overwrite(self, monkeypatch) -> None:
        monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, METHOD, int)
        monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
        on_import.register_with_diffusers()
        assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is int
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is TQDiTConfig

    @pytest.mark.parametrize(
        "first",
        ["import sys, tqdit; assert not {'torch', 'diffusers'} & set(sys.modules)",
         pytest.param("from tqdit import TQDiTConfig", marks=pytest.mark.long),
         pytest.param("import tqdit.integrations.diffusers", marks=pytest.mark.long),
         pytest.param("import diffusers.quantizers.auto, tqdit", marks=pytest.mark.long)],
    )  # fmt: skip
    def test_whatever_is_imported_first(self, first: str) -> None:
        code = (
            f"{first}\nimport sys\nfrom diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
            "assert 'tqdit' in table\n"
            "assert not [finder for finder in sys.meta_path if 'tqdit' in type(finder).__module__]\n"
            "del table['tqdit']\n"
            "for name in [name for name in sys.modules if name.partition('.')[0] == 'tqdit']: del sys.modules[name]\n"
            "import tqdit\n"
            "assert 'tqdit' in table, 'tqdit comes after diffusers'"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
