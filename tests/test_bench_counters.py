"""`bench/gpu_counters.py`: what it reads from a page of Nsight Compute."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parent.parent / "bench"
PAGE = """==PROF== Connected
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"
"0","a","GPU Speed Of Light Throughput","Duration","us","243.39","","",""
"0","a","GPU Speed Of Light Throughput","Elapsed Cycles","cycle","438,759","","",""
"0","a","GPU Speed Of Light Throughput","SM Frequency","Ghz","1.79","","",""
"0","a","Compute Workload Analysis","","","","HighPipe","INF","ALU is the highest-utilized pipeline (30.2%) based on x"
"1","b","GPU Speed Of Light Throughput","Duration","ms","1.5","","",""
"1","b","Scheduler Statistics","One or More Eligible","%","49.49","","",""
"""


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu_counters")


def test_a_row_for_each_launch(counters: ModuleType) -> None:
    assert counters.read(PAGE) == [
        {"us": 243.39, "cycles": 438759.0, "clock_ghz": 1.79, "busiest": ["ALU", 30.2]},
        {"us": 1500.0, "issue": 49.49},
    ]


def test_names_are_in_the_order_of_the_launches(counters: ModuleType) -> None:
    assert counters.names() == [*counters.ATTENTION, *counters.LINEARS]
    assert len(set(counters.names())) == 8
