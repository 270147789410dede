"""Keeping autocast away from float products that stand for integer ones: fp16 and bf16 would round their sums."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside, for a kind of device; costs next to nothing where there is none."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
