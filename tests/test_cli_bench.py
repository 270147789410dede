"""`tqdit bench` in process: which models its options ask for, and what it says of one that failed."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tqdit.architectures import dit_shapes
from tqdit.cli.main import main
from tqdit.errors import InputError
from tqdit.speed import baselines, benchmark, block_entrants, blocks, contest, entrants
from tqdit.speed.machine import Peaks
from tqdit.speed.memory_probe import Footprint

FAST = ["--against", "", "--batch", "2", "--repeats", "1", "--no-sampling", "--quiet"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `tqdit bench ARGS` on a tiny published shape: exit code, standard output, standard error."""
    monkeypatch.setattr(dit_shapes, "SIZES", {**dit_shapes.SIZES, "T": (1, 2, 16)})
    monkeypatch.setattr(benchmark, "measure_peaks", lambda device: Peaks(100.0, 10.0))
    monkeypatch.setattr(contest, "footprint", lambda request: Footprint(1, 2, 3.0))

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", "bench", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("options", "models"),
    [
        ([], [("plus", "w8a8")]),
        (["--bits", "w6a6"], [("plus", "w6a6")]),
        (["--preset", "paper,plus", "--bits", "w8a8,w6a6"],
         [("paper", "w8a8"), ("paper", "w6a6"), ("plus", "w8a8"), ("plus", "w6a6")]),
        (["--variants", "plus:w8a8, paper:w8a8,plus:w4a8"],
         [("plus", "w8a8"), ("paper", "w8a8"), ("plus", "w4a8")]),
    ],
)  # fmt: skip
def test_which_random_models(run: Callable, tmp_path: Path, options: list[str], models: list) -> None:
    code, _, _ = run("--random", "DiT-T/4", *options, *FAST, "--json", tmp_path / "b.json")
    assert code == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(row["preset"], row["bits"]) for row in rows] == models


def test_several_batches_in_one_file_and_table(run: Callable, tmp_path: Path) -> None:
    options = ["--random", "DiT-T/4", *FAST, "--batch", "4,2", "--no-memory", "--json", tmp_path / "b.json"]
    code, out, _ = run(*options)
    assert code == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert [row["workload"] for row in result["rows"]] == ["256-b4", "256-b2"]
    assert result["settings"]["batches"] == [4, 2]
    assert all(row["peak_bytes"] is None for row in result["rows"])
    assert "256-b4" in out
    assert "256-b2" in out
    assert out.count("kernels of DiT-T/4 plus w8a8") == 1


def test_quick_takes_little_and_keeps_what_is_asked_for(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    path = tmp_path / "b.json"
    code, out, _ = run("--random", "DiT-T/4", "--quick", "--batch", "2", "--device", "cpu", "--quiet", "--json", path)
    assert code == 0
    settings = json.loads(path.read_text())["settings"]
    assert (settings["quick"], settings["repeats"], settings["sampling"], settings["memory"]) == (True, 8, None, False)
    assert settings["against"] == ["float32", "bfloat16"]
    assert out.count("bf16-compiled") == 1, "no row of memory, which was not measured"
    assert "max-autotune" not in out, "of a GPU"
    options = ["--quick", "--repeats", "2", "--against", "", "--memory", "--batch", "2", "--device", "cpu", "--quiet"]
    run("--random", "DiT-T/4", *options, "--json", path)
    settings = json.loads(path.read_text())["settings"]
    assert (settings["repeats"], settings["against"], settings["memory"]) == (2, [], True)


def test_quick_blocks_of_published_models_are_raced_without_torchao(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(blocks, "race", lambda names, settings, *_: asked.append(settings) or [])
    run("--random", "z-image", "--quick", "--quiet")
    run("--random", "z-image", "--quick", "--quiet", "--against", "torchao", "--repeats", "3")
    run("--random", "z-image", "--quiet")
    assert [(one.against, one.repeats) for one in asked] == [
        (block_entrants.BFLOAT16, 8), (("torchao",), 3), (block_entrants.DEFAULT, 20),
    ]  # fmt: skip


def test_a_model_that_failed_is_exit_code_1_and_the_rest_is_written(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = entrants.convert

    def picky(solution, *rest):
        if solution.provenance.weight_bits == 6:
            raise RuntimeError("broken kernel")
        return convert(solution, *rest)

    monkeypatch.setattr(entrants, "convert", picky)
    options = ["--random", "DiT-T/4", "--bits", "w8a8,w6a6", *FAST]
    code, out, err = run(*options, "--json", tmp_path / "b.json")
    assert code == 1
    result = json.loads((tmp_path / "b.json").read_text())
    assert [row["bits"] for row in result["rows"]] == ["w8a8"]
    assert result["skipped"] == {"DiT-T/4 plus w6a6": "broken kernel"}
    assert "skipped DiT-T/4 plus w6a6: broken kernel" in out
    assert err.endswith("tqdit: failed: DiT-T/4 plus w6a6\n")


def test_verbose_says_how_long_models_warm_up_and_where_a_baseline_broke(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(entrants, "build", no_memory)
    logger = logging.getLogger("tqdit")
    monkeypatch.setattr(logger, "handlers", [])  # what is added is gone after the test
    monkeypatch.setattr(logger, "level", logger.level)
    options = ["--random", "DiT-T/4", *FAST, "--against", "float32-eager"]
    assert "in no_memory" not in run(*options)[2]
    code, _, err = run(*options, "--verbose")
    assert code == 0, "a baseline is no failure of ours"
    assert "DiT-T/4 plus w8a8 at 256-b2: 0 s to warm up" in err
    assert "in no_memory" in err


def test_no_model_is_left(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_):
        raise InputError("backend 'x' cannot run on cpu")

    monkeypatch.setattr(entrants, "convert", refuse)
    code, _, err = run("--random", "DiT-T/4", *FAST, "--json", tmp_path / "b.json")
    assert (code, err) == (2, "tqdit: backend 'x' cannot run on cpu\n")
    assert not (tmp_path / "b.json").exists()


def test_help_names_every_family_of_baselines(run: Callable) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert [family for family in baselines.FAMILIES if family not in out and family != "bfloat16-blocks"] == []
    assert "bf16-blocks" in out
