"""Killed at any moment, a process leaves whole outputs; two at once do not disturb each other."""

import json
import signal
import sys
from pathlib import Path

import kills
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts the calls that Linux sees")
RACES = ("save over an artifact", "convert", "images", "json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kills.Case]:
    return kills.cases(tmp_path_factory.mktemp("models"))


def assert_whole(found: dict, killed: int) -> None:
    failures = {name: counts["failures"] for name, counts in found.items() if counts["failures"]}
    assert not failures, json.dumps(failures, indent=1)
    assert all(counts["killed"] >= killed for counts in found.values())


def test_a_few_kills(made: dict, tmp_path: Path) -> None:
    few = {name: case for name, case in made.items() if name != "end of a resumable run"}  # takes longest
    assert_whole(kills.run(few, tmp_path, most=3), killed=3)


def test_a_few_interrupts(made: dict, tmp_path: Path) -> None:
    few = {name: made[name] for name in ("save over an artifact", "images", "json")}
    assert_whole(kills.run(few, tmp_path, most=3, number=signal.SIGINT), killed=3)


def test_two_processes_at_once(made: dict, tmp_path: Path) -> None:
    found = kills.races({name: made[name] for name in RACES}, tmp_path, rounds=2)
    assert not any(counts["failures"] for counts in found.values()), json.dumps(found, indent=1)


@pytest.mark.trust
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_before_every_call(made: dict, tmp_path: Path, number: int) -> None:
    found = kills.run(made, tmp_path, number=number)
    print(json.dumps(found, indent=1))
    assert_whole(found, killed=5)


@pytest.mark.trust
def test_two_processes_at_once_many_times(made: dict, tmp_path: Path) -> None:
    found = kills.races(made, tmp_path, rounds=50)
    print(json.dumps(found, indent=1))
    assert not any(counts["failures"] for counts in found.values())
    assert sum(counts["refused"] for counts in found.values()) > 0
