"""The threads that share a call of the kernels: however many, of whichever process, the result is the same."""

import os
import threading

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
