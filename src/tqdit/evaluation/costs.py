"""Seconds and peak memory of the stages of an evaluation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tqdit.system.environment import peak_memory_bytes


class Costs:
    """The costs of stages by name: seconds, the peak memory of the process until then, and that of a GPU in the stage.

    The peak of a process includes everything before the stage, imports too: an operating system keeps one peak only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: dict[str, dict[str, float]] = {}

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
        cost: dict[str, float] = {"seconds": round(time.perf_counter() - start, 3)}
        cost["peak_memory_bytes"] = peak_memory_bytes()
        if gpu:
            cost["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.stages[stage] = cost
