"""Integer operations on NVIDIA GPUs, written in Triton. Nothing of Triton is imported before a backend is made."""

import importlib.util
import os
from typing import Any

import torch

OLDEST = (8, 0)  # the first compute capability with int8 tensor cores that Triton uses


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None.

    Triton's interpreter runs them on a CPU, for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; Linux only)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip:
        return "it runs on NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, the GPU has {found[0]}.{found[1]}"
    return None


def BACKEND() -> Any:  # noqa: N802  (a class in the other backends)
    """Return the backend with int8 weights."""
    from tqdit.backends.triton.backend import TritonBackend

    return TritonBackend()
