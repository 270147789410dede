"""Choose the integer instructions to which `kernels/` is compiled: those of this processor, or those that are named.

TQDIT_INSTRUCTIONS names a set, such as `avx2`: for comparisons, and where a processor's best set is not its fastest.
The kernels compiled to any set give the same codes and accumulators.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tqdit.errors import InputError

GENERIC = "generic"
ARM = ("arm64", "aarch64")
X86 = ("x86_64", "AMD64")


class Instructions(NamedTuple):
    """A set of integer instructions, and what it takes."""

    machines: tuple[str, ...]  # as `platform.machine` names them
    flags: tuple[str, ...]  # of GCC and Clang
    features: frozenset[str]  # of the processor, as Linux names them


# What GCC and Clang take for granted from x86-64-v3 on.
V3 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
AVX512 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}
# By name, the best of a machine first. The order is that of the enumeration `Instructions` of dots.h, which begins with
# generic, 0.
KNOWN = {
    "amx-int8": Instructions(
        X86,
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8"),
        AVX512 | {"avx512_bf16", "amx_tile", "amx_int8"},
    ),
    "avx512-vnni": Instructions(X86, ("-march=x86-64-v4", "-mavx512vnni"), AVX512),
    "avx2-vnni": Instructions(X86, ("-march=x86-64-v3", "-mavxvnni"), V3 | {"avx_vnni"}),
    "avx2": Instructions(X86, ("-march=x86-64-v3",), V3),
    "i8mm": Instructions(ARM, ("-march=armv8.2-a+dotprod+i8mm",), frozenset({"asimddp", "i8mm"})),
    "dotprod": Instructions(ARM, ("-march=armv8.2-a+dotprod",), frozenset({"asimddp"})),
}
NAMES = (GENERIC, *KNOWN)
# Where the operating system does not let a process use the tiles of AMX, the kernels are compiled without them.
WITHOUT_TILES = "-DTQDIT_NO_TILES"
# Linux on x86-64: the number of arch_prctl, its request for a part of the processor's state, and that of tiles.
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
# The flags of the oldest processors of a kind that torch's builds run on.
BASELINES = dict.fromkeys(X86, ("-march=x86-64",)) | dict.fromkeys(ARM, ("-march=armv8-a",))


def target_flags() -> tuple[str, ...]:
    """Return the compiler flags of the instruction set.

    Those of TQDIT_INSTRUCTIONS if it is set, then those of TQDIT_CXXFLAGS. Without either, those of this processor.
    Raises `InputError` for a name that is unknown or that this processor has not.
    """
    flags = _flags_of_set()
    # A compiler asks the processor itself, and finds tiles also where the system has said nothing of them.
    return flags if "-march=native" not in flags or tiles_permitted() else (*flags, WITHOUT_TILES)


def _flags_of_set() -> tuple[str, ...]:
    more = os.environ.get("TQDIT_CXXFLAGS")
    if named := os.environ.get("TQDIT_INSTRUCTIONS"):
        return (*_named(named), *(more or "").split())
    if more is not None:
        return tuple(more.split())
    if platform.machine() not in ARM:
        return ("-march=native",)
    # Compilers know "native" by the model of a processor, and that of a newer one is generic to them.
    best = available()[0]
    return ("-mcpu=native",) if best == GENERIC or not features() else KNOWN[best].flags


def available() -> list[str]:
    """Return the names of the sets that this processor has, the best first; all of its kind where that is not known."""
    machine, found = platform.machine(), features()
    of_kind = {name: known.features for name, known in KNOWN.items() if machine in known.machines}
    named = [*(name for name, needed in of_kind.items() if not found or needed <= found), GENERIC]
    return [name for name in named if not name.startswith("amx") or tiles_permitted()]


@functools.cache
def tiles_permitted() -> bool:
    """Ask Linux to let this process use the tile registers of AMX, and say whether it does.

    Linux grants them to a process as a whole, since a signal's frame on the stack becomes 8 KiB longer.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    numbers = map(ctypes.c_long, (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))
    return ctypes.CDLL(None).syscall(*numbers) == 0


def _named(name: str) -> tuple[str, ...]:
    if name not in NAMES:
        raise InputError(f"TQDIT_INSTRUCTIONS names '{name}', not one of {', '.join(NAMES)}")
    if name not in available():
        raise InputError(f"TQDIT_INSTRUCTIONS names '{name}', and this processor has {', '.join(available())}")
    return BASELINES.get(platform.machine(), ()) if name == GENERIC else KNOWN[name].flags


def features() -> frozenset[str]:
    """Return what Linux says that this processor has, or nothing elsewhere."""
    line = next((line for line in _cpuinfo() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


@functools.cache
def description() -> str:
    """Return a text that is another one on a processor with other features."""
    if lines := _cpuinfo():
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    sysctl = shutil.which("sysctl")  # macOS
    command = [sysctl or "", "-n", "machdep.cpu.brand_string"]
    brand = subprocess.run(command, capture_output=True, text=True, check=False).stdout if sysctl else ""
    return platform.processor() + platform.machine() + brand


@functools.cache
def _cpuinfo() -> tuple[str, ...]:
    try:
        return tuple(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return ()
