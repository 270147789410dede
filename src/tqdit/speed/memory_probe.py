"""Measure load time and memory of one model in a process of its own: one process cannot tell its models apart.

`python -m tqdit.speed.memory_probe` reads a request as JSON from standard input and prints a `Footprint` as JSON.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit import workflow
from tqdit.architectures.building import empty_model
from tqdit.ops.dispatch import get_backend
from tqdit.speed.baselines import DenoiserCall, build, is_compiled
from tqdit.speed.machine import synchronise
from tqdit.speed.quiet import quiet
from tqdit.system.environment import peak_memory_bytes

PACKAGES = Path(__file__).resolve().parents[2]  # the child process imports the same package from here
STATUS = Path("/proc/self/status")
WARM_UP = 2  # calls before the measured one: the first compiles, a later one may capture a graph


@dataclass(frozen=True)
class Footprint:
    """Bytes above the imports: `resident_bytes` after loading, `peak_bytes` at most during a call after the first.

    On a GPU they are bytes of its memory that torch's allocator has given out: weights, activations, workspaces of
    cuBLAS, not the driver's own. What a CUDA graph reserves for its replays is in the peak: nobody else can use it,
    though no tensor is in it. Where a process cannot ask for its present size (not Linux), both are upper bounds: its
    largest size so far. `load_seconds`: from the page cache; None for a baseline, which is made up.
    """

    resident_bytes: int
    peak_bytes: int
    load_seconds: float | None


def footprint(request: Mapping[str, Any]) -> Footprint:
    """Measure a model in a fresh process. Raises `RuntimeError` with the process's last words if that fails.

    `request`: `config`, `batch`, `device`, `threads`; and `artifact` with `backend` and `dtype`, or `baseline`.
    """
    command = [sys.executable, "-m", "tqdit.speed.memory_probe"]
    path = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        command, input=json.dumps(dict(request)), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the process ended with code {child.returncode}")
    return Footprint(**json.loads(child.stdout.splitlines()[-1]))


def measure(request: Mapping[str, Any]) -> Footprint:
    """Measure in the child process: load the model, call it to warm up, call it again, and read the memory."""
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    _import_what_it_needs(request, device)
    if "artifact" in request:
        _into_page_cache(Path(request["artifact"]))
    before = _resident(device)
    start = time.perf_counter()
    module = _load(request, device)
    synchronise(device)
    seconds = time.perf_counter() - start
    gc.collect()
    resident = _resident(device) - before
    call = DenoiserCall(module, request["config"], request["batch"], device)
    with quiet():
        for t in range(WARM_UP):
            call(t)
    _forget_peak(device)
    call(0)
    return Footprint(resident, _peak(device) - before, seconds if "artifact" in request else None)


def _into_page_cache(folder: Path) -> None:
    """Read the files into the page cache, so that loading is timed without the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def _load(request: Mapping[str, Any], device: torch.device) -> nn.Module:
    if "artifact" in request:
        return workflow.load(request["artifact"], backend=request["backend"], device=device, dtype=request["dtype"])
    name = request["baseline"]
    return build((name,), request["config"], device)[name]


def _import_what_it_needs(request: Mapping[str, Any], device: torch.device) -> None:
    """Import all libraries that loading and calling would import, the compiler included, and start a GPU."""
    with quiet():
        torch.ones(1, device=device)
        empty_model(request["config"])
        if "artifact" in request:
            import accelerate  # noqa: F401

            get_backend(request["backend"], device)
        elif request["baseline"].startswith("torchao"):
            import torchao.quantization  # noqa: F401
        if "baseline" in request and is_compiled(request["baseline"]):
            torch.compile(lambda x: x + 1)(torch.ones(1, device=device))


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _idle_in_graphs(device)
    return _status("VmHWM")


def _idle_in_graphs(device: torch.device) -> int:
    """Return the bytes that CUDA graphs reserve in segments of their own, beyond the tensors in these segments."""
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == index]
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _forget_peak(device: torch.device) -> None:
    """Start a new high-water mark; where the system refuses, the old one stays, which is an upper bound."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status(key: str) -> int:
    """Return a size from Linux' account of this process, in bytes."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return peak_memory_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(json.dumps(asdict(measure(json.load(sys.stdin)))))
