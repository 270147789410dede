"""Flow matching against diffusers' own loop, and a flow-matching model from folder to image."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from stubs import run, sample_of
from torch import nn

import tqdit
from tqdit.calibration.trajectories import collect
from tqdit.errors import InputError
from tqdit.imaging.generate import sample_latents
from tqdit.sampling.flow import FlowMatching
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.schedules import check_scheduler, schedule
from tqdit.sampling.trajectory import noise_generators

DIT = sample_of({"in_channels": 1, "out_channels": 1, "sample_size": 8, "patch_size": 2})
LABELS = torch.tensor([3, 7, 3])
NAMED = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLOW = {**NAMED, "shift": 3.0}
SETTINGS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "shift 1.15": {"shift": 1.15},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "shift": 2.0},
    "terminal": {"shift_terminal": 0.1},
}


@pytest.fixture(scope="module")
def flow_model(tiny_dit) -> nn.Module:
    return tiny_dit(out_channels=1)


@pytest.fixture(scope="module")
def flow_pipeline(flow_model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("flow") / "tiny-flow"
    flow_model.save_pretrained(root / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    return root


def written(scheduler, model: nn.Module, labels: torch.Tensor, guidance: float, seed: int) -> torch.Tensor:
    """A sampling loop as diffusers' pipelines have it. The timesteps of the scheduler are set."""
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in noise_generators(seed, range(len(labels)))])
    for t in scheduler.timesteps:
        twice = torch.cat([x, x])
        classes = torch.cat([labels, torch.full_like(labels, 10)])
        out = model(twice, timestep=t.expand(len(twice)), class_labels=classes).sample[:, :1]
        cond, uncond = out.chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x


