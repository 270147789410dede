"""The CPU backend in every way it can run: compiled or not, with oneDNN or without, and for other processors."""

import ctypes
import functools
import platform
import shutil
import tempfile
from pathlib import Path

import emulated
import pytest

from tqdit.backends import cpu, native, onednn
from tqdit.backends.instructions import features
from tqdit.ops.composed import Composed

# The oldest processor that torch's builds run on: no VNNI, no AVX.
GENERIC = "-march=x86-64" if platform.machine() in ("x86_64", "AMD64") else ""
# A processor with AVX2 and without VNNI; and one with AVX2 and VNNI, without AVX-512.
AVX2 = "-march=x86-64-v3"
AVX2_VNNI = "-march=x86-64-v3 -mavxvnni"
# The tiles of AMX in plain C++.
TILES = Path(__file__).with_name("tiles.h")
# Portable code is compiled without optimization, which takes a second instead of twenty; as users get it in long tests.
OPTIMIZED = "-optimized"
# Kernels for ARM, in an emulator.
ARM = tuple(f"arm-{name}" for name in emulated.PROCESSORS)
WAYS = (
    "native", "generic", "panels", "torch", "no-onednn", "nothing",
    *(
        pytest.param(way + OPTIMIZED, marks=pytest.mark.long)
        for way in ("generic", "panels", "avx2", "avx2-vnni", "amx-int8", *ARM)
    ),
)  # fmt: skip
LOADED: dict[str, ctypes.CDLL | str] = {}  # by the way: hashing a library for every test takes longer than the test
# It compiles AVX-VNNI in the encoding of AVX-512, of the same operations on the same registers.
EVEX = Path(__file__).parents[2] / "bench" / "evex.sh"


def forget() -> None:
    """Drop what was probed and built, so that the environment is read again."""
    native._load.cache_clear()


def backend_that(way: str, monkeypatch: pytest.MonkeyPatch) -> Composed:
    level = "" if way.endswith(OPTIMIZED) else "-O0"
    if way.startswith("arm-"):
        return _emulated(way, level, monkeypatch)
    if way.startswith("generic"):
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{GENERIC} {level}")
    if way.startswith("panels"):  # the integer matmul of VNNI, in portable code
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{GENERIC} {level} -DTQDIT_FORCE_PANELS")
    if way.startswith("amx-int8"):
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{GENERIC} {level} -include {TILES}")
    if way.startswith("avx2"):
        monkeypatch.setenv("TQDIT_CXXFLAGS", f"{AVX2_VNNI if 'vnni' in way else AVX2} {level}")
    if way.startswith("avx2-vnni"):
        _need_avx_vnni(monkeypatch)
    if way in ("torch", "nothing"):
        monkeypatch.setenv("TQDIT_CXX", "")
    if way in ("no-onednn", "nothing"):
        monkeypatch.setattr(onednn, "reason", lambda: "switched off by the test")
    forget()
    if way not in LOADED:
        LOADED[way] = native._load()
    monkeypatch.setattr(native, "_load", functools.cache(lambda: LOADED[way]))
    return cpu.BACKEND()


def _need_avx_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx_vnni" in features():
        return
    if not {"avx512vl", "avx512_vnni"} <= features() or shutil.which("g++") is None:
        pytest.skip("neither AVX-VNNI nor AVX-512 VNNI here, or no g++")
    monkeypatch.setenv("TQDIT_CXX", str(EVEX))


def _emulated(way: str, level: str, monkeypatch: pytest.MonkeyPatch) -> Composed:
    if reason := emulated.missing():
        pytest.skip(reason)
    if way not in LOADED:
        name = way.removeprefix("arm-").removesuffix(OPTIMIZED)
        with tempfile.TemporaryDirectory() as folder:
            LOADED[way] = emulated.Library(emulated.build(name, level or "-O3", Path(folder) / "kernels"))
            assert LOADED[way].tqdit_has_instructions()  # it has started, and no longer needs its file
    library = LOADED[way]
    library.watch(monkeypatch)
    monkeypatch.setattr(native, "_load", functools.cache(lambda: library))
    return cpu.BACKEND()
