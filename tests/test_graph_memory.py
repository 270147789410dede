"""The memory that a CUDA graph of a model reserves: the allocations of a call, given to a model of torch's allocator.

Kernels are left out, and tensors lie on the CPU. `Pool` does what torch's allocator for GPUs does with large tensors: a
tensor takes the smallest free block that it fits into, whose rest stays free, or a segment of its own.
"""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from tqdit.architectures import patches
from tqdit.architectures.shapes import shape_config
from tqdit.backends.triton import configurations, tuning
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.speed.random_solution import random_solution

MIB = 2**20
BATCH, BLOCKS = 16, 2
GPU = "Some GPU 9000"
ON_GPU = SimpleNamespace(type="cuda")  # the device of latents; what is asked for there is on the CPU


class Pool:
    """The large segments of a graph: lists of [size, free] blocks in the order of their addresses."""

    def __init__(self) -> None:
        self.segments: list[list[list[Any]]] = []

    @property
    def reserved(self) -> list[int]:
        return [sum(size for size, _ in blocks) for blocks in self.segments]

    def take(self, size: int) -> list[Any]:
        size = -(-size // 512) * 512
        fitting = [(block[0], s, b) for s, blocks in enumerate(self.segments) for b, block in enumerate(blocks)
                   if block[1] and block[0] >= size]  # fmt: skip
        if not fitting:
            whole = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments.append([[whole, True]])
            fitting = [(whole, len(self.segments) - 1, 0)]
        found, s, b = min(fitting)
        block = self.segments[s][b]
        if found - size > MIB:
            self.segments[s].insert(b + 1, [found - size, True])
            block[0] = size
        block[1] = False
        return block

    def give(self, block: list[Any]) -> None:
        blocks = next(blocks for blocks in self.segments if any(block is other for other in blocks))
        block[1] = True
        for b in range(len(blocks) - 1, 0, -1):
            if blocks[b][1] and blocks[b - 1][1]:
                blocks[b - 1][0] += blocks.pop(b)[0]


class Allocations(TorchDispatchMode):
    """Give every new large tensor to a pool, for as long as it lives."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool, self.known = pool, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known and storage.nbytes() > MIB:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.free, storage._cdata, self.pool.take(storage.nbytes()))
        return out

    def free(self, name: int, block: list[Any]) -> None:
        self.known.discard(name)
        self.pool.give(block)


def leave_launches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let operators of the GPU backend return memory that no kernel writes to, and keep no operand."""

    class Notes(dict[Any, Any]):
        def setdefault(self, _: Any, value: Any) -> Any:
            return value

    monkeypatch.setattr(tuning, "NATIVE", True)
    monkeypatch.setattr(configurations, "table", lambda _: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    monkeypatch.setattr(tuning._NOTES, "jobs", Notes())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", ["plus", "paper"])
def test_the_blocks_of_a_model_fit_into_the_piece(
    preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**shape_config("DiT-XL/2"), "num_layers": BLOCKS}
    model = convert(random_solution(config, Recipe(preset, "w8a8")), "triton", dtype=dtype)
    x = torch.zeros(BATCH, 4, 32, 32)
    labels = torch.arange(BATCH)
    before: list[int] = []
    pool = Pool()
    real, empty = patches.lay_out, torch.empty
    asked: list[int] = []

    def lay_out(model: Any, x: torch.Tensor, width: int) -> None:
        before.extend(pool.reserved)
        with monkeypatch.context() as context:
            context.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            real(model, SimpleNamespace(shape=x.shape, device=ON_GPU), width)

    def of_the_cpu(*size: Any, **options: Any) -> torch.Tensor:
        if options.get("device") is ON_GPU:
            asked.append(size[0])
            options["device"] = "cpu"
        return empty(*size, **options)

    monkeypatch.setattr(patches, "lay_out", lay_out)
    monkeypatch.setattr(patches.torch, "empty", of_the_cpu)
    leave_launches_out(monkeypatch)
    gc.collect()
    with torch.no_grad(), Allocations(pool):
        model(x, timestep=torch.full((BATCH,), 500), class_labels=labels, return_dict=False)
    assert len(asked) == 1
    assert len(pool.reserved) == len(before) + 1, f"segments of {[size / MIB for size in pool.reserved]} MiB"
    assert asked[0] <= pool.reserved[-1] < asked[0] + 2 * MIB
