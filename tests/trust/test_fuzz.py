"""What is read is accepted or refused in one line, whatever is in it."""

import json
import os
import sys
from pathlib import Path

import fuzz
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, with limits that Linux keeps")
SHORT = 40  # inputs of each target
MINUTES = float(os.environ.get("TQDIT_TRUST_MINUTES", "3"))


def assert_none_failed(found: dict) -> None:
    failures = {name: counts["failures"] for name, counts in found.items() if counts["failed"]}
    assert not failures, json.dumps(failures, indent=1)


def test_a_few_inputs(tmp_path: Path) -> None:
    found = fuzz.run(tmp_path, count=SHORT)
    assert_none_failed(found)
    assert all(counts["executions"] == SHORT for counts in found.values())
    assert all(counts["refused"] for counts in found.values())
    assert sum(counts["accepted"] for counts in found.values()) > SHORT


@pytest.mark.trust
@pytest.mark.timeout(60 * MINUTES * 2 + 600)
def test_as_many_inputs_as_there_is_time(tmp_path: Path) -> None:
    found = fuzz.run(tmp_path, minutes=MINUTES, seed=int(os.environ.get("TQDIT_TRUST_SEED", "1")))
    print(json.dumps(found, indent=1))
    assert_none_failed(found)


def test_a_failure_is_told(tmp_path: Path) -> None:
    """An exception that is no `InputError`, one of several lines, and a process that dies; the rest still runs."""

    def target(rng) -> bool:
        which = rng.randrange(4)
        if which == 0:
            raise KeyError("a")
        if which == 1:
            raise fuzz.InputError("two\nlines")
        if which == 2:
            os.kill(os.getpid(), 9)
        return True

    counts = fuzz._fuzzed(target, "x", 0, 60, 0, tmp_path / "log")
    assert counts.executions == 60
    assert 10 < counts.accepted == 60 - counts.failed < 20
    assert {"KeyError", "several", "ended with -9"} == {
        kind for kind in ("KeyError", "several", "ended with -9") if kind in str(counts.failures)
    }
