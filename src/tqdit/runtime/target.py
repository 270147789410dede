"""`Target` says where a model runs: by which backend, on which device, and with which dtype between its blocks."""

from dataclasses import dataclass

import torch

from tqdit.errors import InputError
from tqdit.ops.dispatch import get_backend
from tqdit.ops.schema import Backend
from tqdit.system import distributed

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Device = str | torch.device
Dtype = str | torch.dtype


@dataclass(frozen=True, init=False)
class Target:
    """A backend, a device and a dtype that this machine has.

        Target()    # the best backend of a GPU where there is one, else of the CPU
        Target("triton", torch.device("cuda:1"), "bfloat16")

    `backend`: a name; "auto" is the best one for the device. `device`: torch's own or a name; "auto" is a GPU where
    there is one, else the CPU. `dtype`: float32, float16 or bfloat16, torch's own or a name; it is the dtype of an
    integer model's residual stream, but float32 for float16 where that might not hold the stream.

    Raises `InputError` that names the one that is unknown or not available.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype

    def __init__(self, backend: str = "auto", device: Device = "auto", dtype: Dtype = "float32") -> None:
        found = checked_device(device)
        if backend != "auto":
            get_backend(backend, found)
        for name, value in (("backend", backend), ("device", found), ("dtype", checked_dtype(dtype))):
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def kernels(self) -> Backend:
        """Return the backend itself; for "auto", the one that is best now."""
        return get_backend(self.backend, self.device)

    @property
    def dtype_name(self) -> str:
        """Return the dtype as "float32", "float16" or "bfloat16"."""
        return dtype_name(self.dtype)


def checked_device(device: Device = "auto") -> torch.device:
    """Return a device of this machine; "auto" is a GPU where there is one, else the CPU.

    Raises `InputError` for a device that is unknown or not available.
    """
    try:
        chosen = torch.device(distributed.chosen_device(device))
        torch.empty(1, device=chosen).item()  # the device "meta" exists but cannot compute
    except (RuntimeError, AssertionError):
        raise InputError(f"device '{device}' is not available here; try cpu") from None
    return chosen


def checked_dtype(dtype: Dtype) -> torch.dtype:
    """Return the dtype that an integer model is loaded as, given by its name or torch's own.

    Raises `InputError` for any other than float32, float16 and bfloat16.
    """
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: Dtype) -> str:
    """Return "bfloat16" for that string and for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
