"""`bench/gpu.py`: what it asks `tqdit bench` for, and what it keeps. The benchmark itself is replaced but once."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"
HERE = {"device": "a GPU", "torch": "2", "torchao": "0", "tqdit": "1"}


class Bench:
    """`tqdit bench` that writes one row per call, or nothing."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.codes: dict[str, int] = {}
        self.silent: set[str] = set()
        self.environment = HERE

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        self.commands.append(command)
        options = dict(itertools.pairwise(command))
        side = 512 if options["--random"].endswith("@512") else 256
        name = f"{side}-b{options['--batch']}"
        name += " torchao" if "torchao" in options["--against"] else ""
        if name not in self.silent:
            row = {"workload": name.split()[0], "number": len(self.commands)}
            result = {"command": "x", "environment": self.environment, "skipped": {"a": "why"}, "rows": [row, row]}
            Path(options["--json"]).write_text(json.dumps(result))
        return SimpleNamespace(returncode=self.codes.get(name, 0))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    replacement = Bench()
    monkeypatch.setattr(subprocess, "run", replacement)
    return replacement


def run(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> str:
    """The script's last words; empty if all went well."""
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    try:
        module.main()
    except SystemExit as stop:
        return str(stop.code)
    return ""


def rows(out: Path) -> list[tuple[str, int]]:
    return [(row["workload"], row["number"]) for row in json.loads(out.read_text())["rows"]]


def test_every_workload_in_one_file(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "gpu.json"
    assert run(monkeypatch, out) == ""
    assert rows(out) == [("256-b64", 1)] * 2 + [("256-b64 torchao", 2)] * 2 + [("256-b2", 3)] * 2 + [("512-b16", 4)] * 2
    result = json.loads(out.read_text())
    assert list(result) == ["environment", "commands", "skipped", "rows"]
    assert list(result["commands"]) == list(result["skipped"]) == ["256-b64", "256-b64 torchao", "256-b2", "512-b16"]
    command = result["commands"]["256-b64"]
    assert command.startswith("tqdit bench --random DiT-XL/2 --variants plus:w8a8,paper:w8a8,plus:w6a6,plus:w4a8 ")
    assert "--json" not in command
    assert "w4a8" not in result["commands"]["256-b2"]
    assert {file.name for file in out.parent.iterdir()} == {"gpu.json"}


def test_one_workload_replaces_its_rows(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    run(monkeypatch, out)
    run(monkeypatch, out, "--workload", "256-b2", "--quick", "--against", "bf16-eager")
    assert rows(out) == [("256-b64", 1)] * 2 + [("256-b64 torchao", 2)] * 2 + [("256-b2", 5)] * 2 + [("512-b16", 4)] * 2
    command = json.loads(out.read_text())["commands"]["256-b2"]
    assert command.endswith("--repeats 5 --no-sampling --no-memory --against bf16-eager"), "the last of two counts"


def test_what_broke_loses_nothing(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    run(monkeypatch, out)
    bench.codes, bench.silent = {"256-b64": -9, "512-b16": 1}, {"256-b64"}
    assert run(monkeypatch, out) == "failed, in part or whole: 256-b64, 512-b16"
    assert rows(out) == [("256-b64", 1)] * 2 + [("256-b64 torchao", 6)] * 2 + [("256-b2", 7)] * 2 + [("512-b16", 8)] * 2


def test_rows_of_another_machine_are_set_aside(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    run(monkeypatch, out)
    bench.environment = {**HERE, "device": "another GPU"}
    run(monkeypatch, out, "--workload", "256-b2")
    assert rows(out) == [("256-b2", 5)] * 2
    assert len(rows(tmp_path / "gpu.old.json")) == 8


def test_its_commands_are_legal() -> None:
    """The real command line, stopped by a device that does not exist; nothing is built."""
    command = [sys.executable, SCRIPT, "no-such.json", "--workload", "256-b64", "--device", "cuda:99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "device 'cuda:99' is not available here" in done.stderr
    assert done.returncode == 1
    assert not Path("no-such.json").exists()