@torch.inference_mode()
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_is_that_of_diffusers(flow_model, settings: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**SETTINGS[settings])
    scheduler.set_timesteps(6)
    expected = written(scheduler, flow_model, LABELS, 1.5, seed=5)
    config = {**NAMED, **scheduler.config}
    states = list(run(flow_model, config, Sampling("auto", 6), LABELS, noise_generators(5, range(3))))
    assert [t for t, _ in states] == [*scheduler.timesteps.tolist(), None]
    assert (states[-1][1] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_first_state_is_noise_and_every_timestep_in_range() -> None:
    for settings in SETTINGS.values():
        for steps in (1, 2, 50, 1000):
            if "shift_terminal" in settings and steps == 1:
                continue
            made = schedule(NAMED | settings, Sampling("flow", steps), DIT)
            assert made.timesteps.dtype == torch.float32
            assert float(made.timesteps[0]) == 1000
            low, high, closed = made.time_range
            assert closed
            assert ((made.timesteps > low) & (made.timesteps <= high)).all()


@torch.inference_mode()
def test_channels_beyond_those_of_the_state_are_left_out(tiny_dit, flow_model) -> None:
    """An output of 2C channels: the first half is the velocity."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {**flow_model.config, "out_channels": 2}

        def forward(self, *args, **kwargs):
            out = flow_model(*args, **kwargs)[0]
            return (torch.cat([out, out * torch.nan], 1),)

    runs = [
        list(run(model, FLOW, Sampling("flow", 4), LABELS, noise_generators(0, range(3))))[-1][1]
        for model in (flow_model, Doubled())
    ]
    assert torch.equal(*runs)


def test_dynamic_shift_is_that_of_the_models_tokens() -> None:
    """Flux's line: 256 tokens are shifted by base_shift, 4096 by max_shift."""
    config = {**FLOW, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    for side, mu in ((32, 0.5), (128, 1.15), (80, 0.5 + 0.65 * (1600 - 256) / (4096 - 256))):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(20, mu=mu)
        made = schedule(config, Sampling("flow", 20), replace(DIT, tokens=(side // 2) ** 2))
        assert torch.allclose(made.timesteps, scheduler.timesteps, rtol=1e-6)


def test_a_heun_config_has_the_same_process() -> None:
    config = {"_class_name": "FlowMatchHeunDiscreteScheduler", **FlowMatchHeunDiscreteScheduler(shift=2.0).config}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(9)
    assert torch.equal(schedule(config, Sampling("auto", 9), DIT).timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"invert_sigmas": True}, "invert_sigmas is True; supported is False"),
        ({"stochastic_sampling": True}, "stochastic_sampling is True; supported is False"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; it must be a whole number from 2 to"),
        ({"num_train_timesteps": 1000.5}, "num_train_timesteps is 1000.5"),
        ({"shift": -1.0}, "its 50 sigmas do not fall from 1"),
        ({"shift": 0.0}, "its 50 sigmas do not fall from 1"),
        ({"shift": "much"}, "diffusers refuses it"),
        ({"shift_terminal": 1.0}, "its 50 sigmas do not fall from 1"),
        ({"time_shift_type": "cubic"}, "diffusers refuses it: `time_shift_type` must"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "diffusers refuses it: Only one"),
        ({"use_dynamic_shifting": True, "base_shift": None}, "base_shift is None; use_dynamic_shifting needs a number"),
        (
            {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 256},
            "base_image_seq_len and max_image_seq_len are both 256",
        ),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^scheduler_config\\.json: {message}") as refused:
        schedule({**FLOW, **settings}, Sampling("flow", 20), DIT)
    assert "\n" not in str(refused.value)


def test_check_scheduler_refuses_another_process_at_once() -> None:
    with pytest.raises(InputError, match="invert_sigmas"):
        check_scheduler({**FLOW, "invert_sigmas": True})
    check_scheduler(FLOW)


def test_more_steps_than_training_timesteps() -> None:
    with pytest.raises(InputError, match=r"^steps must be at most the 1000 training timesteps, got 1001"):
        schedule(FLOW, Sampling("flow", 1001), DIT)


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_are_the_squared_steps_of_a_run_of_50(settings: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**SETTINGS[settings])
    scheduler.set_timesteps(50)
    x, moved = torch.zeros(1), []
    for t in scheduler.timesteps:
        moved.append(float(scheduler.step(x + 1, t, x).prev_sample) ** 2)
    expected = torch.tensor(moved) / max(moved)
    weights = schedule({**NAMED, **scheduler.config}, Sampling("flow", 250), DIT).weights(scheduler.timesteps)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_are_smooth_and_defined_for_every_timestep(settings: str) -> None:
    made = schedule({**NAMED, **SETTINGS[settings]}, Sampling("flow", 250), DIT)
    every = made.weights(torch.linspace(0, 1000, 100_001))
    assert torch.isfinite(every).all()
    assert float(every[0]) == 0
    assert 0.99 < float(every.max()) <= 1
    assert float(every.diff().abs().max()) < 0.01  # a hundredth of a timestep
    visited = made.weights(made.timesteps)
    assert (visited > 0).all()


def test_weights_do_not_depend_on_the_number_of_steps() -> None:
    t = torch.tensor([1.0, 333.3, 1000.0])
    few, many = (schedule(FLOW, Sampling("flow", steps), DIT).weights(t) for steps in (5, 250))
    assert torch.equal(few, many)


# From a folder to images -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("states_in_float32")
def test_calibration_states_are_those_of_the_run(flow_model, tiny_recipe) -> None:
    recipe = tiny_recipe("plus", steps=12, samples=3, trajectories=3)
    assert recipe.sampler == "auto"
    data = collect(flow_model, FLOW, recipe)
    assert data.group.bincount().tolist() == [3] * 4
    assert data.t.dtype == torch.float32
    made = schedule(FLOW, Sampling("flow", 12), DIT)
    assert isinstance(made, FlowMatching)
    assert set(data.t.tolist()) <= set(made.timesteps.tolist())
    assert torch.equal(data.step_weight, made.weights(data.t))
    assert torch.isfinite(data.x).all()


@torch.inference_mode()
def test_a_float_folder_samples_as_diffusers_does(flow_pipeline) -> None:
    """The public function against a loop over what diffusers itself loads; a model of one channel has no decoder."""
    model = DiTTransformer2DModel.from_pretrained(flow_pipeline / "transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(flow_pipeline / "scheduler")
    scheduler.set_timesteps(5)
    expected = written(scheduler, model, torch.tensor([1, 4]), 1.5, seed=3).clamp(-1, 1)
    found = tqdit.sample(flow_pipeline, [1, 4], num=2, sampling=Sampling(steps=5), seed=3)
    assert (found - expected).abs().max() <= 1e-6


def test_quantize_then_sample(flow_pipeline, flow_model, tiny_recipe, tmp_path) -> None:
    out = tmp_path / "w8a8"
    tqdit.quantize(flow_pipeline, out, tiny_recipe("plus", steps=12))
    model = tqdit.load(out, backend="reference")
    sampling = Sampling(steps=5)
    exact = sample_latents(flow_model, FLOW, [1, 4], sampling, 3)
    found = sample_latents(model, FLOW, [1, 4], sampling, 3)
    error = (found - exact).square().mean() / exact.square().mean()
    assert 0 < error < 1e-2
    images = tqdit.sample(out, [1, 4], num=2, sampling=sampling, seed=3, backend="reference")
    assert torch.allclose(images, found.clamp(-1, 1), atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_diffusion_sampler_is_one_error(flow_pipeline, tiny_recipe, tmp_path, sampler: str) -> None:
    message = f"^sampler '{sampler}' does not suit the model's FlowMatchEulerDiscreteScheduler; legal are auto, flow$"
    with pytest.raises(InputError, match=message):
        tqdit.sample(flow_pipeline, [1], num=1, sampling=Sampling(sampler, 5))
    with pytest.raises(InputError, match=message):
        tqdit.quantize(flow_pipeline, tmp_path / "out", tiny_recipe("plus", sampler=sampler))
    assert not (tmp_path / "out").exists()
