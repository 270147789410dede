"""The command line in process: what a user types, the exit code, and what is on disk afterwards."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_dit import random_dit
from safetensors.torch import load_file, save_file

from tqdit import workflow
from tqdit.cli.main import main
from tqdit.errors import AssumptionWarning
from tqdit.recipe import Recipe
from tqdit.speed import benchmark, contest
from tqdit.speed.machine import Peaks
from tqdit.speed.memory_probe import Footprint
from tqdit.version import VERSION

FAST = ["--groups", "4", "--samples", "2", "--steps", "8", "--rounds", "1", "--quiet"]
PAPER = ["--preset", "paper"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `tqdit ARGS`: exit code, standard output, standard error."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def artifact(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "w8a8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tqdit", "quantize", str(pipeline), "-o", str(out), *PAPER, *FAST])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return out


def test_convert(run: Callable, tmp_path: Path) -> None:
    torch.save({"ema": random_dit(channels=1).state_dict()}, tmp_path / "official.pt")
    code, out, err = run("convert", tmp_path / "official.pt", "-o", tmp_path / "dit")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "num_heads" in err
    code, out, _ = run("convert", tmp_path / "official.pt", "-o", tmp_path / "dit", "--num-heads", "2")
    assert code == 0
    assert "official, its ema weights, DiT-2x32/2@8, 2 heads, 10 classes" in out
    again = ["convert", tmp_path / "official.pt", "-o", tmp_path / "dit", "--num-heads", "2"]
    assert run(*again)[0] == 2
    (tmp_path / "dit" / "mine.txt").touch()
    code, _, err = run(*again, "--overwrite")
    assert (code, "refusing to overwrite" in err) == (2, True)
    (tmp_path / "dit" / "mine.txt").unlink()
    assert run(*again, "--overwrite")[0] == 0
    code, _, err = run("convert", tmp_path / "dit", "-o", tmp_path / "dit", "--official", "--overwrite")
    assert (code, "is the model that is converted" in err) == (2, True)
    code, _, _ = run("sample", tmp_path / "dit", "-o", tmp_path / "a.png", "--num", "1", "--steps", "2", "--quiet")
    assert code == 0


def test_quantize_sample_compare_inspect(run: Callable, pipeline: Path, artifact: Path, tmp_path: Path) -> None:
    code, _, _ = run("sample", artifact, "-o", tmp_path / "a.png", "--num", "3", "--steps", "4", "--quiet")
    assert code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    options = ["--num", "2", "--steps", "4", "--samples", "1", "--no-cost", "--quiet"]
    code, out, _ = run("compare", pipeline, artifact, "--json", tmp_path / "c.json", *options)
    assert code == 0
    assert "w8a8" in out
    row = json.loads((tmp_path / "c.json").read_text())["models"][0]
    assert row["eps_sqnr_db"] > 20
    assert len(row["eps_sqnr_db_by_group"]) == 4
    assert row["psnr_db"] > 20
    assert row["size_bytes"] == (artifact / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size

    code, out, _ = run("inspect", artifact, "--sites", "--json", tmp_path / "i.json")
    assert code == 0
    sites = json.loads((tmp_path / "i.json").read_text())["sites"]
    assert set(sites[0]) == {"name", "role", "bits", "grid", "groups", "granularity", "channels", "kernel"}
    softmax = [site for site in sites if site["role"] == "softmax"]
    assert [(s["grid"], s["groups"]) for s in softmax] == [("mrq_softmax", 4)] * 2
    assert all(site["name"] in out for site in sites)
    assert {site["kernel"] for site in sites if site["kernel"] not in out} == set(), "brackets are not markup"


def test_sample_takes_class_names(run: Callable, pipeline: Path, tmp_path: Path) -> None:
    """Names and numbers of the same classes give the same picture; other classes another one."""
    pictures = []
    for number, classes in enumerate(("class 3,class 5", "3,5", "3,6")):
        file = tmp_path / f"{number}.png"
        code, _, _ = run("sample", pipeline, "-o", file, "--classes", classes, "--num", "2", "--steps", "3", "--quiet")
        assert code == 0
        pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_sample_into_a_folder(run: Callable, artifact: Path, tmp_path: Path) -> None:
    """An image each; the same command again makes none, another seed is refused."""
    out = tmp_path / "images"
    command = ["sample", artifact, "-o", out, "-n", "3", "--steps", "3", "--quiet"]
    for new in (3, 0):
        code, text, _ = run(*command)
        assert (code, f"3 images ({new} new)" in text) == (0, True)
    assert sorted(file.name for file in out.iterdir()) == ["000000.png", "000001.png", "000002.png", "run.json"]
    code, _, err = run(*command, "--seed", "1")
    assert (code, err.count("\n"), "seed was 0, now it is 1" in err) == (2, 1, True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bits", "w9a8"], "w9a8"),
        (["--bits", "w8a3"], "w8a3"),
        (["--preset", "best"], "best"),
        (["--groups", "1001"], "1001"),
        (["--samples", "0"], "samples"),
        (["--steps", "2"], "time group"),
        (["--steps", "1001"], "1001"),
        (["--sampler", "euler"], "euler"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "inf"], "guidance"),
        (["--seed", "2147483648"], "--seed"),
        (["--json", "."], "is a folder"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "meta"], "meta"),
        (["--recipe", "no-such.toml"], "no-such.toml"),
        (["--no-such-option"], "--no-such-option"),
        (["--groups", "x"], "--groups must be a whole number, got 'x'"),
        (["--guidance", "x"], "--guidance must be a number, got 'x'"),
        (["--seed", "-1"], "--seed must be at least 0, got '-1'"),
        (["--set", "gropus=2"], "unknown recipe setting 'gropus'; did you mean 'groups'?"),
        (["--set", "rows=few"], "recipe setting 'rows' must be a whole number, got 'few'"),
        (["--set", "loss=other"], "recipe setting 'loss' must be epsilon or sampler, got 'other'"),
        (["--set", "rows"], "--set takes NAME=VALUE such as samples=8, got 'rows'"),
        (["--set", "rows=1", "--set", "rows=2"], "--set rows is given twice, as 1 and 2"),
        (["--samples", "1", "--set", "samples=2"], "--samples and --set samples exclude each other"),
        (["--no-mrq", "--set", "gelu_grid=best"], "--no-mrq and --set gelu_grid exclude each other"),
        (["--bits", "w6a6", "--set", "weight_bits=4"], "--bits and --set weight_bits exclude each other"),
    ],
)
def test_wrong_settings(run: Callable, pipeline: Path, tmp_path: Path, options: list[str], named: str) -> None:
    code, _, err = run("quantize", pipeline, "-o", tmp_path / "out", "--quiet", *options)
    assert code == 2
    assert named in err
    assert err.count("\n") == 1, "one line, no traceback"
    assert list(tmp_path.iterdir()) == []


def test_resumable_continues_what_was_interrupted(
    run: Callable, pipeline: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tqdit.search.solver.solve", stop)
        code, _, err = run("quantize", pipeline, "-o", out, "--resumable", *PAPER, *FAST)
        assert code == 130
        assert re.search(r"the same command goes on from out\.work \(\d+\.\d MB kept\)\n$", err)
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    with monkeypatch.context() as patch:
        patch.setattr("tqdit.calibration.trajectories.trajectory", stop)  # what is done is not done again
        assert run("quantize", pipeline, "-o", out, "--resumable", *PAPER, *FAST)[0] == 0
    assert (out / "tqdit.json").read_bytes() == (artifact / "tqdit.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["sample", "no-such-model", "-o", "a.png"], "no-such-model"),
        (["sample", "{pipeline}", "-o", "a.png", "--classes", "zebra"], "zebra"),
        (["sample", "{pipeline}", "-o", "a.png", "--classes", "clas 7"], "did you mean 'class 7'?"),
        (["sample", "{pipeline}", "-o", "a.png", "--classes", ""], "leave it out for all classes"),
        (["sample", "{pipeline}", "-o", "a.png", "--classes", " , "], "--classes names no class, got ' , '"),
        (["sample", "{pipeline}", "-o", "a.png", "--num", "x"], "--num must be a whole number, got 'x'"),
        (["sample", "{pipeline}", "-o", "a.png", "--classes", "10"], "'10'"),
        (["sample", "{pipeline}", "-o", "a.png", "--num", "0"], "num"),
        (["sample", "{pipeline}", "-o", "a.txt", "--num", "1", "--steps", "1"], "a.txt"),
        (["sample", "{pipeline}", "-o", "new", "--batch", "0"], "batch"),
        (["sample", "{pipeline}", "-o", "new", "--steps", "1001"], "1001"),
        (["sample", "{pipeline}", "-o", "new", "--device", "cuda:99"], "cuda:99"),
        (["sample", "{pipeline}", "-o", "{pipeline}"], "has files but no run.json"),
        (["sample", "{artifact}", "-o", "a.png", "--backend", "abacus"], "abacus"),
        (["sample", "{pipeline}", "-o", "a.png", "--backend", "cuda"], "unknown backend 'cuda'"),
        (["sample", "{pipeline}", "-o", "a.png", "--backend", "reference"], "is for artifacts"),
        (["quantize", "{pipeline}", "-o", "new", "--preset", "pluss"], "did you mean 'plus'"),
        (
            ["quantize", "{pipeline}", "-o", "new", "--sampler", "euler"],
            "must be auto, ddim, ddpm or flow, got 'euler'",
        ),
        (["sample", "{pipeline}", "-o", "a.png", "--guidance", "inf"], "guidance"),
        (["sample", "{pipeline}", "-o", "{artifact}/tqdit.json/a.png"], "is inside the artifact"),
        (["sample", "{artifact}/nothing", "-o", "a.png"], "nothing"),
        (["compare", "{pipeline}", "{artifact}", "--guidance", "-1"], "guidance"),
        (["compare", "{pipeline}", "{artifact}", "--json", "empty"], "is a folder"),
        (["inspect", "{artifact}", "--json", "empty"], "is a folder"),
        (["quantize", "{pipeline}", "-o", "{artifact}/tqdit.json/out"], "tqdit.json is not a folder"),
        (["demo", "-o", "{artifact}/tqdit.json"], "is inside the artifact"),
        (["demo", "-o", "new", "--set", "bits=w4a8"], "--set bits: the demo has plus w8a8, paper w8a8, plus w4a8"),
        (["demo", "-o", "new", "--set", "rounds=-1"], "recipe setting 'rounds' must be at least 0, got '-1'"),
        (["bench", "{artifact}", "--set", "groups=2"], "--set is for --random"),
        (["compare", "{pipeline}", "{pipeline}"], "not quantized"),
        (["compare", "{artifact}", "{artifact}"], "already quantized"),
        (["inspect", "{pipeline}"], "not quantized"),
        (["bench", "{pipeline}"], "quantize it first"),
        (["bench"], "nothing to time"),
        (["bench", "no-such-model"], "no-such-model"),
        (["bench", "{artifact}", "--json", "empty"], "is a folder"),
        (["bench", "{artifact}", "--batch", "0"], "batch"),
        (["bench", "{artifact}", "--batch", "4,two"], "4,two"),
        (["bench", "{artifact}", "--batch", ""], "batch"),
        (["bench", "{artifact}", "--repeats", "0"], "repeats"),
        (["bench", "{artifact}", "--steps", "1001"], "1001"),
        (["bench", "{artifact}", "--backend", "simulated"], "never timed"),
        (["bench", "{artifact}", "--against", "float32,onnx"], "'onnx'"),
        (["bench", "{artifact}", "--bits", "w8a8"], "--bits is for --random"),
        (["bench", "{artifact}", "--preset", "plus"], "--preset is for --random"),
        (["bench", "{artifact}", "--variants", "plus:w8a8"], "--variants is for --random"),
        (["bench", "--random", "DiT-S/2", "--variants", "plus:w8a8", "--bits", "w6a6"], "--bits and --variants"),
        (["bench", "--random", "DiT-S/2", "--variants", "plus:w8a8,w6a6"], "'w6a6'"),
        (["bench", "--random", "DiT-S/2", "--variants", "plus:w9a8"], "w9a8"),
        (["bench", "--random", "DiT-M/2"], "DiT-M/2"),
        (["bench", "--random", "DiT-S/2@300"], "@300"),
        (["bench", "--random", "DiT-S/2", "--bits", "w9a8"], "w9a8"),
        (["bench", "--random", "DiT-S/2", "--preset", "best"], "best"),
        (["inspect", "{empty}"], "config.json"),
    ],
)
def test_wrong_inputs(
    run: Callable, pipeline: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    args: list[str], named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"pipeline": pipeline, "artifact": artifact, "empty": tmp_path / "empty"}
    code, _, err = run(*(arg.format(**places) for arg in args))
    assert code == 2
    assert named in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_an_artifact_of_a_traced_model_is_refused_with_what_serves_it(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("quantize", "fashion-dit", "-o", "traced", "--preset", "dynamic", "--quiet")[0] == 0
    for args, instead in (
        (("sample", "traced", "-o", "grid.png"), "by its pipeline in diffusers"),
        (("compare", "fashion-dit", "traced"), "give recorded calls, too, by --calls"),
        (("bench", "traced", "--quick"), "time calls of its pipeline"),
    ):
        code, _, err = run(*args)
        assert code == 2
        assert "'traced' is the artifact of a traced model" in err
        assert f"tqdit {args[0]} does not take: " in err
        assert instead in err
        assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["traced"]
    weights = tmp_path / "traced" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = run("sample", "traced", "-o", "grid.png")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{weights.name} is truncated or damaged" in err


def test_bench(run: Callable, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "measure_peaks", lambda device: Peaks(100.0, 10.0))
    monkeypatch.setattr(contest, "footprint", lambda request: Footprint(1, 2, 3.0))
    options = ["--against", "", "--batch", "2", "--repeats", "2", "--steps", "2", "--quiet", "--device", "cpu"]
    code, out, _ = run("bench", artifact, "--json", tmp_path / "b.json", *options)
    assert code == 0
    value = json.loads((tmp_path / "b.json").read_text())
    typed = ["bench", str(artifact), "--json", str(tmp_path / "b.json"), *options]
    assert shlex.split(value["command"]) == ["tqdit", *typed]
    (row,) = value["rows"]
    assert (row["model"], row["bits"], row["integer"], row["speedup_over"]) == ("w8a8", "w8a8", True, {})
    assert row["images_per_second"] > 0
    assert row["peak_bytes"] == 2
    for kernel, count in row["kernels"].items():
        assert f"{count} x {kernel}" in out, "brackets are not markup"
    assert "transformer_blocks.0.attn1.to_q.weight" not in out

    code, out, _ = run("bench", artifact, *options, "--no-sampling", "--kernels")
    assert code == 0
    assert all(site in out for site in ("transformer_blocks.1.attn1.to_q.weight", "pos_embed.proj.weight"))


def test_bare_command_prints_its_help(run: Callable) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "quantize" in out


def test_version(run: Callable) -> None:
    assert run("--version") == run("-V") == (0, f"tqdit {VERSION}\n", "")


@pytest.mark.parametrize(
    "command", [[], ["quantize"], ["sample"], ["compare"], ["evaluate"], ["bench"], ["convert"], ["inspect"]]
)
def test_help_is_readable_at_80_columns(run: Callable, command: list[str]) -> None:
    code, out, _ = run(*command, "-h")
    assert (code, out) == run(*command, "--help")[:2]
    assert max(map(len, out.splitlines())) <= 80
    options = out.partition("Options:")[2].partition("Commands:")[0]
    widths = [len(line) - len(line.lstrip()) for line in options.splitlines() if line.startswith("      ")]
    assert max(widths, default=0) <= 32, "help texts have most of the width"


def test_help_shows_the_defaults_of_both_presets(run: Callable) -> None:
    out = " ".join(run("quantize", "-h")[1].split())
    for preset in ("plus", "paper"):
        recipe = Recipe(preset)
        for name in ("groups", "samples", "steps", "sampler", "guidance", "rounds"):
            text = out.partition(f"--{name} <")[2].partition(" --")[0]
            assert text.endswith(f"default {getattr(recipe, name)}")
    assert "[default: plus]" in out


def test_completion_is_offered(run: Callable) -> None:
    assert "--install-completion" in run("-h")[1]


def test_json_on_standard_output_is_alone_there(
    run: Callable, pipeline: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = ["--num", "2", "--steps", "2", "--samples", "1", "--no-cost"]
    for command in (
        ["inspect", artifact],
        ["compare", pipeline, artifact, *images],
        ["quantize", pipeline, "-o", "new", *FAST],
    ):
        code, out, err = run(*command, "--json", "-")
        assert code == 0
        assert json.loads(out)
        assert "figures:" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_comes_next_is_said_but_quietly(run: Callable, pipeline: Path, artifact: Path, tmp_path: Path) -> None:
    command = ["sample", artifact, "-o", tmp_path / "a b.png", "-n", "1", "--steps", "2"]
    _, out, err = run(*command)
    assert f"next: tqdit inspect {artifact}\n" in out, "the float model is nowhere near"
    assert "images/s)" in out
    assert re.search(r"sampling: 100 % after \d+:\d\d", err), "plain lines where standard error is no terminal"
    assert "next:" not in run(*command, "-q")[1]
    assert run(*command, "-q")[2] == ""
    _, out, _ = run("sample", pipeline, "-o", tmp_path / "b.png", "-n", "1", "--steps", "2")
    assert f"next: tqdit quantize {pipeline} -o w8a8\n" in out


@pytest.mark.parametrize("here", ["beside it", "in the working directory"])
def test_an_artifact_is_compared_with_its_own_float_model(
    run: Callable, own_pipeline: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    copy = shutil.copytree(artifact, own_pipeline.with_name("made") if here == "beside it" else artifact.parent / here)
    monkeypatch.chdir(own_pipeline.parent)
    _, out, _ = run("sample", copy, "-o", "a.png", "-n", "1", "--steps", "2")
    assert f"next: {shlex.join(['tqdit', 'compare', 'tiny-dit', str(copy)])}\n" in out


def test_summary_of_quantize(run: Callable, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [option for option in FAST if option != "--quiet"]
    code, out, err = run("quantize", pipeline, "-o", "new", *quick)
    assert code == 0
    first, second, third, fourth = out.splitlines()
    assert re.fullmatch(r"new: tiny-dit w8a8 plus, calibrated in \d+ s, process peak \d+\.\d\d GiB", first)
    size = r"0\.\d\d MB: 0\.\d{3} of the float32 file, 0\.\d{3} of bf16, 0\.\d{3} of fp32"
    assert re.fullmatch(size, second)
    assert third == "next: tqdit sample new -o grid.png"
    assert fourth == f"      tqdit compare {pipeline} new"
    assert [line.partition(":")[0] for line in err.splitlines() if ": 0 %" in line] == [
        "trajectories", "statistics", "search",
    ]  # fmt: skip
    assert err.splitlines()[-1].startswith("search: 100 % after")
    assert "total: 100 %" in err.splitlines()[-1]


def test_notes_are_one_line(run: Callable, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def assume(*_: object, **__: object) -> dict:
        warnings.warn("the model names no scheduler; the schedule of DiT is taken", AssumptionWarning, stacklevel=2)
        return {}

    monkeypatch.setattr(workflow, "inspect", assume)
    monkeypatch.setattr("tqdit.cli.inspect.print_inspection", lambda *_: None)
    code, _, err = run("inspect", artifact)
    assert (code, err) == (0, "tqdit: note: the model names no scheduler; the schedule of DiT is taken\n")


def test_verbose_logs_to_standard_error(run: Callable, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logs(*_: object, **__: object) -> dict:
        logging.getLogger("tqdit.somewhere").info("looked closely")
        return {}

    monkeypatch.setattr(workflow, "inspect", logs)
    monkeypatch.setattr("tqdit.cli.inspect.print_inspection", lambda *_: None)
    logger = logging.getLogger("tqdit")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    assert run("inspect", artifact)[2] == ""
    assert run("inspect", artifact, "-v")[2].endswith("looked closely\n")


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "w8a8"], ["--preset", "paper"], ["--groups", "4"], ["--samples", "1"], ["--steps", "9"],
        ["--sampler", "ddim"], ["--trajectories", "1"], ["--guidance", "1"], ["--rounds", "0"], ["--seed", "0"],
        ["--ho"], ["--no-mrq"], ["--tgq"],
    ],
)  # fmt: skip
def test_recipe_and_an_option_it_would_override(
    run: Callable, pipeline: Path, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "r.toml").write_text("")
    code, _, err = run("quantize", pipeline, "-o", tmp_path / "out", "--recipe", tmp_path / "r.toml", *options)
    assert code == 2
    assert f"{options[0]} and --recipe" in err
    assert err.count("\n") == 1


def test_recipe_file(run: Callable, pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        "weight_bits = 6\ngroups = 2\nsamples = 1\nsteps = 4\nrounds = 0\nhessian = false\n"
    )
    code, out, _ = run("quantize", pipeline, "-o", tmp_path / "out", "--recipe", tmp_path / "r.toml", "--quiet")
    assert code == 0
    assert "w6a8" in out


def test_set_reaches_every_setting(run: Callable, pipeline: Path, tmp_path: Path) -> None:
    """With options, and over a recipe file."""

    def recipe(*options: str) -> dict:
        out = tmp_path / "out"
        assert run("quantize", pipeline, "-o", out, "--overwrite", "--quiet", *options)[0] == 0
        return dict(workflow.inspect(out)["provenance"]["recipe"])

    small = ["--set", "samples=2", "--set", "steps=8", "--set", "rounds=0"]
    made = recipe("--groups", "4", *small, "--set", "hessian=no", "--set", "low = 0.5", "--set", "bits=w6a8")
    assert (made["groups"], made["samples"], made["hessian"], made["low"]) == (4, 2, "none", 0.5)
    assert (made["weight_bits"], made["activation_bits"], made["preset"]) == (6, 8, "plus")
    (tmp_path / "r.toml").write_text("groups = 3\nsamples = 9\nseed = 5\n")
    made = recipe("--recipe", str(tmp_path / "r.toml"), *small, "--set", "preset=paper")
    assert (made["groups"], made["samples"], made["seed"], made["preset"]) == (3, 2, 5, "paper")
    assert made["weight_granularity"] == "per_tensor"


def test_damaged_weights_are_named(run: Callable, own_pipeline: Path, artifact: Path, tmp_path: Path) -> None:
    file = own_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out_1.weight"][0, 0] = torch.nan
    save_file(state, file)
    code, _, err = run("quantize", own_pipeline, "-o", tmp_path / "out", *FAST)
    assert (code, "proj_out_1.weight" in err, (tmp_path / "out").exists()) == (2, True, False)

    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = run("inspect", copy)
    assert code == 2
    assert file.name in err


def test_existing_output_is_kept(run: Callable, pipeline: Path, artifact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "out"))
    before = (out / "transformer" / "config.json").read_bytes()
    code, _, err = run("quantize", pipeline, "-o", out, *FAST)
    assert code == 2
    assert "overwrite" in err
    assert (out / "transformer" / "config.json").read_bytes() == before
    code, _, _ = run("quantize", pipeline, "-o", out, "--bits", "w6a6", "--overwrite", *FAST)
    assert code == 0
    assert (out / "transformer" / "config.json").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interrupt_leaves_nothing(
    run: Callable, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdit.calibration.recorder.record", stop)
    code, _, err = run("quantize", pipeline, "-o", tmp_path / "out", *FAST)
    assert code == 130
    hint = "with --resumable, finished work would be kept for the same command to go on"
    assert err == f"tqdit: interrupted; nothing is half written; {hint}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["sample", "{pipeline}", "-o", "a.png"], ["quantize", "{pipeline}", "-o", "new"]])
def test_a_polite_kill_has_its_own_exit_code(
    run: Callable, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.chdir(tmp_path)
    for name in ("tqdit.workflow.sample_images", "tqdit.calibration.recorder.record"):
        monkeypatch.setattr(name, kill)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, _, err = run(*(part.format(pipeline=pipeline) for part in command), "-q", "--steps", "20")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 143
    assert err.startswith("tqdit: interrupted; nothing is half written")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick() -> None:
    """`tqdit --help` imports neither torch nor diffusers."""
    code = "import sys, tqdit.cli.main; print([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    start = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5
