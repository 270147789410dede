"""A tiny FLUX pipeline with text encoders on the page, beside its artifact."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import tqdit
from tiny_called import decoder, write_flux
from tqdit.errors import InputError
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import Sampling
from tqdit.serving import gallery
from tqdit.serving.drawing import draw
from tqdit.serving.gallery import Gallery
from tqdit.serving.request import Request

pytest.importorskip("transformers", reason="diffusers' pipelines import it")
CPU, SIZE = Target(device="cpu"), {"height": 16, "width": 24}
FOX = Request("a fox", 5, Sampling(steps=4, guidance=2.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("flux")
    model = write_flux(root / "float", decoder())
    tqdit.quantize(model, root / "dynamic", tqdit.Recipe("dynamic"), device="cpu")
    return model, root / "dynamic"


@pytest.fixture(scope="module")
def flux(folders: tuple[Path, Path]) -> Gallery:
    return gallery.load([str(folder) for folder in folders], CPU, size=SIZE)


def test_the_images_are_those_of_the_pipelines(flux: Gallery, folders: tuple[Path, Path]) -> None:
    events = list(draw(flux.models, FOX))
    assert [number for number, _ in events] == [0, 1] * 5
    for number, folder in enumerate(folders):
        frames = [frame for of, frame in events if of == number]
        assert [len(frame.call_ms) for frame in frames] == list(range(5))
        pipe = FluxPipeline.from_pretrained(folder)
        options = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np", **SIZE}
        (expected,) = pipe("a fox", generator=torch.Generator().manual_seed(5), **options).images
        assert torch.equal(frames[-1].pixels, 2 * torch.as_tensor(expected).permute(2, 0, 1) - 1)
        shown = [frame.pixels for frame in frames[1:]]
        assert {tuple(pixels.shape) for pixels in shown} == {(3, 16, 24)}
        assert len({float(pixels.sum()) for pixels in shown}) == 4, "the preview changes"
    assert not torch.equal(*(frame.pixels for _, frame in events[-2:]))


def test_what_the_page_asks_for(flux: Gallery) -> None:
    first, second = flux.models
    assert (first.asks_for, first.choices, flux.samplers) == ("text", None, ["auto"])
    assert first.defaults == Sampling(steps=28, guidance=3.5)
    assert first.label == "float · float32"
    assert second.label == "dynamic · W8A8 dynamic"
    assert second.weight_bytes < first.weight_bytes


def test_a_closed_drawing_ends_its_threads(flux: Gallery) -> None:
    before = threading.active_count()
    run = draw(flux.models, FOX)
    for _ in range(5):
        next(run)
    assert threading.active_count() == before + 2
    run.close()
    assert threading.active_count() == before
    assert sum(len(model.pipe.transformer._forward_hooks) for model in flux.models) == 0


def test_what_is_refused(flux: Gallery, folders: tuple[Path, Path], pipeline: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(folders[0] / "transformer", tmp_path / "alone")
    for request, message in (
        (Request(3, 0, Sampling()), "draws a prompt's text, got the number 3"),
        (Request("a fox", 0, Sampling("ddim")), "draws with its own scheduler"),
    ):
        with pytest.raises(InputError, match=message):
            next(draw(flux.models, request))
    for arguments, message in (
        ([str(alone)], "'alone' is a transformer alone; a page draws with a pipeline's folder"),
        ([str(folders[0]), "fashion-dit"], "'float' draws the text of a prompt, 'fashion-dit' 10 classes"),
    ):
        with pytest.raises(InputError, match=message):
            gallery.load(arguments, CPU, measure=False)
    with pytest.raises(InputError, match="draws images of one size"):
        gallery.load([str(pipeline)], CPU, measure=False, size=SIZE)


def test_what_a_pipeline_refuses_is_a_message(folders: tuple[Path, Path]) -> None:
    odd = gallery.load([str(folders[0])], CPU, size={"height": 16, "width": 16})
    object.__setattr__(odd.models[0], "pipe", Refusing(odd.models[0].pipe))
    with pytest.raises(InputError, match="the pipeline refuses the call: no such prompt"):
        list(draw(odd.models, FOX))


class Refusing:
    """A pipeline that says that it is wrongly called, as diffusers' do."""

    def __init__(self, pipe) -> None:
        self.transformer = pipe.transformer

    def __call__(self, prompt, num_inference_steps, generator, output_type, callback_on_step_end, **options):
        raise ValueError("no such prompt")
