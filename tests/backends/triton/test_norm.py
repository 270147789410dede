"""LayerNorm, modulation and quantization with every configuration: what it computes, and what it compiles to."""

import itertools
from pathlib import Path

import pytest
import torch
from layouts import compiled_for_hopper, read, to, without_gpu
from operands import maker
from ties import assert_equal_up_to_ties
from together import in_pairs

from poisoned import PoisonedTorch

pytest.importorskip("triton")
from tqdit.backends.triton import candidates, launch
from tqdit.backends.triton.layouts import NATIVE, Config
from tqdit.ops.schema import Norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 1152
FEW, MANY = 512, 16384
CANDIDATES = list(dict.fromkeys(candidates.norm(FEW, WIDTH) + candidates.norm(MANY, WIDTH)))
DISTINCT = CANDIDATES
if not NATIVE:  # the interpreter knows no warps, and one stage or more
    DISTINCT = list(dict.fromkeys(c._replace(warps=1, stages=min(c.stages, 2)) for c in CANDIDATES))
SIZES = {
    "whole": (2, 16, 24), "of a model": (2, 16, 1152), "halves": (3, 8, 130), "across samples": (2, 11, 300),
    "a row each": (5, 1, 37), "ragged": (1, 33, 1024),
}  # fmt: skip
STREAMS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BY_ROW: dict[tuple[str, str], torch.Tensor] = {}  # the codes of programs of one row, by the stream and the size
FAST = [("fp32", name) for name in ("whole", "halves", "across samples", "a row each")] + [("bf16", "across samples")]
ALWAYS = [(stream, "across samples") for stream in STREAMS]  # what configurations most differ in, in either stream
CASES = FAST + [case for case in itertools.product(STREAMS, SIZES) if case not in FAST]


@pytest.mark.parametrize(
    ("config", "stream", "size"),
    [
        without_gpu(config, *case, fast=case in ALWAYS or (fast and case in FAST))
        for fast, (config, case) in in_pairs(DISTINCT, CASES)
    ],
    ids=lambda value: (
        f"{value.block_m}x{value.blocks}-{value.warps}-{value.stages}" if type(value) is Config else value
    ),
)
def test_configurations_agree(monkeypatch, config: Config, stream: str, size: str) -> None:
    """Samples that programs divide and that they straddle, each of its own time group; rows beyond the last.

    In the interpreter every configuration has samples that programs straddle, and every other one of the other sizes.
    """
    monkeypatch.setattr(launch, "torch", PoisonedTorch())
    make, (batch, tokens, width) = maker(7), SIZES[size]
    x = (make.values(batch, tokens, width) * 3 + 1).to(STREAMS[stream])
    shift, scale, *_ = make.values(batch, 6 * width).chunk(6, dim=1)  # rows of a wider tensor
    target = make.params(lead=batch)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = normal * (1 + scale.double()[:, None]) + shift.double()[:, None]
    given = to(DEVICE, x), Norm(to(DEVICE, shift), to(DEVICE, scale), 1e-6), to(DEVICE, target)
    found = read(launch.norm_quantize(*given, config), width)
    assert_equal_up_to_ties(found, value, target)
    if not NATIVE:  # a GPU sums in an order that depends on the configuration
        if (stream, size) not in BY_ROW:
            BY_ROW[stream, size] = read(launch.norm_quantize(*given, Config(1, 0, 0, stages=1)), width)
        assert torch.equal(found, BY_ROW[stream, size])


def test_candidates() -> None:
    """None twice; a program's rows are of one sample if it has a multiple of 64 tokens."""
    for width in (32, 384, 768, 1024, 1152, 1536, 2304, 4096):
        for rows in (1, FEW, MANY):
            found = candidates.norm(rows, width)
            assert len(set(found)) == len(found) > 5
            assert all(64 % (config.block_m * config.blocks) == 0 or width < 512 for config in found)
    assert any(config.stages > 1 < config.blocks for config in candidates.norm(MANY, WIDTH))


@pytest.mark.long
def test_candidates_compile_without_spills(tmp_path: Path) -> None:
    pytest.importorskip("triton.experimental.gluon")
    found = compiled_for_hopper("norm", [(s, WIDTH, list(c)) for s in ("fp32", "bf16") for c in CANDIDATES], tmp_path)
    for kernel in found:
        assert not kernel["spilled"], kernel
        assert kernel["of_a_thread"] <= 168, kernel  # twelve warps on a multiprocessor
