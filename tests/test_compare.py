"""`tqdit.compare` and `tqdit compare` with recorded calls and prompts, on a tiny FLUX pipeline with a decoder."""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import tqdit
from tiny_called import decoder, write_flux
from tqdit.cli.main import main
from tqdit.errors import InputError
from tqdit.quality.comparison import compare_samples
from tqdit.quality.replayed import check_drawing, compare_images
from tqdit.quality.traced_artifacts import compare_folders

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tqdit compare ARGS`: exit code, standard output, last line of standard error."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", "compare", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err.strip().rpartition("\n")[2]

    return call


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, calls of its transformer, an artifact, and prompts."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(write_flux(root / "float", decoder()))
    pipe.set_progress_bar_config(disable=True)
    with tqdit.record(pipe) as calls:
        pipe("a b", num_inference_steps=4, height=32, width=32, output_type="latent")
    calls.save(root / "calls.safetensors")
    tqdit.quantize(root / "float", root / "dynamic", tqdit.Recipe("dynamic"), device="cpu")
    (root / "prompts.txt").write_text("a b\nc d\n")
    return root


def test_python_compares_as_the_command_does(run, root, tmp_path) -> None:
    figures, calls = tmp_path / "figures.json", root / "calls.safetensors"
    assert run(root / "float", root / "dynamic", "--calls", calls, "--samples", 1, "-q", "--json", figures)[0] == 0
    expected = json.loads(figures.read_text())
    for artifacts in (root / "dynamic", [str(root / "dynamic")]):
        found = tqdit.compare(root / "float", artifacts, calls=calls, samples=1, device="cpu")
        (part,) = json.loads(json.dumps(found.figures()))["transformers"]
        assert [part] == expected["transformers"]
    assert [row["name"] for row in part["comparison"]["rows"]] == ["bfloat16", "dynamic"]
    assert part["comparison"]["calls"] == 4


def test_images_are_of_the_size_and_the_steps_that_are_asked_for(run, root, tmp_path, monkeypatch) -> None:
    drawn: list[dict[str, Any]] = []
    kind = type(DiffusionPipeline.from_pretrained(root / "float"))
    plain = kind.__call__

    @functools.wraps(plain)  # with the signature, which is asked for
    def call(self: Any, **given: Any) -> Any:
        made, steps = plain(self, **given), given["num_inference_steps"]
        drawn.append({"size": made[0].shape[1:3], "steps": steps, "seed": given["generator"].initial_seed()})
        return made

    monkeypatch.setattr(kind, "__call__", call)
    figures, calls, prompts = tmp_path / "figures.json", root / "calls.safetensors", root / "prompts.txt"
    options = ("--size", "32x48", "--steps", 3, "--seed", 5, "--guidance", 2)
    given = ("--calls", calls, "--prompts", prompts, "-q", "--json", figures)
    assert run(root / "float", root / "dynamic", *given, *options)[0] == 0
    assert drawn == 2 * [{"size": (32, 48), "steps": 3, "seed": seed} for seed in (5, 6)]
    (row,) = json.loads(figures.read_text())["images"]
    asked = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.0}
    found = tqdit.compare(
        root / "float", root / "dynamic", calls=calls, prompts=["a b", "c d"], options=asked, seed=5, device="cpu"
    )
    assert json.loads(json.dumps(found.images[0].figures())) == row
    assert 10 < row["worst_db"] <= row["mean_db"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "512"), "--size must be HxW in pixels, such as 512x768, got '512'"),
        (("--size", "0x64"), "--size must be HxW in pixels, such as 512x768, got '0x64'"),
        (("--size", "64x" + "9" * 5000), "--size must be HxW in pixels"),
        (("--size", "-8x64"), "--size must be HxW in pixels"),
        (("--steps", "0"), "--steps must be"),
        (("--prompts", "missing.txt"), "missing.txt is missing"),
    ],
)
def test_nonsense_about_images_is_one_line(run, root, options, said) -> None:
    given = ("--calls", root / "calls.safetensors", "--prompts", root / "prompts.txt", *options)
    code, out, error = run(root / "float", root / "dynamic", *given)
    assert (code, out) == (2, "")
    assert said in error


def test_options_without_what_they_are_for_are_refused(run, root) -> None:
    models, calls = (root / "float", root / "dynamic"), ("--calls", root / "calls.safetensors")
    for option in (("--size", "32x32"), ("--steps", "3"), ("--guidance", "2"), ("--negative", "dark")):
        code, _, error = run(*models, *calls, *option)
        assert (code, error) == (2, f"tqdit: {option[0]} is for images: give --prompts, too")
    for option in (("--size", "32x32"), ("--negative", "dark")):
        code, _, error = run("fashion-dit", root / "dynamic", *option)
        assert (code, error) == (2, f"tqdit: {option[0]} is for images of a pipeline: give --calls and --prompts, too")


def test_each_way_refuses_the_options_of_the_other(root) -> None:
    models, calls = (root / "float", root / "dynamic"), root / "calls.safetensors"
    for name, value in (("num", 4), ("sampling", tqdit.Sampling(steps=2)), ("cost", False), ("equivalence", True)):
        with pytest.raises(InputError, match=f"^{name} and calls exclude each other$"):
            tqdit.compare(*models, calls=calls, **{name: value})
    for name, value in (("prompts", ["a"]), ("options", {}), ("groups", 3)):
        with pytest.raises(InputError, match=f"^{name} is for a comparison on recorded calls; give calls, too$"):
            tqdit.compare(*models, **{name: value})
    for ask, said in (
        (lambda: tqdit.compare(*models, 4, calls=calls), "^num and calls exclude each other$"),
        (lambda: tqdit.compare(nn.Linear(2, 2), models[1], calls=calls), "given by its path or name, got Linear"),
        (
            lambda: tqdit.compare(*models, calls=calls, samples=0),
            "^samples must be a whole number .*, got 0$",
        ),
        (lambda: tqdit.compare(*models, calls=calls, groups=True), "^groups must be a whole number .*, got True$"),
        (lambda: tqdit.compare(*models, calls=calls, seed=-1), "^seed must be a whole number from 0 .*, got -1$"),
        (lambda: tqdit.compare(models[0], [], calls=calls), "^quantized must name at least one artifact"),
        (lambda: tqdit.compare(models[0], 5, calls=calls), "^quantized must be the path of an artifact .*, got 5$"),
        (lambda: tqdit.compare(*models, calls=calls, options={"height": 32}), "^height is for images; give prompts"),
        (
            lambda: tqdit.compare(*models, calls=calls, options="x"),
            "^options must be a dict of the pipeline's arguments by name, got 'x'$",
        ),
        (
            lambda: tqdit.compare(*models, calls=calls, prompts=["a"], options=["height"]),
            r"^options must be a dict of the pipeline's arguments by name, got \['height'\]$",
        ),
        (lambda: tqdit.compare(*models, calls=calls, prompts=5), "^prompts are a list of texts, got 5$"),
        (lambda: tqdit.compare(*models, calls=calls, prompts="a"), "^prompts are a list of texts, got 'a'$"),
        (lambda: tqdit.compare(*models, calls=calls, prompts=[1]), r"^prompts are a list of texts, got \[1\]$"),
        (lambda: tqdit.compare(*models, prompts=5), "^prompts is for a comparison on recorded calls; give calls, too$"),
        (lambda: tqdit.compare(*models, calls=calls, num=torch.ones(2)), "^num and calls exclude each other$"),
        (lambda: tqdit.compare(*models, calls=3), "calls must be a recording, the path of one, or a list"),
    ):
        with pytest.raises(InputError, match=said):
            ask()


def test_help_shows_every_option_and_unknown_ones_are_pythons_own_error() -> None:
    shown = inspect.signature(tqdit.compare).parameters
    for function in (compare_samples, compare_folders):
        for name, parameter in list(inspect.signature(function).parameters.items())[2:]:
            if (function, name) == (compare_samples, "bfloat16"):  # the demo's own: no verb or command has it
                continue
            assert shown[name].default == (None if name == "calls" else parameter.default)
    assert not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} & {p.kind for p in shown.values()}
    with pytest.raises(TypeError, match=r"^compare\(\) got an unexpected keyword argument 'nonsense'$"):
        tqdit.compare("fashion-dit", [], nonsense=1)


class Pipe:
    """A pipeline that refuses a height that is odd."""

    components = ("transformer",)
    transformer: Any = None

    def __call__(self, prompt: str, height: int = 2, num_inference_steps: int = 2, **_: Any) -> Any:
        if height % 2:
            raise ValueError(f"height {height} is odd")
        return (torch.zeros(1, height, 2, 3).numpy(),)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ("a cat", {}, "prompts are a list of texts, got 'a cat'"),
        ([3], {}, "prompts are a list of texts"),
        ([], {}, "there are no prompts to draw images of"),
        (["a"], {"width": 4}, "a Pipe takes no width"),
        (["a"], "x", "options must be a dict of the pipeline's arguments by name, got 'x'"),
        (["a"], {"height": 0}, "height must be a whole number of at least 1, got 0"),
        (["a"], {"height": 2.5}, "height must be a whole number of at least 1, got 2.5"),
        (["a"], {"num_inference_steps": True}, "num_inference_steps must be a whole number of at least 1, got True"),
        (["a"], {"generator": None}, "images are drawn with a generator of their own"),
    ],
)
def test_what_images_cannot_be_drawn_with(prompts, options, said) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        check_drawing(Pipe, prompts, options)


def test_what_a_pipeline_refuses_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"^the pipeline refuses the call: height 3 is odd$"):
        compare_images(Pipe(), {}, ["a"], options={"height": 3})
    assert compare_images(Pipe(), {}, ["a"], options={"height": 4}) == []
