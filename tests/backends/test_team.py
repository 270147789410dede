"""The threads that share a call of the kernels: however many, of whichever process, the result is the same."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from operands import maker

from tqdit.backends import fused, native
from tqdit.ops.schema import Codes

pytestmark = pytest.mark.skipif(native.reason() is not None, reason="the kernels cannot be built here")


@pytest.fixture(autouse=True)
def threads():
    """Give the number of threads back that torch had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def coded() -> Codes:
    make = maker(3)
    return fused.quantize(make.values(2, 99, 40), make.params())


def test_any_number_of_threads_gives_the_same_codes() -> None:
    torch.set_num_threads(1)
    alone = coded()
    for number in (2, 3, 9, 2, 1):
        torch.set_num_threads(number)
        for _ in range(50):
            assert torch.equal(coded(), alone)


def test_calls_of_several_threads_overlap() -> None:
    torch.set_num_threads(3)
    alone, equal = coded(), []
    callers = [threading.Thread(target=lambda: equal.append(torch.equal(coded(), alone))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert equal == [True] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    torch.set_num_threads(3)
    make = maker(3)
    x, target = make.values(2, 99, 40), make.params()
    expected = fused.quantize(x, target).numpy().tobytes()
    if (child := os.fork()) == 0:
        same = fused.quantize(x, target).numpy().tobytes() == expected  # torch's own threads are those of the parent
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_no_data_race_is_found(tmp_path: Path) -> None:
    program = tmp_path / "team"
    source = Path(__file__).with_name("team.cpp")
    command = ["g++", "-std=c++17", "-O1", "-fsanitize=thread", "-pthread", f"-I{native.SOURCES}", str(source)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    if "tsan" in built.stderr:
        pytest.skip("no thread sanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this system")
    assert (done.returncode, done.stdout) == (0, "every item, once a round\n"), done.stderr
