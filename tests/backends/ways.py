"""The CPU backend in every way it can run: compiled or not, with oneDNN or without."""

import platform

import pytest

from tqdit.backends import cpu, native, onednn
from tqdit.ops.composed import Composed

# The oldest processor that torch's builds run on: no VNNI, no AVX.
GENERIC = "-march=x86-64" if platform.machine() in ("x86_64", "AMD64") else ""
WAYS = ("native", "generic", "panels", "torch", "no-onednn", "nothing")


def forget() -> None:
    """Drop what was probed and built, so that the environment is read again."""
    native._load.cache_clear()


def backend_that(way: str, monkeypatch: pytest.MonkeyPatch) -> Composed:
    if way == "generic":
        monkeypatch.setenv("TQDIT_CXXFLAGS", GENERIC)
    if way == "panels":  # the integer matmul of VNNI, in portable code
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{GENERIC} -DTQDIT_FORCE_PANELS")
    if way in ("torch", "nothing"):
        monkeypatch.setenv("TQDIT_CXX", "")
    if way in ("no-onednn", "nothing"):
        monkeypatch.setattr(onednn, "reason", lambda: "switched off by the test")
    forget()
    return cpu.BACKEND()
