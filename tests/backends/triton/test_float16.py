"""An fp16 stream on a GPU: the configurations of bf16, and a kernel for Hopper that compiles as bf16's does."""

from pathlib import Path

import pytest
import torch
from layouts import compiled_for_hopper

pytest.importorskip("triton")
from tqdit.backends.triton import naming


def test_it_has_the_configurations_of_bf16() -> None:
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for key in (lambda d: naming.norm_key(64, 32, d), lambda d: naming.quantize_key(64, 32, d, 0), naming.residual):
        assert key(half) == key(brain) != key(full)


@pytest.mark.long
def test_the_kernels_compile_without_spills(tmp_path: Path) -> None:
    """For sm_90a; no GPU is needed."""
    pytest.importorskip("triton.experimental.gluon")
    asked = [(f"residual {dtype}", 128, 128, 4, 64) for dtype in ("float16", "bfloat16")]
    asked += [("residual float16", 64, 64, 4, 64)]
    half, brain, small = compiled_for_hopper("linear", asked, tmp_path)
    assert (half["spilled"], small["spilled"]) == (0, 0)
    assert half["shared"] == brain["shared"]
