"""Official SiT checkpoints: the model in diffusers' conventions is the published one, run the other way."""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from published_dit import PublishedSiT, euler, random_dit, random_sit, sinusoids

from tqdit import workflow
from tqdit.architectures import dit_checkpoint, timestep
from tqdit.architectures.building import new_model
from tqdit.architectures.shapes import shape_config
from tqdit.architectures.timestep import OFFSET, SCALE
from tqdit.errors import AssumptionWarning, InputError
from tqdit.sources import checkpoints
from tqdit.sources.export import convert_checkpoint
from tqdit.sources.labels import LABELS
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.system.files import CONFIG, read_json

Writer = Callable[..., Path]
TIMES = torch.tensor([0.0, 1.0, 333.25, 500.0, 987.6543, 1000.0])
UNSAID: dict[str, Any] = {"path_type": None, "prediction": None}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}


@pytest.fixture(autouse=True)
def _tiny_width_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit_checkpoint, "HEADS", {32: 2, **dit_checkpoint.HEADS})


@pytest.fixture
def file(tmp_path: Path) -> Writer:
    """Writes a tiny training checkpoint with the arguments of SiT's trainer, changed by the keywords."""

    def write(published: PublishedSiT | None = None, **arguments: object) -> Path:
        tensors, path = (published or random_sit()).state_dict(), tmp_path / "0050000.pt"
        said = {"model": "SiT-mine", "num_classes": 10, "path_type": "Linear", "prediction": "velocity"}
        args = argparse.Namespace(**said | arguments, loss_weight=None, train_eps=1e-5, cfg_scale=4.0)
        torch.save({"model": random_dit(1).state_dict(), "ema": tensors, "opt": {}, "args": args}, path)
        return path

    return write


@pytest.fixture
def bare(tmp_path: Path) -> Writer:
    """Writes a file of weights alone, as the published one is."""

    def write(name: str = "weights.pt") -> Path:
        torch.save(random_sit().state_dict(), tmp_path / name)
        return tmp_path / name

    return write


