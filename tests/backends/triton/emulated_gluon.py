"""Runs kernels in Gluon on a CPU: their own Python, on NumPy arrays, each partition in a thread of its own.

What a GPU leaves open is done as late as possible: a product is computed when somebody waits for it, from what shared
memory holds then. To read a product that nobody has waited for is an error; so is a wait that nothing ends. Layouts are
not emulated: kernels assert them when they are compiled.
"""

import re
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.experimental.gluon import language as gluon_language

PATIENCE = 60.0  # seconds after which a wait is a deadlock
INTEGER = {np.dtype(np.int32): np.int64}
LOCAL = threading.local()


def _raw(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


class Tensor:
    """An array that remembers its layout."""

    def __init__(self, data: Any, layout: Any = None) -> None:
        self.data, self.layout = np.asarray(data), layout

    @property
    def type(self) -> "Tensor":
        return self

    @property
    def dtype(self) -> Any:
        return self.data.dtype.type

    def to(self, dtype: Any, bitcast: bool = False) -> "Tensor":
        if bitcast:
            return Tensor(self.data.view(dtype), self.layout)
        if np.issubdtype(dtype, np.integer) and np.issubdtype(self.data.dtype, np.integer):
            return Tensor(self.data.astype(np.int64).astype(dtype), self.layout)
        return Tensor(self.data.astype(dtype), self.layout)

    def reshape(self, *shape: int) -> "Tensor":
        return Tensor(self.data.reshape(*shape))

    def permute(self, *axes: int) -> "Tensor":
        return Tensor(self.data.transpose(*axes))

    def split(self) -> tuple["Tensor", "Tensor"]:
        return Tensor(self.data[..., 0]), Tensor(self.data[..., 1])

    def __getitem__(self, index: Any) -> "Tensor":
        return Tensor(self.data[index])

    def _with(self, other: Any, operation: Callable) -> "Tensor":
        a, b = self.data, _raw(other)
        if isinstance(b, Memory | Running | Pointer):
            return NotImplemented
        if not isinstance(b, np.ndarray):
            b = np.asarray(b, dtype=a.dtype)
        kind = np.result_type(a.dtype, b.dtype)
        if np.issubdtype(kind, np.floating):
            kind = np.dtype(np.float32)
        with np.errstate(all="ignore"):
            found = operation(a.astype(INTEGER.get(kind, kind)), b.astype(INTEGER.get(kind, kind)))
        return Tensor(found if found.dtype == bool else found.astype(kind), self.layout)

    def __add__(self, o: Any) -> Any:
        return self._with(o, np.add)

    def __radd__(self, o: Any) -> Any:
        return self._with(o, np.add)

    def __sub__(self, o: Any) -> Any:
        return self._with(o, np.subtract)

    def __rsub__(self, o: Any) -> Any:
        return self._with(o, lambda a, b: b - a)

    def __mul__(self, o: Any) -> Any:
        return self._with(o, np.multiply)

    __rmul__ = __mul__

    def __and__(self, o: Any) -> Any:
        return self._with(o, np.bitwise_and)

    def __rshift__(self, o: Any) -> Any:
        return self._with(o, np.right_shift)

    def __floordiv__(self, o: Any) -> Any:
        return self._with(o, np.floor_divide)

    def __lt__(self, o: Any) -> Any:
        return self._with(o, np.less)

    def __gt__(self, o: Any) -> Any:
        return self._with(o, np.greater)

    def __ne__(self, o: Any) -> Any:
        return self._with(o, np.not_equal)

    def __eq__(self, o: Any) -> Any:
        return self._with(o, np.equal)

    def __neg__(self) -> "Tensor":
        return Tensor(-self.data, self.layout)

    __hash__ = None  # type: ignore[assignment]


class Running:
    """The sums of a product that may be under way."""

    def __init__(self, value: Tensor | None) -> None:
        self.value = value

    def done(self) -> Tensor:
        assert self.value is not None, "nobody has waited for this product"
        return self.value


class Memory:
    """A part of shared memory."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def index(self, i: Any) -> "Memory":
        i = int(_raw(i))
        assert 0 <= i < len(self.data)
        return Memory(self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> "Memory":
        return Memory(self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, axes: tuple[int, ...]) -> "Memory":
        return Memory(self.data.transpose(axes))

    def reinterpret(self, dtype: Any, shape: list[int], _layout: Any) -> "Memory":
        return Memory(self.data.view(dtype).reshape(shape))

    _reinterpret = reinterpret

    def load(self, layout: Any = None) -> Tensor:
        return Tensor(self.data.copy(), layout)

    def store(self, value: Tensor) -> None:
        assert self.data.shape == value.data.shape
        self.data[...] = value.data


class Pointer:
    """Places in a flat array of global memory."""

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array, self.offset = array, offset

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.array, self.offset + _raw(other))


class Blocks:
    """A matrix of which blocks are copied; `block` rows and columns at a time."""

    def __init__(self, array: np.ndarray, block: tuple[int, int]) -> None:
        self.array, self.block, self.layout = array, block, None


class Barrier:
    """A barrier in shared memory, with phases."""

    def __init__(self, shared: threading.Condition) -> None:
        self.shared, self.count, self.left, self.bytes, self.phase = shared, 0, 0, 0, 0

    def change(self, arrivals: int, count: int) -> None:
        with self.shared:
            self.left -= arrivals
            self.bytes += count
            assert self.left >= 0
            if self.left == 0 and self.bytes == 0:
                self.phase, self.left = self.phase + 1, self.count
                self.shared.notify_all()

    def wait(self, parity: int) -> None:
        with self.shared:
            done = self.shared.wait_for(lambda: LOCAL.state.failed or self.phase % 2 != parity, PATIENCE)
        assert done, "a deadlock"
        assert not LOCAL.state.failed


class Barriers:
    def __init__(self, count: int, shared: threading.Condition) -> None:
        self.all = [Barrier(shared) for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(_raw(i))]


class Program:
    """The state of one program: its number, and what ends it."""

    def __init__(self, number: int, programs: int) -> None:
        self.number, self.programs = number, programs
        self.shared = threading.Condition()
        self.failed: list[BaseException] = []


def _mbarrier() -> types.SimpleNamespace:
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    def arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if bool(_raw(pred)):
            barrier.change(count, 0)

    return types.SimpleNamespace(
        init=init,
        arrive=arrive,
        expect=lambda barrier, count: barrier.change(1, count),
        wait=lambda barrier, parity: barrier.wait(int(_raw(parity))),
        MBarrierLayout=lambda: None,
    )


def _copy(blocks: Blocks, corner: list[Any], barrier: Barrier, to: Memory) -> None:
    (row, column), (height, width) = (int(_raw(x)) for x in corner), blocks.block
    found = np.zeros((height, width), blocks.array.dtype)
    part = blocks.array[row : row + height, column : column + width]
    found[: part.shape[0], : part.shape[1]] = part
    assert to.data.shape == found.shape
    to.data[...] = found
    barrier.change(0, -found.nbytes)


def _product(a: Any, b: Memory, sums: Any, is_async: bool = False, use_acc: bool = True) -> Any:
    found = Running(None)

    def compute() -> None:
        start = sums.done() if isinstance(sums, Running) else sums
        found.value = start + Tensor(a.data.astype(np.int32) @ b.data.astype(np.int32))

    LOCAL.products.append(compute)
    return found if is_async else _wait(0, (found,))


def _wait(left: int, deps: tuple) -> Any:
    while len(LOCAL.products) > left:
        LOCAL.products.pop(0)()
    found = tuple(x.done() if isinstance(x, Running) else x for x in deps)
    return found if len(found) > 1 else found[0]


def _fma(x: Any, y: Any, z: Any) -> Tensor:
    found = _raw(x).astype(np.float64) * _raw(y) + _raw(z)
    return Tensor(found.astype(np.float32), getattr(x, "layout", None))


class PTX:
    """The instructions that kernels have in inline assembly, on arrays of registers."""

    def __init__(self, registers: dict[str, np.ndarray]) -> None:
        self.registers = registers

    def value(self, name: str, dtype: Any) -> np.ndarray:
        if name in self.registers:
            return self.registers[name].view(dtype)
        if name.startswith("0f"):
            return np.array([int(name[2:], 16)], np.uint32).view(dtype)
        return np.array([int(name, 0) & 0xFFFFFFFF], np.uint32).view(dtype)

    def run(self, text: str) -> None:
        skipped = None  # where instructions do nothing
        for part in re.sub(r"[{}]", " ", text).split(";"):
            line = part.strip().removeprefix("DONE:").strip()
            if not line or line.startswith((".reg", "vote")):
                continue
            if line.startswith("@!p bra"):
                skipped = self.registers["p"] == 0
                continue
            name, _, operands = line.partition(" ")
            to, *given = (x.strip() for x in operands.split(","))
            found = np.atleast_1d(self.compute(name, given)).view(np.uint32)
            before = self.registers.get(to)
            if skipped is not None and before is not None:
                found = np.where(skipped, before, found)
            self.registers[to] = found

    def compute(self, name: str, given: list[str]) -> np.ndarray:
        dtype = {"f32": np.float32, "f16x2": np.float16, "s32": np.int32, "b32": np.uint32}[name.rpartition(".")[2]]
        if name == "cvt.rn.f16x2.f32":
            high, low = (self.value(x, np.float32).astype(np.float16).view(np.uint16) for x in given)
            return (high.astype(np.uint32) << 16) | low
        if name == "dp4a.s32.s32":
            signed = (self.value(g, np.int8).reshape(-1, 4).astype(np.int32) for g in given[:2])
            return (np.multiply(*signed).sum(1) + self.value(given[2], np.int32)).astype(np.int32)
        x = [self.value(g, dtype) for g in given]
        if dtype is np.float16:
            x = [np.resize(v, max(map(np.size, x))) for v in x]  # two numbers a register
        return INSTRUCTIONS[name.partition(".")[0]](*x).astype(dtype)


def _permuted_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    size = max(a.size, b.size)
    of_both = [np.ascontiguousarray(np.broadcast_to(v, size)).view(np.uint8).reshape(-1, 4) for v in (a, b)]
    chosen = [int(selector[0]) >> 4 * i & 7 for i in range(4)]
    return np.ascontiguousarray(np.concatenate(of_both, 1)[:, chosen]).view(np.uint32).reshape(-1)


INSTRUCTIONS: dict[str, Callable] = {
    "ex2": lambda x: np.exp2(x.astype(np.float64)),
    "fma": lambda x, y, z: x.astype(np.float64) * y + z,
    "add": lambda x, y: x.astype(np.int64) + y,
    "mul": lambda x, y: x.astype(np.int64) * y >> 32,
    "mad": lambda x, y, z: x.astype(np.int64) * y + z,
    "or": np.bitwise_or,
    "setp": np.not_equal,
    "prmt": _permuted_bytes,
    "mov": lambda x: x,
}


def _assembly(text: str, constraints: str, given: list[Any], dtype: Any, is_pure: bool, pack: int) -> Tensor:
    arrays = np.broadcast_arrays(*(_raw(x) for x in given))
    shape, (outputs, inputs) = arrays[0].shape, (pack, [a.reshape(-1, pack) for a in arrays])
    if np.dtype(dtype).itemsize == 1:
        outputs = pack // 4
        inputs = [a.view(np.uint8).reshape(len(a), -1).view(np.uint32) if a.dtype == np.int8 else a for a in inputs]
    registers = {}
    tied = "0" in constraints.split(",")
    for number, column in enumerate(c for a in inputs for c in a.T):
        registers[f"${outputs + number}"] = np.ascontiguousarray(column).view(np.uint32)
    if tied:
        registers |= {f"${i}": registers[f"${outputs + i}"].copy() for i in range(outputs)}
    machine = PTX(registers)
    machine.run(text)
    found = np.stack([np.broadcast_to(machine.registers[f"${i}"], len(inputs[0])) for i in range(outputs)], 1)
    return Tensor(np.ascontiguousarray(found).view(dtype).reshape(shape), getattr(given[0], "layout", None))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    if mask is None:
        return Tensor(pointer.array[pointer.offset])
    found = np.full(np.shape(pointer.offset), other, pointer.array.dtype)
    found[_raw(mask)] = pointer.array[np.asarray(pointer.offset)[_raw(mask)]]
    return Tensor(found)


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    where = np.ones(pointer.offset.shape, bool) if mask is None else np.broadcast_to(_raw(mask), pointer.offset.shape)
    data = value.data if value.dtype == pointer.array.dtype.type else value.to(pointer.array.dtype.type).data
    pointer.array[pointer.offset[where]] = data[where]


def _larger(a: Any, b: Any) -> Any:
    return a._with(b, np.maximum) if isinstance(a, Tensor) else max(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return a._with(b, np.minimum) if isinstance(a, Tensor) else min(a, b)


def _specialize(functions: list, _warps: list[int], _registers: list[int]) -> None:
    state = LOCAL.state

    def run(function: Callable, given: tuple) -> None:
        LOCAL.state, LOCAL.products = state, []
        try:
            function(*given)
            assert not LOCAL.products, "a product nobody has waited for"
        except BaseException as error:
            with state.shared:
                state.failed.append(error)
                state.shared.notify_all()

    threads = [threading.Thread(target=run, args=each) for each in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if state.failed:
        raise state.failed[0]


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if dtype is np.int64:
        return Barriers(shape[0], LOCAL.state.shared)
    return Memory(np.full(shape, 77, dtype))


def language() -> types.SimpleNamespace:
    """The members of `gl` and `tl` that kernels use."""
    real = gluon_language
    return types.SimpleNamespace(
        int8=np.int8, int32=np.int32, int64=np.int64, int1=np.bool_, float32=np.float32, constexpr=lambda x: x,
        SliceLayout=real.SliceLayout, BlockedLayout=real.BlockedLayout, DotOperandLayout=real.DotOperandLayout,
        SwizzledSharedLayout=real.SwizzledSharedLayout, NVMMADistributedLayout=real.NVMMADistributedLayout,
        program_id=lambda _: LOCAL.state.number, num_programs=lambda _: LOCAL.state.programs,
        load=_load, store=_store, warp_specialize=_specialize, allocate_shared_memory=_allocate,
        inline_asm_elementwise=_assembly, static_range=range, cdiv=lambda a, b: -(-a // b),
        zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(shape, dtype), layout),
        full=lambda shape, value, dtype, layout=None: Tensor(np.full(shape, value, dtype), layout),
        full_like=lambda x, value: Tensor(np.full_like(x.data, value), x.layout),
        arange=lambda start, end, layout=None: Tensor(np.arange(start, end, dtype=np.int32), layout),
        where=lambda c, a, b: Tensor(np.where(_raw(c), _raw(a), np.asarray(_raw(b), _raw(a).dtype)), a.layout),
        maximum=_larger, minimum=_smaller,
        max=lambda x, axis: Tensor(x.data.max(axis)),
        sum=lambda x, axis: Tensor(x.data.sum(axis, dtype=x.data.dtype), x.layout),
        fma=_fma, div_rn=lambda a, b: a._with(b, np.divide),
        convert_layout=lambda x, layout, assert_trivial=False: Tensor(x.data, layout),
        max_contiguous=lambda x, _: x, multiple_of=lambda x, _: x,
    )  # fmt: skip


class Emulated:
    """The functions of modules of kernels, with this module in place of Gluon."""

    def __init__(self) -> None:
        self.fake = language()
        self.known: dict[int, Any] = {}
        self.places: dict[int, dict[str, Any]] = {}
        mbarrier = _mbarrier()
        self.instead = {
            "gl": self.fake, "tl": self.fake, "mbarrier": mbarrier, "COPY": _copy, "warpgroup_mma": _product,
            "warpgroup_mma_wait": _wait, "warpgroup_mma_init": Running, "fence_async_shared": lambda: None,
            "gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None,
        }  # fmt: skip

    def function(self, jitted: Any) -> Callable:
        """A function of a kernel as one of Python."""
        plain = jitted.fn
        if id(plain) not in self.known:
            self.known[id(plain)] = types.FunctionType(
                plain.__code__, self.names(plain.__globals__), plain.__name__, plain.__defaults__
            )
        return self.known[id(plain)]

    def names(self, given: dict[str, Any]) -> dict[str, Any]:
        if id(given) not in self.places:
            place = self.places[id(given)] = dict(given)
            for name, value in given.items():
                if name in self.instead:
                    place[name] = self.instead[name]
                elif isinstance(value, gluon_language.constexpr):
                    place[name] = value.value
                elif type(value).__name__ in ("JITFunction", "GluonJITFunction", "InterpretedFunction"):
                    place[name] = self.function(value)
        return self.places[id(given)]

    def launch(self, kernel: Any, programs: int, *given: Any) -> None:
        """Run all programs of a kernel, one after another."""
        for number in range(programs):
            LOCAL.state, LOCAL.products = Program(number, programs), []
            self.function(kernel)(*given)
