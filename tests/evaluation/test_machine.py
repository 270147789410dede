"""The machine's peaks: plausible, and those of the fastest kernel."""

import time

import pytest
import torch

from tqdit.speed import machine
from tqdit.speed.machine import Peaks, measure_peaks


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SIZES", {"cpu": (256,)})
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr(machine, "SECONDS", 0.01)


def test_peaks_are_plausible(small) -> None:
    peaks = measure_peaks(torch.device("cpu"))
    assert 0.1 < peaks.int8_gops < 1e6
    assert 0.1 < peaks.read_gb_per_s < 1e4


def test_the_fastest_product_counts(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_int8_products", lambda size, device: ["slow", "fast", "slower"])
    seconds = {"slow": 2.0, "fast": 1.0, "slower": 3.0}
    monkeypatch.setattr(
        machine, "_fastest", lambda call, device: seconds.get(call, 0.5) if isinstance(call, str) else 0.5
    )
    peaks = measure_peaks(torch.device("cpu"))
    assert peaks.int8_gops == pytest.approx(2 * 256**3 / 1e9)
    assert peaks.read_gb_per_s == pytest.approx((1 << 22) / 0.5 / 1e9)


def test_a_slow_machine_is_not_asked_for_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(machine, "_int8_products", lambda size, device: asked.append(size) or [size])
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(machine, "_fastest", lambda call, device: 0.2)
    measure_peaks(torch.device("cpu"))
    assert asked == [1024], "0.2 s at 1024 are 1.6 s at 2048"


def test_queued_calls_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "QUEUED", {"cpu": 4})
    now, calls = [0.0], []

    def call() -> None:
        calls.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    assert machine._fastest(call, torch.device("cpu")) == 2.0
    assert len(calls) == 1 + 3 * 4, "one to warm up, three tries"


def test_products_are_of_the_same_numbers(small) -> None:
    products = [product() for product in machine._int8_products(64, torch.device("cpu"))]
    assert products[0].shape == (64, 64)
    assert products[0].dtype is torch.int32
    for other in products[1:]:  # on unsigned codes: torch has this one only with oneDNN
        assert other.shape == (64, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_quickly_and_plausibly() -> None:
    device = torch.device("cuda")
    torch.ones(1, device=device).item()  # the driver starts
    start = time.perf_counter()
    peaks = measure_peaks(device)
    assert time.perf_counter() - start < 3
    assert 1e4 < peaks.int8_gops < 1e7
    assert 1e2 < peaks.read_gb_per_s < 2e4


def test_best_of_two() -> None:
    assert Peaks(1.0, 9.0).best(Peaks(2.0, 3.0)) == Peaks(2.0, 9.0)
