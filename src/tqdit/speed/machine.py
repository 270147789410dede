"""Measure the machine's peaks, int8 products and moving memory, in the same run as the models."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# Sizes of square products. A CPU reaches its peak at the first size, a GPU at the last.
SIZES = {"cpu": (1024, 2048, 4096), "cuda": (2048, 4096, 8192)}
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far more than a cache holds
QUEUED = {"cpu": 1, "cuda": 10}  # calls timed together, so that a GPU never waits for the next launch
SECONDS = 1.0  # the time for repeating one product or one read


@dataclass(frozen=True)
class Peaks:
    """The rates of 10^9 integer operations and 10^9 bytes read per second, the best of all tries.

    On a GPU the bytes are those of a copy from the device to itself, read and written, as its makers count them.
    """

    int8_gops: float
    read_gb_per_s: float

    def best(self, other: "Peaks") -> "Peaks":
        """Return the higher one of each rate."""
        return Peaks(max(self.int8_gops, other.int8_gops), max(self.read_gb_per_s, other.read_gb_per_s))


def measure_peaks(device: torch.device) -> Peaks:
    """Return the peaks of `device` with the current number of threads; takes a few seconds."""
    best = 0.0
    for size in SIZES[_kind(device)]:
        for product in _int8_products(size, device):
            seconds = _fastest(product, device)
            best = max(best, 2 * size**3 / seconds / 1e9)
        if 8 * 2 * size**3 / best / 1e9 > SECONDS:
            break  # one product of the next size would take longer
    return Peaks(best, _read_gb_per_s(device))


def synchronise(device: torch.device) -> None:
    """Wait until the work given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


def _read_gb_per_s(device: torch.device) -> float:
    size = READ_BYTES[_kind(device)]
    data = torch.ones(size // 4, device=device)
    if device.type != "cuda":
        return size / _fastest(data.sum, device) / 1e9
    target = torch.empty_like(data)
    return 2 * size / _fastest(lambda: target.copy_(data), device) / 1e9


def _int8_products(size: int, device: torch.device) -> Iterator[Callable[[], object]]:
    """Return calls that multiply two square int8 matrices, one for each kernel that torch has here."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randint(-128, 128, (2, size, size), dtype=torch.int8, device=device, generator=generator).unbind()
    yield lambda: torch._int_mm(a, b.t())
    if device.type != "cpu":
        return
    try:
        packed = torch.ops.onednn.qlinear_prepack(b, None)
        unsigned = a.view(torch.uint8)
        scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int32)

        def linear() -> torch.Tensor:
            return torch.ops.onednn.qlinear_pointwise(
                unsigned, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            )

        linear()
    except (AttributeError, RuntimeError, NotImplementedError):
        return  # this torch is built without oneDNN
    yield linear


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: the fastest of at least three tries within `SECONDS`."""
    call()
    synchronise(device)
    best, spent, tries, queued = float("inf"), 0.0, 0, QUEUED[_kind(device)]
    while tries < 3 or (spent < SECONDS and tries < 30):
        start = time.perf_counter()
        for _ in range(queued):
            call()
        synchronise(device)
        seconds = time.perf_counter() - start
        best, spent, tries = min(best, seconds / queued), spent + seconds, tries + 1
    return best
