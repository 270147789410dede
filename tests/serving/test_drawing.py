"""A drawing without a browser: its pixels are those of `tqdit.sample`, and its events say what is true."""

from dataclasses import replace

import pytest
import torch

import tqdit
from tiny_pipelines import write_pixart, write_prompts
from tqdit.errors import InputError
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import Sampling
from tqdit.sampling.prompts import Prompts
from tqdit.serving import gallery
from tqdit.serving.board import Board
from tqdit.serving.drawing import PREVIEWS, Frame, draw, is_shown
from tqdit.serving.gallery import Gallery
from tqdit.serving.request import Request

CPU = Target(device="cpu")


@pytest.mark.parametrize(("steps", "guidance", "sampler"), [(1, 1.5, "auto"), (5, 1.0, "ddim"), (3, 4.0, "ddpm")])
def test_the_images_are_those_of_sample(side_by_side: Gallery, artifact, steps, guidance, sampler) -> None:
    sampling = Sampling(sampler, steps, guidance)
    finished = images(side_by_side, Request("bag", 11, sampling))
    for number, model in enumerate(("fashion-dit", artifact)):
        expected = tqdit.sample(model, ["bag"], 1, sampling, seed=11, device="cpu")
        assert torch.equal(finished[number], expected[0])
    assert not torch.equal(finished[0], finished[1])


def test_events_come_in_turn_and_count_every_call(side_by_side: Gallery) -> None:
    events = list(draw(side_by_side.models, Request(2, 0, Sampling(steps=13))))
    assert [number for number, _ in events] == [0, 1] * 14
    for number in (0, 1):
        frames = [frame for of, frame in events if of == number]
        assert [frame.step for frame in frames] == list(range(14))
        assert [len(frame.call_ms) for frame in frames] == list(range(14))
        assert all(ms > 0 for ms in frames[-1].call_ms)
        assert [frame.step for frame in frames if frame.pixels is not None] == [0, 2, 4, 6, 8, 10, 12, 13]
        assert [frame.done for frame in frames] == [False] * 13 + [True]
    first, second = (frame.pixels for _, frame in events[:2])
    assert torch.equal(first, second), "all models start from the same noise"


def test_previews_come_nearer_to_the_image(side_by_side: Gallery) -> None:
    frames = [frame for number, frame in draw(side_by_side.models[:1], Request(2, 0, Sampling(steps=9)))]
    errors = [float((frame.pixels - frames[-1].pixels).square().mean()) for frame in frames]
    assert errors[0] > 4 * errors[6] > 0
    assert errors[-1] == 0


def test_an_image_is_shown_a_dozen_times_at_most_and_at_both_ends() -> None:
    for steps in (1, 5, 12, 13, 50, 1000):
        shown = [step for step in range(steps + 1) if is_shown(step, steps)]
        assert (shown[0], shown[-1]) == (0, steps)
        assert len(shown) <= PREVIEWS + 2


def test_a_wrong_request_draws_nothing(side_by_side: Gallery) -> None:
    for request, message in (
        (Request(10, 0, Sampling()), "unknown class '10'"),
        (Request("handbag", 0, Sampling()), "unknown class 'handbag'"),
        (Request(0, 0, Sampling("flow")), "sampler 'flow' does not suit"),
        (Request(0, 0, Sampling(steps=1001)), "steps must be at most the 1000 training timesteps, got 1001"),
    ):
        with pytest.raises(InputError, match=message):
            next(draw(side_by_side.models, request))


def test_a_closed_drawing_leaves_nothing_behind(side_by_side: Gallery) -> None:
    run = draw(side_by_side.models, Request(2, 0, Sampling(steps=30)))
    for _ in range(6):
        next(run)
    hooks = [len(model.model._forward_hooks) + len(model.model._forward_pre_hooks) for model in side_by_side.models]
    run.close()
    after = [len(model.model._forward_hooks) + len(model.model._forward_pre_hooks) for model in side_by_side.models]
    assert [before - now for before, now in zip(hooks, after, strict=True)] == [2, 2]


