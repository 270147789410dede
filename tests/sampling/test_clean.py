"""The image that a model predicts at a step, against diffusers' own, and a watched run against one that is not."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from stubs import sample_of

from tqdit.sampling.guidance import ClassLabels, Sampling
from tqdit.sampling.schedules import schedule
from tqdit.sampling.trajectory import noise_generators, trajectory

SAMPLE = sample_of({"in_channels": 1, "out_channels": 2, "sample_size": 8, "patch_size": 2})
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_clean_image_of_a_diffusion_step_is_that_of_diffusers(kind: str, sampler: str) -> None:
    made = schedule({"prediction_type": kind, "clip_sample": False}, Sampling(sampler, 10), SAMPLE)
    x, output = torch.randn(2, 1, 8, 8), torch.randn(2, 2, 8, 8)
    for i, t in enumerate(made.timesteps):
        taken = output if sampler == "ddpm" else output[:, :1]
        expected = made.scheduler.step(taken, int(t), x, generator=torch.Generator()).pred_original_sample
        assert torch.allclose(made.clean(output, i, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_clean_image_of_flow_matching_is_where_one_step_to_the_end_leads() -> None:
    x, output = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    one = FlowMatchEulerDiscreteScheduler(shift=3.0)
    one.set_timesteps(1)
    assert torch.allclose(
        schedule(FLOW, Sampling("flow", 7), SAMPLE).clean(output, 0, x), one.step(output, one.timesteps[0], x)[0]
    )
    made = schedule(FLOW, Sampling("flow", 7), SAMPLE)
    sigma = float(made.timesteps[4]) / 1000
    assert torch.allclose(made.clean(output, 4, x), x - sigma * output, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_watched_run_has_the_same_states(model, scheduler_config, sampler: str) -> None:
    labels, seen = torch.tensor([3, 7]), []

    def states(watch=None) -> list[torch.Tensor]:
        run = trajectory(
            model, scheduler_config, Sampling(sampler, 6), labels, noise_generators(5, range(2)), ClassLabels(10),
            SAMPLE, watch,
        )  # fmt: skip
        return [x for _, x in run]

    expected, watched = states(), states(lambda i, clean: seen.append((i, clean)))
    assert all(torch.equal(a, b) for a, b in zip(expected, watched, strict=True))
    assert [i for i, _ in seen] == list(range(6))
    errors = [float((clean - expected[-1]).square().mean()) for _, clean in seen]
    assert errors[-1] < errors[0], "the predictions come nearer to the image"
