"""`isolated`: work runs as it would in a fresh process, whatever the caller has set in torch, and leaves no trace.

torch keeps a default dtype, a default device, autocast, gradients and more per process or per thread. Each of these
would change what a calibration computes, or end it with an error.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.backends import cuda

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
CUDNN: Any = torch.backends.cudnn
MKLDNN: Any = torch.backends.mkldnn  # a module whose class torch replaces: its attributes have no types


@contextmanager
def isolated() -> Iterator[None]:
    """Enter a fresh process's state of torch, and return to the caller's state at the end, after errors too.

    Inside: float32 is the default dtype and the CPU the default device; there is no autocast and no inference mode;
    gradients are on; fp32 products and convolutions are exact to fp32; deterministic algorithms are not asked for;
    attention may take any kernel. The number of threads stays. The global random generators are left alone: nothing in
    tqdit draws from them, and other threads may draw meanwhile.

    Use it as `with isolated():` or as the decorator `@isolated()` of a function, but not of a generator, whose body
    would run outside. Several threads may be inside at a time: each entry sets what a process has once, and the last
    thread that leaves restores it. Such a setting that a thread changes meanwhile reaches all threads inside, until one
    enters again.
    """
    with _PROCESS, _this_thread():
        yield


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast for one kind of device; it costs nothing where there is no autocast."""
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def _this_thread() -> Iterator[None]:
    """Set the state that torch keeps per thread as in a fresh process, and restore it at the end."""
    with ExitStack() as stack:
        for kind in AUTOCAST_DEVICES:
            stack.enter_context(without_autocast(kind))
        if _creates_elsewhere():
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if _flushes_denormals():
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
        yield


class _Process:
    """The state that torch keeps once per process: a context that counts the threads inside.

    Each entry sets what differs from a fresh process. What does not differ is not touched: another thread may change
    it meanwhile. The last thread that leaves restores what was found, the latest where entries found several.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found: dict[Callable[[Any], Any], Any] = {}  # setter -> value to restore

    def __enter__(self) -> None:
        with self._lock:
            for get, put, fresh in _SETTINGS:
                if (before := get()) != fresh:
                    self._found[put] = before
                    put(fresh)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                found, self._found = self._found, {}
                for put, before in found.items():
                    put(before)


_PROCESS = _Process()


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(setting: tuple[bool, bool]) -> None:
    enabled, warn_only = setting
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _precision() -> tuple[str, str, str]:
    """Return the precision of fp32 matrix products by the old setting and by the new ones.

    The new settings are those of GPUs and CPUs; "none" means fp32, too.
    """
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # the new settings contradict the old one, which can only be while the old one has its default
        old = "highest"
    return old, cuda.matmul.fp32_precision, MKLDNN.matmul.fp32_precision


def _set_precision(setting: tuple[str, str, str]) -> None:
    """Set the precision of fp32 matrix products, the old setting first.

    The old setting sets the new ones, and torch refuses to read it where they contradict it.
    """
    torch.set_float32_matmul_precision(setting[0])
    cuda.matmul.fp32_precision, MKLDNN.matmul.fp32_precision = setting[1:]


def _convolutions() -> tuple[bool | None, str, str]:
    """Return whether cuDNN may take TF32 for fp32 by the old setting, and its precisions by the new ones.

    The old setting is None where the new ones contradict it.
    """
    try:
        old = CUDNN.allow_tf32
    except RuntimeError:
        old = None
    return old, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision


def _set_convolutions(setting: tuple[bool | None, str, str]) -> None:
    """Set the precision of cuDNN's convolutions; the old setting, where there is one, sets the new ones too."""
    if setting[0] is None:
        CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = setting[1:]
    else:
        CUDNN.allow_tf32 = setting[0]


# Each row: the function that reads a setting, the one that sets it, and its value inside. That is a fresh process's,
# but for convolutions, which a fresh process computes in TF32.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any], Any], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (_determinism, _set_determinism, (False, False)),
    (_precision, _set_precision, ("highest", "none", "none")),
    (_convolutions, _set_convolutions, (False, "none", "none")),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
)


def _creates_elsewhere() -> bool:
    """Say whether a new tensor would not be on the CPU."""
    try:
        return torch.get_default_device().type != "cpu"
    except (RuntimeError, AssertionError):  # the default device does not exist here
        return True


def _flushes_denormals() -> bool:
    """Say whether the processor takes subnormal numbers for 0 in this thread.

    torch has no function that tells this.
    """
    return bool(torch.tensor([1e-40], dtype=torch.float32, device="cpu").mul(1.0).eq(0).item())