def test_an_image_that_is_not_finite_is_an_error(side_by_side: Gallery) -> None:
    with pytest.raises(InputError, match="sampling gave NaN or Inf"):
        list(draw(side_by_side.models[:1], Request(2, 0, Sampling(steps=3, guidance=1e38))))


def test_what_the_page_says(side_by_side: Gallery) -> None:
    float_model, quantized = side_by_side.models
    assert float_model.label == "fashion-dit · float32"
    assert quantized.label == "fashion-w8a8 · W8A8 paper (changed: hessian)"
    assert quantized.weight_bytes < 0.3 * float_model.weight_bytes
    board = Board([replace(float_model, peak_bytes=12_345_678), quantized])
    assert dict(board.figures(0))["a call (median)"] == "–"
    pixels = torch.zeros(1, 2, 2)
    board.take(0, Frame(2, 2, pixels, (1.0, 2.0, 9.0)))
    assert board.figures(0)[:3] == [("step", "2 of 2"), ("a call (median)", "2.0 ms"), ("all calls", "0.01 s")]
    assert dict(board.figures(0))["peak memory"] == "12.3 MB"
    assert dict(board.figures(1))["peak memory"] == "–"
    assert dict(board.figures(1))["PSNR to fashion-dit"] == "–"
    board.take(1, Frame(2, 2, pixels + 0.2, (1.0,)))
    assert dict(board.figures(1))["PSNR to fashion-dit"] == "20.0 dB"
    board.take(1, Frame(2, 2, pixels, (1.0,)))
    assert dict(board.figures(1))["PSNR to fashion-dit"] == "equal"


def test_images_are_measured_against_the_float_model_wherever_it_stands(side_by_side: Gallery) -> None:
    float_model, quantized = side_by_side.models
    board = Board([quantized, float_model, replace(float_model, label="fashion-dit · again")])
    pixels = torch.zeros(1, 2, 2)
    board.take(0, Frame(2, 2, pixels + 0.2, (1.0,)))
    assert dict(board.figures(0))["PSNR to fashion-dit"] == "–", "the float model has not finished"
    board.take(1, Frame(2, 2, pixels, (1.0,)))
    board.take(2, Frame(2, 2, pixels + 0.02, (1.0,)))
    found = [dict(board.figures(number)).get("PSNR to fashion-dit") for number in range(3)]
    assert found == ["20.0 dB", None, "40.0 dB"]
    artifacts = Board([quantized, quantized])
    assert [dict(artifacts.figures(number)).get("PSNR to fashion-w8a8") for number in range(2)] == [None, "–"]


def test_models_that_cannot_stand_side_by_side(side_by_side: Gallery, pipeline) -> None:
    with pytest.raises(InputError, match=r"the same noise: that of 'fashion-dit' is \(1, 32, 32\)"):
        gallery.load(["fashion-dit", str(pipeline)], CPU, measure=False)
    with pytest.raises(InputError, match="a page shows 1 to 4 models, got 5"):
        gallery.load(["fashion-dit"] * 5, CPU)
    assert side_by_side.models[0].choices[8] == ("bag", 8)
    assert side_by_side.samplers == ["auto", "ddim", "ddpm"]


def test_a_model_of_prompts(tmp_path) -> None:
    model, prompts = write_pixart(tmp_path / "tiny-pixart"), write_prompts(tmp_path / "prompts.safetensors")
    found = gallery.load([str(model)], CPU, Prompts.read(prompts), measure=False)
    assert found.models[0].asks_for == "prompt"
    assert not found.models[0].pixelated
    assert found.models[0].choices[1] == ("prompt 1", 1)
    sampling = Sampling(steps=2)
    expected = tqdit.sample(model, [1], 1, sampling, seed=3, conditions=prompts, device="cpu")
    assert torch.equal(images(found, Request(1, 3, sampling))[0], expected[0])
    with pytest.raises(InputError, match="prompts"):
        gallery.load([str(model)], CPU, measure=False)


def images(models: Gallery, request: Request) -> dict[int, torch.Tensor]:
    return {number: frame.pixels for number, frame in draw(models.models, request) if frame.done}
