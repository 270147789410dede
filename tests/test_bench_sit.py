"""`bench/sit.py`: its parts, their limits, and what is kept of a run that is cut. The parts themselves are replaced."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "sit.py"


class Parts:
    """Processes that write what they were asked for; `fails` says which do not, and how."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: dict[str, int | None] = {}

    def __call__(self, command: list[str], stdout: Any, timeout: float, **_: object) -> SimpleNamespace:
        name, output = self.part(command)
        self.ran.append(name)
        code = self.fails.get(name, 0)
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        stdout.write(f"{name} said so")
        if code == 0 and output.suffix:
            output.write_text('{"models": [1, 2]}')
        elif code == 0:
            output.mkdir()
            (output / "training.json").write_text('{"steps": 7}')
        return SimpleNamespace(returncode=code)

    @staticmethod
    def part(command: list[str]) -> tuple[str, Path]:
        if command[1].endswith("train_fashion_dit.py"):
            assert command[command.index("--objective") + 1] == "flow"
            return "train", Path(command[command.index("--out") + 1])
        assert command[1:3] == ["-m", "tqdit"]
        assert command[command.index("--sampler") + 1] == "flow"
        if command[3] == "compare":
            return "compare", Path(command[command.index("--json") + 1])
        return command[command.index("--preset") + 1], Path(command[command.index("-o") + 1])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    found = Parts()
    monkeypatch.setattr(subprocess, "run", found)
    return found


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_sit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def measure(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, Any]:
    """The file after a run."""
    places = [folder / "out.json", "--data", folder, "--work", folder / "work", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sit.py", *map(str, places), *more])
    script.main()
    return dict(json.loads((folder / "out.json").read_text()))


def test_all_parts_in_order(script, parts, monkeypatch, tmp_path) -> None:
    found = measure(script, monkeypatch, tmp_path)
    assert parts.ran == list(found["parts"]) == ["train", "plus", "paper", "compare"]
    assert {part["exit_code"] for part in found["parts"].values()} == {0}
    assert (found["training"], found["comparison"]) == ({"steps": 7}, {"models": [1, 2]})
    assert found["environment"]["device"] == "cpu"
    assert found["parts"]["train"]["command"].startswith("python examples/train_fashion_dit.py --objective flow")
    assert sum(part["limit_seconds"] for part in found["parts"].values()) <= 25 * 60


def test_what_is_finished_is_not_run_again_and_what_is_not_is(script, parts, monkeypatch, tmp_path) -> None:
    parts.fails = {"plus": 3, "paper": None}
    with pytest.raises(SystemExit, match="not finished: plus, paper, compare"):
        measure(script, monkeypatch, tmp_path, "--part", "train", "plus", "paper")
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert (found["plus"]["exit_code"], found["plus"]["ending"]) == (3, "plus said so")
    assert found["paper"]["exit_code"] is None
    parts.ran, parts.fails = [], {}
    measure(script, monkeypatch, tmp_path)
    assert parts.ran == ["plus", "paper", "compare"]
    measure(script, monkeypatch, tmp_path, "--quick")
    assert parts.ran[3:] == ["train", "plus", "paper", "compare"], "of other settings"
