"""The layouts of codes between the kernels, written down once more: what a test gives to a kernel and reads back."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import triton
from ties import SHAPES
from together import in_pairs

from tqdit.backends.triton.layouts import Projected
from tqdit.grids.mrq_gelu import OFFSET
from tqdit.ops.schema import AttentionParams, OperandParams, Residual, WeightParams
from tqdit.ops.tables import parameters
from tqdit.spec import Grid

UNREAD = 99  # what is beyond a row's end
# Batch, tokens, width, heads. Triton's interpreter is slow: it gets `ties.SHAPES` whole only where long tests run. The
# last of these has several tiles of rows, of columns and of depth, and a head of 72 channels.
INTERPRETED = [(1, 1, 16, 1), (2, 5, 24, 3), (3, 17, 40, 2), (1, 70, 72, 1)]


def without_gpu(*values: object, fast: bool = False) -> object:
    """Return the arguments of a case, which are those of a long test where Triton's interpreter runs it."""
    slow = not fast and not torch.cuda.is_available()
    return pytest.param(*values, marks=pytest.mark.long if slow else ())


EVERY_SHAPE = list(dict.fromkeys((*INTERPRETED, *SHAPES)))
SHAPE = ("batch", "tokens", "width", "heads")
each_shape = pytest.mark.parametrize(SHAPE, [without_gpu(*shape, fast=shape in INTERPRETED) for shape in EVERY_SHAPE])


def each_pair(names: Sequence[str], *factors: Sequence[object]) -> pytest.MarkDecorator:
    """Every combination of the factors' values; the interpreter gets half of them, with every pair of values.

    A value that is a tuple has several of the `names`. Of sizes in `EVERY_SHAPE` the interpreter gets `INTERPRETED`.
    """
    cases = []
    for fast, values in in_pairs(*factors):
        flat = [part for value in values for part in (value if type(value) is tuple else (value,))]
        large = any(value in EVERY_SHAPE[len(INTERPRETED) :] for value in values if type(value) is tuple)
        cases.append(without_gpu(*flat, fast=fast and not large))
    return pytest.mark.parametrize(names, cases)


def pitch(columns: int) -> int:
    return -(-columns // 16) * 16


def padded(codes: torch.Tensor) -> torch.Tensor:
    """Rows of a multiple of 16 bytes, the rest of each not to be read."""
    out = torch.full((*codes.shape[:-1], pitch(codes.shape[-1])), UNREAD, dtype=torch.int8, device=codes.device)
    out[..., : codes.shape[-1]] = codes
    return out


def stored(codes: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Signed codes as kernels keep them: merged GELU regions are one integer, its lowest value -128."""
    if not params.merged or params.grid is not Grid.MRQ_GELU:
        return padded(codes)
    merged = torch.where(codes < 0, codes.int(), codes.int() * parameters(params, 3).factor)
    return padded((merged + (1 << (params.bits - 1)) - OFFSET).to(torch.int8))


def read(codes: torch.Tensor, columns: int, params: OperandParams | None = None) -> torch.Tensor:
    """The inverse, int32 on the CPU."""
    out = codes[..., :columns].cpu().int()
    if params is None or not params.merged or params.grid is not Grid.MRQ_GELU:
        return out
    merged = out - ((1 << (params.bits - 1)) - OFFSET)
    return torch.where(merged < 0, merged, merged // parameters(params, 3).factor)


def traced(trace: torch.Tensor, params: OperandParams) -> torch.Tensor:
    """Codes as the reference has them, from the trace of a merged grid, where a fine code is the value itself."""
    if not params.merged:
        return trace
    value = trace.int() + OFFSET
    top = (1 << (params.bits - 1)) - 1
    return torch.where(value <= top, -value, value // parameters(params, 4).factor).to(torch.int8)


def token_order(tokens: int) -> torch.Tensor:
    """Which token is at each place of a row of v."""
    sixteen = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    if tokens % 16:
        return torch.arange(tokens)
    return (torch.arange(0, tokens, 16)[:, None] + sixteen).flatten()


def as_projected(codes: torch.Tensor, parts: int, heads: int) -> Projected:
    """(B, N, parts C) codes of q, k and v, of k and v, or of q, as the buffer that the kernels share."""
    batch, tokens, width = codes.shape
    found = list(codes.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4))
    if parts > 1:
        found[-1] = found[-1].transpose(2, 3)[..., token_order(tokens).to(codes.device)]
    return Projected(torch.cat([padded(x).flatten() for x in found]), batch, tokens, width // parts // heads)


def from_projected(buffer: Projected, parts: int, heads: int) -> torch.Tensor:
    """The inverse, int32 on the CPU."""
    batch, tokens, dim = buffer.batch, buffer.tokens, buffer.head_dim
    by_token, by_channel = batch * heads * tokens * pitch(dim), batch * heads * dim * pitch(tokens)
    sizes = {1: [by_token], 2: [by_token, by_channel], 3: [by_token, by_token, by_channel]}[parts]
    found = list(buffer.codes.cpu().int().split(sizes))
    v = found.pop().view(batch, heads, dim, pitch(tokens))[..., :tokens] if parts > 1 else None
    found = [x.view(batch, heads, tokens, pitch(dim))[..., :dim] for x in found]
    if v is not None:
        ordered = torch.empty(batch, heads, dim, tokens, dtype=torch.int32)
        ordered[..., token_order(tokens)] = v
        found.append(ordered.transpose(2, 3))
    return torch.stack(found).permute(1, 3, 0, 2, 4).flatten(2)


def to(device: torch.device, value):
    """Operands, or a tensor, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, OperandParams | AttentionParams | WeightParams | Residual):
        return type(value)(*(to(device, x) for x in value))
    return value


def compiled_for_hopper(which: str, asked: list, folder: Path) -> list[dict]:
    """What `compile_hopper.py` says of kernels of a kind; skips where Triton came without its compilers."""
    try:
        assert triton.knobs.nvidia.ptxas.path
        assert triton.knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        pytest.skip(str(error))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("compile_hopper.py"), which, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(asked)
    return found
