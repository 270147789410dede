"""Seconds and peak memory of the stages of an evaluation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Costs:
    """The `seconds` of stages by name, and the peak memory of a GPU in each of them, `device_bytes`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.device_bytes: dict[str, int] = {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Measure what the block does."""
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if gpu:
            torch.cuda.synchronize(self.device)
            self.device_bytes[stage] = torch.cuda.max_memory_allocated(self.device)
        self.seconds[stage] = round(time.perf_counter() - start, 3)
