"""`bench/distributed.py`: what it starts, what it keeps, and one process of a run; torchrun is replaced."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "distributed.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_distributed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *args: str | Path) -> str:
    """The script's last words; empty if all went well."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    try:
        script.main()
    except SystemExit as stop:
        return str(stop.code)
    return ""


@pytest.mark.parametrize(("hashes", "words"), [("aa", ""), ("ab", "the images depend on the number of processes")])
def test_rows_and_scaling(monkeypatch, script, tmp_path: Path, hashes: str, words: str) -> None:
    commands = []

    def torchrun(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        size = int(command[command.index("--nproc-per-node") + 1])
        rate = {1: 10.0, 2: 18.0}[size]
        row = {"processes": size, "images_per_second": rate, "sha256": hashes[size - 1], "environment": {"cores": 2}}
        Path(command[command.index("--worker") - 1]).write_text(json.dumps(row))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", torchrun)
    out = tmp_path / "new" / "scaling.json"
    assert run(monkeypatch, script, out, "--random", "DiT-S/8", "--steps", "7") == words
    result = json.loads(out.read_text())
    assert (result["model"], result["environment"]) == ("random DiT-S/8 plus w8a8", {"cores": 2})
    assert [row["scaling"] for row in result["rows"]] == [1.0, pytest.approx(0.9)]
    assert [command[command.index("--steps") + 1] for command in commands] == ["7", "7"]
    model = Path(commands[0][commands[0].index("--model") + 1])
    assert model.name == "artifact"
    assert not model.exists(), "it was of use for the runs alone"


def test_a_process_of_a_run(monkeypatch, script, pipeline: Path, tmp_path: Path) -> None:
    options = ["--images", "4", "--batch", "2", "--steps", "2", "--repeats", "2"]
    assert run(monkeypatch, script, tmp_path / "row.json", "--worker", "--model", pipeline, *options) == ""
    row = json.loads((tmp_path / "row.json").read_text())
    assert (row["processes"], row["exchange"], row["images"], len(row["seconds"])) == (1, "none", 4, 2)
    assert row["images_per_second"] == pytest.approx(4 / (sum(row["seconds"]) / 2))


def test_images_fill_batches(monkeypatch, script, tmp_path: Path, capsys) -> None:
    assert run(monkeypatch, script, tmp_path / "a.json", "--images", "5", "--batch", "2") == "2"
    assert "no multiple of --batch 2" in capsys.readouterr().err
