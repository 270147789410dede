"""Describe the machine that a figure was measured on: versions, processor, threads.

Every result file carries this description.
"""

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tqdit.version import VERSION


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return a JSON row of versions and hardware."""
    row: dict[str, Any] = {**versions(), "python": platform.python_version(), "cpu": _cpu_name()}
    row["threads"] = torch.get_num_threads()
    row["cores"] = cores()
    row["device"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return row


def cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions that decide the bytes of an artifact, besides its recipe and the device."""
    return {"tqdit": VERSION, "torch": torch.__version__, "diffusers": version("diffusers")}


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far, imports included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
