"""`bench/first_call.py`: which caches and configurations its cases have. No process is started."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from tqdit.architectures import dit_shapes
from tqdit.artifact import folder as artifact
from tqdit.backends.triton import configurations

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setitem(dit_shapes.SIZES, "T", (1, 2, 16))
    monkeypatch.setattr(configurations, "TUNED", configurations.TUNED)
    return importlib.import_module("first_call")


def test_cases_share_caches_as_they_say(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = []

    def child(command: list[str], env: dict[str, str], check: bool) -> None:
        assert check
        folders.append((env["TRITON_CACHE_DIR"], env["TQDIT_CACHE"]))
        for folder, file in ((folders[-1][0], f"{len(folders)}/a.cubin"), (folders[-1][1], "triton-3-a-gpu.json")):
            Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, file).write_text(json.dumps({"configurations": {str(n): [] for n in range(len(folders))}}))
        monkeypatch.setattr(sys, "argv", command[1:])
        script.main()

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=child))
    out = tmp_path / "out.json"
    options = ["--random", "DiT-T/8", "--batch", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["first_call.py", str(out), *options])
    script.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["batch"]) for row in rows] == [
        ("committed", 2), ("again", 2), ("another batch", 1), ("unknown", 2), ("unknown, again", 2),
    ]  # fmt: skip
    assert [row["compiled"] for row in rows] == [1, 1, 1, 1, 1]
    assert [row["timed"] for row in rows] == [1, 1, 1, 4, 1], "what the folder has more than before"
    assert all(row["first_seconds"] > 0 and row["second_seconds"] > 0 for row in rows)
    known, again, other, unknown, last = folders
    assert known == again == other != unknown == last


def test_an_unknown_gpu_has_no_committed_configurations(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, solved: Any
) -> None:
    artifact.write(solved("plus", "w8a8"), tmp_path)
    asked = SimpleNamespace(model=tmp_path, device="cpu", batch=2)
    script.measure(asked, True, 1.0)
    assert configurations.TUNED.exists()
    script.measure(asked, False, 1.0)
    assert not configurations.TUNED.exists()
