"""What the machine can do at best, measured in the same run as the models: int8 products and reading memory."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

SIZES = (1024, 2048, 4096)  # of square products; a CPU is at its peak from the first, a GPU at the last
SECONDS = 1.0  # for repeating one product or one read
READ_BYTES = 1 << 28  # far more than a cache holds


@dataclass(frozen=True)
class Peaks:
    """10^9 integer operations and 10^9 bytes read per second, the best of all tries."""

    int8_gops: float
    read_gb_per_s: float

    def best(self, other: "Peaks") -> "Peaks":
        return Peaks(max(self.int8_gops, other.int8_gops), max(self.read_gb_per_s, other.read_gb_per_s))


def measure_peaks(device: torch.device) -> Peaks:
    """The peaks of `device` with the current number of threads; takes a few seconds."""
    best = 0.0
    for size in SIZES:
        for product in _int8_products(size, device):
            seconds = _fastest(product, device)
            best = max(best, 2 * size**3 / seconds / 1e9)
        if 8 * 2 * size**3 / best / 1e9 > SECONDS:
            break  # one product of the next size
    data = torch.ones(READ_BYTES // 4, device=device)
    return Peaks(best, READ_BYTES / _fastest(data.sum, device) / 1e9)


def synchronise(device: torch.device) -> None:
    """Wait until the work given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _int8_products(size: int, device: torch.device) -> Iterator[Callable[[], object]]:
    """Calls that multiply two square int8 matrices, by each kernel that torch has here."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-128, 128, (2, size, size), generator=generator).to(torch.int8).to(device).unbind()
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
    """Seconds of the fastest of at least three calls within `SECONDS`."""
    call()
    synchronise(device)
    best, spent, tries = float("inf"), 0.0, 0
    while tries < 3 or (spent < SECONDS and tries < 30):
        start = time.perf_counter()
        call()
        synchronise(device)
        seconds = time.perf_counter() - start
        best, spent, tries = min(best, seconds), spent + seconds, tries + 1
    return best
