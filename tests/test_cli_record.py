"""`tqdit record` in process: pipelines on disk, what is written and said, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel

from tiny_called import write_flux
from tqdit.calibration.calls import Calls
from tqdit.cli.main import main
from tqdit.cli.record import OWN_PROMPTS
from tqdit.system.outputs import OVERWRITE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tqdit record ARGS`: exit code, standard output, last line of standard error."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", "record", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err.strip().rpartition("\n")[2]

    return call


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_flux(tmp_path_factory.mktemp("flux") / "pipeline")


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=4,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4, sample_size=8)
    folder = tmp_path_factory.mktemp("dit") / "pipeline"
    DiTPipeline(model, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "cat", "1": "dog"}}))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa caf\u00e9 at night\r\n\n   \n# two cats\n".encode())
    return path


def test_prompts_through_a_whole_pipeline(run: Run, flux_folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "calls.safetensors"
    options = ["--prompts", prompts, "--steps", "3", "--guidance", "2.5", "--size", "32x64", "--seed", "4", "-q"]
    code, said, _ = run(flux_folder, "-o", out, *options)
    assert code == 0
    calls = Calls.load(out)
    assert len(calls) == 6
    assert said.splitlines() == [
        f"{out}: 6 calls of transformer (FluxTransformer2DModel), from 2 prompts",
        "transformer: calls per time group",
        *(f"  timestep from {low:g} to {high:g}: 2" for low, high in map(calls.time_groups(10).bounds, range(3))),
    ]
    words = {tuple(call.arguments["encoder_hidden_states"].flatten().tolist()) for call in calls}
    assert len(words) == 2  # a line that begins with # is a prompt
    first = calls[0].arguments
    assert first["hidden_states"].shape == (1, 2 * 4, 4)
    assert first["hidden_states"].dtype is torch.bfloat16
    assert first["guidance"].tolist() == [2.5]

    code, _, error = run(flux_folder, "-o", out, *options)
    assert (code, error) == (2, f"tqdit: output {out} exists; choose another path, or overwrite it ({OVERWRITE})")
    code, said, _ = run(flux_folder, "-o", out, *options, "--overwrite", "--dtype", "float32", "--per-group", "1")
    assert code == 0
    again = Calls.load(out)
    assert len(again) == 3
    assert again[0].arguments["hidden_states"].dtype is torch.float32


def test_the_same_seed_gives_the_same_bytes(run: Run, flux_folder: Path, prompts: Path, tmp_path: Path) -> None:
    options = ["--prompts", prompts, "--steps", "1", "--size", "32x32"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(flux_folder, "-o", tmp_path / name, *options, "--seed", seed)[0] == 0
    first, second, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != other


def test_classes_for_a_pipeline_of_classes(run: Run, dit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\n7\n")
    out, options = tmp_path / "calls", ["--prompts", tmp_path / "classes.txt", "--steps", "4", "--dtype", "float32"]
    assert run(dit_folder, "-o", out, *options)[0] == 0
    labels = [call.arguments["class_labels"].tolist() for call in Calls.load(out)]
    assert labels == [[1, 1000]] * 4 + [[7, 1000]] * 4
    (tmp_path / "classes.txt").write_text("whale\n")
    assert run(dit_folder, "-o", tmp_path / "n", *options)[::2] == (
        2, "tqdit: 'whale' is no class of this pipeline",
    )  # fmt: skip
    code, _, error = run(dit_folder, "-o", tmp_path / "n")
    assert (code, "a DiTPipeline is sampled by class" in error) == (2, True)
    code, _, error = run(dit_folder, "-o", tmp_path / "n", "--negative", "dark", *options)
    assert (code, error) == (2, "tqdit: a DiTPipeline takes no negative_prompt; leave the option out")
    assert not (tmp_path / "n").exists()


def test_wrong_input_is_one_line_and_leaves_nothing(run: Run, flux_folder: Path, prompts: Path, tmp_path: Path) -> None:
    blank, latin, out = tmp_path / "blank.txt", tmp_path / "latin.txt", tmp_path / "out" / "calls"
    blank.write_text("\n  \n")
    latin.write_bytes(b"caf\xe9\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model_index.json").write_text("{}")
    cases = [
        (
            [flux_folder, "--prompts", tmp_path / "none.txt"],
            f"{tmp_path / 'none.txt'} is missing; a prompts file has a",
        ),
        ([flux_folder, "--prompts", blank], f"{blank} has no prompt; it needs one on each line"),
        ([flux_folder, "--prompts", latin], f"{latin} is no text in UTF-8: "),
        ([flux_folder, "--size", "512"], "--size must be HxW in pixels, such as 512x768, got '512'"),
        ([flux_folder, "--size", "0x64"], "--size must be HxW in pixels"),
        ([flux_folder, "--dtype", "int8"], "dtype 'int8' is not one of"),
        (
            [flux_folder, "--prompts", tmp_path],
            f"{tmp_path} is not a regular file; a prompts file has a",
        ),
        ([tmp_path / "nowhere"], f"unknown model '{tmp_path / 'nowhere'}'; give the folder of a diffusers pipeline"),
        ([prompts], f"'{prompts}' is not a folder; give the folder of a diffusers pipeline"),
        (
            ["fashion-dit"],
            "'fashion-dit' is a bundled model, which is quantized without recorded calls; give the folder of",
        ),
        ([bare], f"{bare} has no transformer; its components are none"),
        ([flux_folder / "transformer"], "model_index.json is missing; the folder of a pipeline has one"),
        ([flux_folder, "--prompts", prompts, "--steps", "0"], "--steps must be"),
    ]
    for args, message in cases:
        code, said, error = run(*args, "-o", out)
        assert (code, said) == (2, "")
        assert message in error
    assert not out.parent.exists()


def test_a_pipeline_without_a_transformer(run: Run, tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "unet")
    code, _, error = run(tmp_path / "unet", "-o", tmp_path / "calls")
    assert (code, error) == (2, f"tqdit: {tmp_path / 'unet'} has no transformer; its components are scheduler, unet")


def test_the_prompts_that_come_along() -> None:
    lines = OWN_PROMPTS.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 64
    assert all(line and line == line.strip() and line.isascii() for line in lines)
