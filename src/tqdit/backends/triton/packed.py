"""The Triton backend with weights packed on the device, as a module of its own that is found by name."""

from typing import Any

from tqdit.backends.triton import unavailable

__all__ = ["BACKEND", "unavailable"]


def BACKEND() -> Any:  # noqa: N802  (a class in the other backends)
    """Return the backend with packed weights."""
    from tqdit.backends.triton.backend import PackedTritonBackend

    return PackedTritonBackend()
