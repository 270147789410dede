"""Recording: what a pipeline calls is kept as it was, in bounded memory, and nothing stays behind."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import nn

import tqdit
from tiny_called import PROMPT, WIDTH, Pipeline, flux, flux_arguments, stub, z_image
from tqdit.calibration import recording
from tqdit.calibration.call_values import tensors
from tqdit.calibration.calls import Calls, RecordedCall
from tqdit.calibration.pipeline_calls import read_calls
from tqdit.errors import InputError

record = recording.record
Watched = list[dict[str, Any]]


def hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks)


def replayed(model: nn.Module, call: RecordedCall) -> torch.Tensor:
    with torch.no_grad():
        return model(**call.to("cpu"))[0]


# What is kept --------------------------------------------------------------------------------------------------------


def test_every_call_of_a_pipeline_is_kept_and_runs_again() -> None:
    pipe, outputs = stub(), []
    watch = pipe.transformer.register_forward_hook(lambda _, given, output: outputs.append(output[0].clone()))
    with tqdit.record(pipe) as calls:
        assert len(calls) == 0
        first = pipe(prompt=1)
        pipe(prompt=2)
    watch.remove()
    found = calls["transformer"]
    assert list(calls) == ["transformer"]
    assert calls.of(pipe.transformer) is found
    assert len(found) == len(outputs) == 8
    for call, expected in zip(found, outputs, strict=True):
        assert torch.equal(replayed(pipe.transformer, call), expected)
    assert torch.equal(first, pipe(prompt=1))  # recording has changed nothing
    assert hooks(pipe.transformer) == 0
    found.check(pipe.transformer)
    assert found.time_groups(10).num_groups == 4
    assert found[0].arguments["joint_attention_kwargs"] == {"scale": 0.5}
    assert found[0].arguments["return_dict"] is False


def test_positional_arguments_get_their_names() -> None:
    model = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=4,
        num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    x = torch.randn(2, 4, 4, 4)
    with record(model) as calls:
        expected = model(x, torch.tensor([7, 7]), torch.tensor([1, 10]))[0]
    call = calls["transformer"][0]
    assert list(call.arguments) == ["hidden_states", "timestep", "class_labels"]
    assert torch.equal(replayed(model, call), expected)
    assert (call.t, calls["transformer"].time_groups(10).high) == (7.0, 1000.0)


def test_lists_of_tensors_and_latents_of_several_sizes() -> None:
    model = z_image()
    x, prompts = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)], [torch.randn(5, WIDTH), torch.randn(3, WIDTH)]
    with record(model) as calls, torch.inference_mode():
        expected = model(x, torch.tensor([0.0, 0.0]), prompts, return_dict=False)[0]
        before = [latents.clone() for latents in x]
        for latents in x:
            latents.add_(1)
    call = calls["transformer"][0]
    assert call.timestep == "t"
    assert all(map(torch.equal, call.arguments["x"], before))
    assert all(map(torch.equal, replayed(model, call), expected))


def test_video_with_a_time_for_each_token() -> None:
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=8,
        ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    x, times = torch.randn(1, 4, 2, 4, 4), torch.tensor([[0.0] * 4 + [750.0] * 4])
    with record(model) as calls:
        expected = model(x, times, torch.randn(1, 5, WIDTH), return_dict=False)[0]
    call = calls["transformer"][0]
    assert call.t == 750.0
    assert torch.equal(call.arguments["timestep"], times)
    assert torch.equal(replayed(model, call), expected)


class Everything(nn.Module):
    """A model whose forward takes what pipelines pass now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 4}

    def forward(self, hidden_states: Any, timestep: Any, cache: Any = len, **more: Any) -> torch.Tensor:
        return hidden_states


