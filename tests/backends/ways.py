"""The CPU backend in every way it can run: compiled or not, with oneDNN or without."""

import ctypes
import functools
import platform

import pytest

from tqdit.backends import cpu, native, onednn
from tqdit.ops.composed import Composed

# The oldest processor that torch's builds run on: no VNNI, no AVX.
GENERIC = "-march=x86-64" if platform.machine() in ("x86_64", "AMD64") else ""
# A processor with AVX2 and without VNNI.
AVX2 = "-march=x86-64-v3"
# Portable code is compiled without optimization, which takes a second instead of twenty; as users get it in long tests.
OPTIMIZED = "-optimized"
WAYS = (
    "native", "generic", "panels", "torch", "no-onednn", "nothing",
    *(pytest.param(way + OPTIMIZED, marks=pytest.mark.long) for way in ("generic", "panels", "avx2")),
)  # fmt: skip
LOADED: dict[str, ctypes.CDLL | str] = {}  # by the way: hashing a library for every test takes longer than the test


def forget() -> None:
    """Drop what was probed and built, so that the environment is read again."""
    native._load.cache_clear()


def backend_that(way: str, monkeypatch: pytest.MonkeyPatch) -> Composed:
    level = "" if way.endswith(OPTIMIZED) else "-O0"
    if way.startswith("generic"):
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{GENERIC} {level}")
    if way.startswith("panels"):  # the integer matmul of VNNI, in portable code
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{GENERIC} {level} -DTQDIT_FORCE_PANELS")
    if way.startswith("avx2"):
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{AVX2} {level}")
    if way in ("torch", "nothing"):
        monkeypatch.setenv("TQDIT_CXX", "")
    if way in ("no-onednn", "nothing"):
        monkeypatch.setattr(onednn, "reason", lambda: "switched off by the test")
    forget()
    if way not in LOADED:
        LOADED[way] = native._load()
    monkeypatch.setattr(native, "_load", functools.cache(lambda: LOADED[way]))
    return cpu.BACKEND()