@torch.inference_mode()
def same(expected: PublishedSiT, found: torch.nn.Module, side: int = 8) -> bool:
    """Whether a model in diffusers' conventions is the published one, at several times and classes."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(TIMES), expected.x_embedder.proj.in_channels, side, side, generator=generator)
    null = expected.y_embedder.embedding_table.num_embeddings - 1
    y = torch.tensor([0, 1, null, 2, null - 1, null]).clamp(max=null)
    wanted = -expected(x, 1 - TIMES / 1000, y)
    output = found(x, timestep=TIMES, class_labels=y).sample
    return output.shape == wanted.shape and torch.allclose(wanted, output, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"learned_sigma": False}, {"patch": 4, "side": 16, "channels": 3}, {"channels": 1, "classes": 2, "depth": 1}],
)
def test_a_loaded_model_is_the_published_one(file: Writer, sizes: dict[str, Any]) -> None:
    model = random_sit(**sizes)
    source = resolve(file(model, num_classes=sizes.get("classes", 10)))
    assert source.weights == "ema"
    assert source.scheduler == SCHEDULER
    assert source.config["out_channels"] == source.config["in_channels"] == sizes.get("channels", 4)
    assert same(model, load_float(source), sizes.get("side", 8))


def test_converted_it_is_the_published_one_in_diffusers_conventions(file: Writer, tmp_path: Path) -> None:
    result = convert_checkpoint(file(), tmp_path / "sit")
    assert {SCALE: -0.001, OFFSET: 1.0}.items() <= result["config"].items()
    assert read_json(tmp_path / "sit" / "scheduler" / "scheduler_config.json") == SCHEDULER
    assert sorted(path.name for path in (tmp_path / "sit").iterdir()) == ["scheduler", "transformer"]
    source = resolve(tmp_path / "sit")
    model = load_float(source)
    assert same(random_sit(), model)
    assert weights_hash(model) == weights_hash(load_float(resolve(file())))
    model.save_pretrained(tmp_path / "again")
    saved = load_float(checked_source(tmp_path / "again"))
    assert same(random_sit(), saved)


def checked_source(folder: Path) -> Any:
    with pytest.warns(AssumptionWarning, match="no scheduler; SiT's is taken: flow matching"):
        source = resolve(folder)
    assert source.scheduler == SCHEDULER
    return source


def test_an_image_by_diffusers_is_that_of_the_published_sampler(file: Writer) -> None:
    model, steps, y = load_float(resolve(file())), 7, torch.tensor([3, 10])
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    noise = torch.randn(2, 4, 8, 8)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    x = noise
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, timestep=t.expand(2), class_labels=y).sample, t, x).prev_sample
    expected = euler(random_sit(), noise, y, torch.linspace(0, 1, steps + 1))
    assert (expected - noise).abs().max() > 0.5
    assert torch.allclose(x, expected, rtol=0, atol=1e-4)


def test_weights_alone_need_the_objective(bare: Writer, tmp_path: Path) -> None:
    with pytest.warns(AssumptionWarning, match="nothing says how.*SiT's linear path"):
        convert_checkpoint(bare(), tmp_path / "flow", objective="flow")
    assert same(random_sit(), load_float(resolve(tmp_path / "flow")))
    with pytest.warns(AssumptionWarning, match="nothing says how.*DiT's 1000 linear betas"):
        assert resolve(bare()).config["out_channels"] == 8
    for name in ("SiT-XL-2-256x256.pt", "sit_b.pt"):
        with pytest.raises(InputError, match=r"called a SiT, and nothing in it says .*objective, flow or diffusion"):
            resolve(bare(name))
        with pytest.warns(AssumptionWarning):
            assert SCALE in resolve(bare(name), objective="flow").config
        with pytest.warns(AssumptionWarning):
            assert SCALE not in resolve(bare(name), objective="diffusion").config


def test_arguments_of_a_sit_say_it_all(file: Writer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        for arguments in ({}, UNSAID, {"model": "X"}, {"model": "", "path_type": None}):
            assert checkpoints.read(file(**arguments)).objective == "flow"
        assert checkpoints.read(file(), objective="flow").objective == "flow"


@pytest.mark.parametrize(
    ("arguments", "objective", "message"),
    [
        ({"path_type": "GVP"}, None, "path_type 'GVP'; supported of a SiT checkpoint is 'Linear'"),
        ({"path_type": "VP"}, "flow", "path_type 'VP'"),
        ({"path_type": "linear"}, None, "path_type 'linear'; .*'Linear'"),
        ({"prediction": "noise"}, None, "prediction 'noise'; .*'velocity'"),
        ({"prediction": "score"}, None, "prediction 'score'"),
        ({"prediction": "v"}, None, "prediction 'v'"),
        ({}, "diffusion", "trained by flow .*SiT-mine, path_type Linear.*the objective given is diffusion"),
        ({"model": "DiT-S/2", **UNSAID}, "flow", "trained by diffusion .*DiT-S/2.*is flow"),
        ({}, "flows", "unknown objective 'flows'; known: diffusion, flow"),
        ({"model": "SiT-S/2"}, None, "model SiT-S/2, which has layers 12; its tensors have 2"),
        ({"num_classes": 11}, None, "without a null class"),
    ],
)
def test_what_is_no_sit_is_refused_by_name(
    file: Writer, arguments: dict[str, Any], objective: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=rf"0050000\.pt: .*{message}"):
        resolve(file(**arguments), objective=objective)


def test_an_objective_is_for_checkpoints() -> None:
    with pytest.raises(InputError, match=r"an objective is for a checkpoint file .*scheduler says"):
        resolve("fashion-dit", objective="flow")


def test_with_a_decoder_it_is_no_pipeline_of_diffusers(file: Writer, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), latent_channels=4).save_pretrained(tmp_path / "vae")
    (tmp_path / "names.json").write_text('{"3": "cat"}')
    for overwrite in (False, True):
        convert_checkpoint(
            file(), tmp_path / "sit", vae=tmp_path / "vae", labels=tmp_path / "names.json", overwrite=overwrite
        )
    assert not (tmp_path / "sit" / "model_index.json").exists()
    assert (tmp_path / "sit" / LABELS).is_file()
    source = resolve(tmp_path / "sit")
    assert source.vae == tmp_path / "sit" / "vae"
    assert source.labels == {3: "cat"}


# The timestep's scale and offset ----------------------------------------------------------------------------------


def test_shapes_of_sit_are_those_of_dit_without_the_variance() -> None:
    for name in ("S/2", "B/4", "L/8", "XL/2@512"):
        assert shape_config(f"SiT-{name}") == shape_config(f"DiT-{name}") | {"out_channels": 4}


@pytest.mark.parametrize("t", [torch.tensor([0, 17, 999]), torch.tensor([0.5, 17.25, 1000.0])])
def test_every_block_embeds_the_scaled_timestep(tiny_dit: Callable[..., Any], t: torch.Tensor) -> None:
    config = {"_class_name": "DiTTransformer2DModel", **tiny_dit().config}
    plain, scaled = new_model(config), new_model({**config, SCALE: -0.5, OFFSET: 3})
    for first, second in zip(plain.transformer_blocks, scaled.transformer_blocks, strict=True):
        assert torch.equal(second.norm1.emb.time_proj(t), first.norm1.emb.time_proj(3 - t / 2))
    assert (scaled.config[SCALE], scaled.config[OFFSET]) == (-0.5, 3)
    assert plain.state_dict().keys() == scaled.state_dict().keys()


def test_models_of_another_time_have_another_hash(file: Writer) -> None:
    model = load_float(resolve(file()))
    hashes = {weights_hash(model)}
    for change in ({OFFSET: 0.5}, {SCALE: 1.0}, {OFFSET: 0.0}):
        model.register_to_config(**change)
        hashes.add(weights_hash(model))
    assert len(hashes) == 4
    model.register_to_config(**timestep.DEFAULTS)
    assert weights_hash(model) not in hashes - {weights_hash(model)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (SCALE, 0),
        (SCALE, True),
        (SCALE, "1"),
        (OFFSET, None),
        (OFFSET, 2e6),
    ],
)
def test_a_time_that_is_none(file: Writer, tmp_path: Path, key: str, value: object) -> None:
    convert_checkpoint(file(), tmp_path / "sit")
    path = tmp_path / "sit" / "transformer" / CONFIG
    path.write_text(json.dumps(read_json(path) | {key: value}))
    with pytest.raises(InputError, match=rf"config\.json: .*{key} = .*it must be a number from -1000000 to 1000000"):
        resolve(tmp_path / "sit")


# Quantized --------------------------------------------------------------------------------------------------------


def embeds_published_times(model: torch.nn.Module) -> bool:
    """Whether all embedders of a model of integers embed SiT's time, for numbers of any type."""
    t = torch.tensor([0, 17, 999])
    projections = [embedder.time_proj for embedder in model.conditioning.embedders]
    return all(
        torch.allclose(projection(timestep), sinusoids(1 - t / 1000), rtol=0, atol=1e-6)
        for projection in projections
        for timestep in (t, t.float())
    )


