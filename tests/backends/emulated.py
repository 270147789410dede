"""The kernels, compiled for a processor that is not here: its library, as `native.library` returns it, in an emulator.

Every call of C copies the tensors that it points into to the emulator and back. So the backend and all of its tests run
with kernels of another processor; the emulator refuses instructions that the emulated processor has not.
"""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tqdit.backends import cpu_ends, fused, instructions, native, panels, signatures

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Processors without anything newer than the set of this name; "max" is all that the emulator knows.
PROCESSORS = {"i8mm": "max", "dotprod": "neoverse-n1", "generic": "cortex-a57"}
SOURCE = Path(__file__).with_name("emulated.cpp")
Blocks = dict[int, tuple[int, Any]]  # address: size, what keeps it alive


def missing() -> str | None:
    """Say what is not installed here, or None."""
    absent = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def build(name: str, level: str, path: Path) -> list[str]:
    """Compile the kernels to ARM instructions of a name; return the command that runs them."""
    functions = ",".join(f"FUNCTION({function})" for function in signatures.FUNCTIONS)
    target = ("-march=armv8-a",) if name == "generic" else instructions.KNOWN[name].flags
    flags = [flag for flag in native.FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    command = [COMPILER, *flags, *target, level, "-static", f"-I{native.SOURCES}"]
    subprocess.run([*command, f"-DTQDIT_FUNCTIONS={functions}", str(SOURCE), "-o", str(path)], check=True)
    return [EMULATOR, "-cpu", PROCESSORS[name], str(path)]


class Library:
    """A library of the emulated processor: each of its functions is an attribute, as `ctypes.CDLL` has them."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.blocks: Blocks = {}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Learn of every tensor whose address is taken."""
        plain = signatures.address

        def address(tensor: torch.Tensor, *arguments: Any, **named: Any) -> int:
            found, storage = plain(tensor, *arguments, **named), tensor.untyped_storage()
            self.blocks[storage.data_ptr()] = storage.nbytes(), storage
            return found

        for module in (signatures, fused, panels, cpu_ends):
            patch.setattr(module, "address", address)

    def __getattr__(self, name: str) -> Callable[..., int]:
        place = list(signatures.FUNCTIONS).index(name.removeprefix("tqdit_"))
        return lambda *arguments: self._call(place, name, arguments)

    def _call(self, place: int, name: str, arguments: Sequence[Any]) -> int:
        structures = [given for given in arguments if isinstance(given, (ctypes.Structure, ctypes.Array))]
        for given in structures:
            self.blocks[ctypes.addressof(given)] = ctypes.sizeof(given), given
        blocks, self.blocks = self.blocks, {}
        pointers = [where for given in structures for where in _pointers(given, ctypes.addressof(given))]
        request = [struct.pack("<2q", place, len(blocks))]
        for address, (size, _) in blocks.items():
            request += [struct.pack("<q", size), ctypes.string_at(address, size)]
        request.append(struct.pack("<q", len(pointers)))
        for at, to in pointers:
            request.append(struct.pack("<4q", *_place(blocks, at), *_place(blocks, to)))
        request.append(struct.pack("<q", len(arguments)))
        types = signatures.FUNCTIONS[name.removeprefix("tqdit_")]
        for given, declared in zip(arguments, types, strict=True):
            request.append(struct.pack("<2q", *_argument(blocks, given, declared)))
        return self._answer(name, b"".join(request), blocks)

    def _answer(self, name: str, request: bytes, blocks: Blocks) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(request)
        self.process.stdin.flush()
        wanted = 8 + sum(size for size, _ in blocks.values())
        answer = self.process.stdout.read(wanted)
        assert len(answer) == wanted, f"{name} died in the emulator: {self.process.wait()}"
        at = 8
        for address, (size, _) in blocks.items():
            if isinstance(blocks[address][1], torch.UntypedStorage):  # pointers inside of structures are not ours
                ctypes.memmove(address, answer[at : at + size], size)
            at += size
        return int.from_bytes(answer[:8], "little", signed=True)


def _pointers(given: Any, base: int) -> list[tuple[int, int]]:
    """Return where pointers lie inside of a structure, or of an array of structures, and what they point to."""
    if isinstance(given, ctypes.Array):
        return [found for part in given for found in _pointers(part, ctypes.addressof(part))]
    found = []
    for name, kind in given._fields_:
        at, value = base + getattr(type(given), name).offset, getattr(given, name)
        if isinstance(value, ctypes.Structure):
            found += _pointers(value, at)
        elif kind is ctypes.c_void_p and value:
            found.append((at, value))
    return found


def _place(blocks: Blocks, address: int) -> tuple[int, int]:
    for index, (begin, (size, _)) in enumerate(blocks.items()):
        if begin <= address < begin + size:
            return index, address - begin
    raise AssertionError(f"a pointer to memory whose address nobody took: {address}")


def _argument(blocks: Blocks, given: Any, declared: Any) -> tuple[int, int]:
    if isinstance(given, (ctypes.Structure, ctypes.Array)):
        return _place(blocks, ctypes.addressof(given))
    if declared is ctypes.c_int64:
        return -1, given
    return (-1, 0) if given is None else _place(blocks, given)
