"""What is read is accepted or refused in one line, whatever is in it."""

import json
import os
import random
import sys
from pathlib import Path

import fuzz
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, with limits that Linux keeps")
SHORT = 40  # inputs of each target
MINUTES = float(os.environ.get("TQDIT_TRUST_MINUTES", "3"))
NAMES = (
    "recipe file", "recipe settings", "bits", "manifest", "config", "scheduler", "class names", "class lists",
    "safetensors", "packing", "checkpoint",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return fuzz.targets(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", NAMES)
def test_a_few_inputs(made: dict, tmp_path: Path, name: str) -> None:
    (counts,) = fuzz.run({name: made[name]}, tmp_path, count=SHORT).values()
    assert not counts["failed"], json.dumps(counts["failures"], indent=1)
    assert counts["executions"] == SHORT
    assert counts["refused"]


def test_every_target_is_tried(made: dict) -> None:
    assert set(made) == set(NAMES)


@pytest.mark.trust
@pytest.mark.timeout(60 * MINUTES * 2 + 600)
def test_as_many_inputs_as_there_is_time(made: dict, tmp_path: Path) -> None:
    found = fuzz.run(made, tmp_path, minutes=MINUTES, seed=int(os.environ.get("TQDIT_TRUST_SEED", "1")))
    print(json.dumps(found, indent=1))
    failures = {name: counts["failures"] for name, counts in found.items() if counts["failed"]}
    assert not failures, json.dumps(failures, indent=1)
    assert all(counts["accepted"] for counts in found.values()), "only changes at the surface were tried"


def test_a_failure_is_told(tmp_path: Path) -> None:
    """An exception that is no `InputError`, one of several lines, and a process that dies; the rest still runs."""

    def target(rng: random.Random) -> bool:
        which = rng.randrange(3)
        if which == 0:
            raise KeyError("a")
        if which == 1:
            os.kill(os.getpid(), 9)
        return True

    (counts,) = fuzz.run({"x": target}, tmp_path, count=40).values()
    assert counts["executions"] == 40
    assert 0 < counts["accepted"] == 40 - counts["failed"] < 40
    assert len(counts["failures"]) == 2, "each kind once"
    assert all(kind in str(counts["failures"]) for kind in ("KeyError in test_fuzz.py:target", "ended with -9"))