def test_nested_and_unnamed_arguments() -> None:
    model, x = Everything(), torch.ones(1, 4)
    given = {"controlnet_block_samples": [torch.ones(2), (torch.zeros(1), None)], "rotary": (x, x), "names": ["a"]}
    with record(model) as calls:
        model(x, 0.5, len, **given)
    found = calls["transformer"][0].arguments
    assert "cache" not in found  # the default, which cannot be stored
    assert found.keys() == {"hidden_states", "timestep", *given}
    assert found["controlnet_block_samples"][1][1] is None
    assert found["rotary"][0] is found["rotary"][1] is found["hidden_states"]  # equal tensors are held once
    model(**found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": print}, "transformer: argument 'cache' is of type builtin"),
        ({"state": [object()]}, r"transformer: argument 'state\[0\]' is of type object"),
        ({"timestep": None}, "transformer: argument 'timestep' must be a finite number"),
        ({"hidden_states": torch.full((1, 4), torch.nan)}, "transformer: argument 'hidden_states' has NaN or Inf"),
        ({"hidden_states": torch.ones(1, 4).double()}, "transformer: argument 'hidden_states' is of torch.float64"),
    ],
)
def test_a_call_that_cannot_be_kept_is_an_error_at_once(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = Everything()
    wrong = {"hidden_states": torch.zeros(1, 4), "timestep": 0.5, **given}

    def generate() -> None:
        with record(model, folder=tmp_path):
            model(torch.ones(1, 4), 0.1)
            assert os.listdir(tmp_path)
            model(**wrong)
            raise AssertionError("the wrong call went through")

    with pytest.raises(InputError, match=message):
        generate()
    assert hooks(model) == 0
    assert os.listdir(tmp_path) == []


# Which modules -------------------------------------------------------------------------------------------------------


def test_two_transformers_have_calls_of_their_own(tmp_path: Path) -> None:
    pipe = stub(transformer_2=flux())
    with record(pipe) as calls:
        pipe(steps=4, boundary=0.6)
    assert {name: found.times.tolist() for name, found in calls.items()} == {
        "transformer": pytest.approx([1.0, 0.667]),
        "transformer_2": pytest.approx([0.334, 0.001]),
    }
    assert calls.of(pipe.transformer_2) is calls["transformer_2"]
    calls.save(tmp_path / "calls")
    assert sorted(os.listdir(tmp_path / "calls")) == ["transformer.safetensors", "transformer_2.safetensors"]


def test_a_transformer_that_was_not_called_has_no_calls() -> None:
    pipe = stub(transformer_2=flux(num_layers=2))
    with record(pipe) as calls:
        pipe()
    assert list(calls) == ["transformer"]
    with pytest.raises(InputError, match="the pipeline did not call its transformer_2 while it was recorded"):
        calls.of(pipe.transformer_2)


def test_only_transformers_that_take_a_time_are_watched() -> None:
    unet = UNet2DConditionModel.__new__(UNet2DConditionModel)
    control = ControlNetModel.__new__(ControlNetModel)
    for module in (unet, control):
        nn.Module.__init__(module)
    named = {"unet": unet, "controlnet": control, "transformer_ids": [1], "transformer_3": None}
    assert list(recording.transformers(Pipeline(transformer=flux(), **named))) == ["transformer"]
    compiled = torch.compile(flux(), backend="eager")
    assert recording.transformers(Pipeline(transformer=compiled)) == {"transformer": compiled}
    with pytest.raises(InputError, match=r"has no transformer that takes a timestep; .* unet, controlnet"):
        recording.transformers(Pipeline(**named))
    with pytest.raises(InputError, match="takes a diffusers pipeline or transformer, got a dict"):
        recording.transformers({"transformer": flux()})
    with pytest.raises(InputError, match="a Linear takes no timestep"):
        recording.transformers(nn.Linear(1, 1))


def test_nothing_recorded_is_an_error_that_hides_no_other() -> None:
    pipe = stub(transformer_2=flux())
    with pytest.raises(InputError, match="nothing in the block called transformer or transformer_2"), record(pipe):
        pass
    with pytest.raises(ZeroDivisionError), record(pipe) as calls:
        raise ZeroDivisionError
    assert len(calls) == 0
    assert hooks(pipe.transformer) == hooks(pipe.transformer_2) == 0


@pytest.mark.parametrize(("name", "number"), [("per_group", 0), ("groups", 2.0), ("per_group", True)])
def test_numbers_that_make_no_sense(name: str, number: Any) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got {number}"), record(flux(), **{name: number}):
        pass


# Modules in wrappers -------------------------------------------------------------------------------------------------


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def offloaded(model: nn.Module) -> nn.Module:
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


@pytest.mark.parametrize("wrap", [wrapped, compiled_in_place, offloaded])
def test_compiled_and_offloaded_modules(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = Everything()
    model = wrap(plain)
    before = model._compiled_call_impl
    model(torch.ones(1, 4), 0.5)  # what is compiled before is recorded, too
    with record(model) as calls:
        for t in (0.75, 0.5, 0.25):
            assert torch.equal(model(torch.full((1, 4), t), timestep=t), torch.full((1, 4), t))
    found = calls["transformer"]
    assert found.kind == "Everything"
    assert found.times.tolist() == [0.75, 0.5, 0.25]
    assert calls.of(plain) is calls.of(model) is found
    assert model._compiled_call_impl is before
    assert hooks(model) == hooks(plain) == 0
    model(torch.ones(1, 4), 0.5)
    assert len(found) == 3


# Bounded memory ------------------------------------------------------------------------------------------------------


def run(model: nn.Module, times: list[float], prompts: int) -> None:
    for prompt in range(prompts):
        for t in times:
            model(**flux_arguments(t, prompt))


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model whose forward does nothing."""
    model = flux()
    monkeypatch.setattr(type(model), "forward", lambda self, hidden_states, timestep, **more: hidden_states)
    return model


def test_at_most_so_many_calls_of_a_time_are_held(quiet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def made(*fields: Any) -> RecordedCall:
        call = RecordedCall(*fields)
        alive.update([call, call.arguments["hidden_states"]])
        return call

    monkeypatch.setattr(recording, "RecordedCall", made)
    most = 0
    with record(quiet, per_group=4) as calls:
        for prompt in range(30):
            for t in (1.0, 0.5):
                quiet(**flux_arguments(t, prompt))
                most = max(most, len(alive))
    assert most == 2 * 8  # as many calls, and latents of each
    assert calls["transformer"].times.tolist().count(1.0) == 4
    assert calls["transformer"].times.tolist().count(0.5) == 4


def test_a_time_is_drawn_from_as_if_it_were_alone(quiet: nn.Module) -> None:
    kept = []
    for times in ([0.5], [1.0, 0.5, 0.25]):
        with record(quiet, per_group=3, seed=5) as calls:
            run(quiet, times, prompts=20)
        halves = (call for call in calls["transformer"] if call.t == 0.5)
        kept.append([call.arguments["hidden_states"] for call in halves])
    assert len(kept[0]) == len(kept[1]) == 3
    assert all(map(torch.equal, *kept))
    with record(quiet, per_group=3, seed=6) as calls:
        run(quiet, [0.5], prompts=20)
    assert not all(map(torch.equal, kept[0], (call.arguments["hidden_states"] for call in calls["transformer"])))


def test_every_call_is_as_likely_to_be_drawn() -> None:
    """Algorithm R: over 3000 seeds each of 12 calls stays in 4 of 12 on average, within 5 deviations."""
    counts = torch.zeros(12)
    for seed in range(3000):
        reservoir, held = recording._Reservoir(4, str(seed)), {}
        for number in range(12):
            if (place := reservoir.place()) is not None:
                held[place] = number
        assert held.keys() == set(range(4))
        counts[list(held.values())] += 1
    assert (counts - 1000).abs().max() < 5 * (3000 * (1 / 3) * (2 / 3)) ** 0.5


def test_calls_are_thinned_by_the_groups_of_all_times_visited(quiet: nn.Module, tmp_path: Path) -> None:
    times = [i / 10 for i in range(1, 9)]
    with record(quiet, per_group=3, groups=2) as calls:
        run(quiet, times, prompts=4)
    found = calls["transformer"]
    assert found.visited == pytest.approx(times)
    assert len(found.times.unique()) < 7  # some times have no call left, but count
    found.save(tmp_path / "calls.safetensors")
    for kept in (found, Calls.load(tmp_path / "calls.safetensors")):
        assert kept.time_groups(2).edges == pytest.approx([0.45])
        assert kept.time_groups(2).index(kept.times).bincount().tolist() == [3, 3]
        for count in range(1, 12):
            groups = kept.time_groups(count)
            assert len(groups.index(kept.times).unique()) == groups.num_groups


def test_tensors_may_be_kept_in_a_folder(quiet: nn.Module, tmp_path: Path) -> None:
    for folder in (None, tmp_path / "tensors"):
        with record(quiet, per_group=2, folder=folder) as calls:
            run(quiet, [1.0, 0.5], prompts=10)
        found = calls["transformer"]
        if folder is None:
            expected = found.sha256
    assert found.sha256 == expected
    different = {id(tensor) for call in found for _, tensor in tensors(dict(call.arguments))}
    assert len(os.listdir(tmp_path / "tensors")) == len(different)  # what was not drawn in the end is gone
    found.save(tmp_path / "calls.safetensors")
    assert Calls.load(tmp_path / "calls.safetensors").sha256 == expected


def test_a_recording_that_fails_leaves_the_files_of_another_one(quiet: nn.Module, tmp_path: Path) -> None:
    with record(quiet, folder=tmp_path) as calls:
        run(quiet, [1.0], prompts=1)
    before = sorted(os.listdir(tmp_path))

    def stopped() -> None:
        with record(quiet, folder=tmp_path):
            run(quiet, [1.0, 0.5], prompts=1)
            assert len(os.listdir(tmp_path)) > len(before)
            raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        stopped()
    assert sorted(os.listdir(tmp_path)) == before
    assert len(calls["transformer"]) == 1


def test_an_interruption_keeps_the_calls_so_far(quiet: nn.Module) -> None:
    found = []

    def stopped() -> None:
        with record(quiet) as calls:
            found.append(calls)
            run(quiet, [1.0, 0.5], prompts=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(found[0]["transformer"]) == 2


# Pipelines of diffusers ----------------------------------------------------------------------------------------------


def test_a_dit_pipeline() -> None:
    model = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=4,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4, sample_size=8)
    pipe = DiTPipeline(model, vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    with record(pipe) as calls:
        pipe([3], num_inference_steps=5, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    found = read_calls(calls, pipe.transformer)
    assert found.times.tolist() == pipe.scheduler.timesteps.tolist()
    assert found[0].arguments["class_labels"].tolist() == [3, 1000]  # both halves of guidance in one call
    assert found[0].arguments["timestep"].dtype is torch.int64


def test_a_flux_pipeline_with_guidance_in_two_calls() -> None:
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=flux().to(torch.bfloat16),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    words = {
        "prompt_embeds": torch.ones(1, PROMPT, WIDTH), "pooled_prompt_embeds": torch.ones(1, WIDTH),
        "negative_prompt_embeds": torch.zeros(1, PROMPT, WIDTH),
        "negative_pooled_prompt_embeds": torch.zeros(1, WIDTH),
    }  # fmt: skip
    words = {name: value.to(torch.bfloat16) for name, value in words.items()}
    with record(pipe) as calls:
        pipe(**words, height=32, width=32, num_inference_steps=3, true_cfg_scale=2.0, output_type="latent")
    found = calls["transformer"]
    assert len(found) == 6
    assert found.times.tolist()[::2] == found.times.tolist()[1::2]
    assert found[0].t == 1.0
    assert found[0].arguments["hidden_states"].dtype is torch.bfloat16
    prompts = [float(call.arguments["encoder_hidden_states"].float().mean()) for call in found]
    assert prompts == [1.0, 0.0] * 3
    assert found[0].arguments["encoder_hidden_states"] is found[4].arguments["encoder_hidden_states"]
    assert replayed(pipe.transformer, found[0]).isfinite().all()