def test_quantized_the_time_stays_that_of_sit(file: Writer, tmp_path: Path, tiny_recipe: Callable[..., Any]) -> None:
    convert_checkpoint(file(random_sit(channels=1)), tmp_path / "sit")
    workflow.quantize(tmp_path / "sit", tmp_path / "w8a8", tiny_recipe(preset="plus", rounds=0, hessian=False))
    config = resolve(tmp_path / "w8a8").config
    assert timestep.changed(config) == {SCALE: -0.001, OFFSET: 1.0}
    integer = workflow.load(tmp_path / "w8a8", backend="reference")
    assert embeds_published_times(integer)
    assert embeds_published_times(DiTTransformer2DModel.from_pretrained(tmp_path / "w8a8"))
    integer.save_pretrained(tmp_path / "again")
    with pytest.warns(AssumptionWarning, match="no scheduler; SiT's is taken"):
        assert embeds_published_times(workflow.load(tmp_path / "again"))


def test_diffusers_says_only_of_a_float_model_that_it_ignores_the_time(
    file: Writer, tmp_path: Path, tiny_recipe: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    convert_checkpoint(file(random_sit(channels=1)), tmp_path / "sit")
    workflow.quantize(tmp_path / "sit", tmp_path / "w8a8", tiny_recipe(preset="plus", rounds=0, hessian=False))
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        DiTTransformer2DModel.from_pretrained(tmp_path / "w8a8")
        assert not caplog.records
        DiTTransformer2DModel.from_pretrained(tmp_path / "sit" / "transformer")
        assert SCALE in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
