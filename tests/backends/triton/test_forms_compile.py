"""The ordinary kernels in the forms that a context needs compile for a Hopper GPU, without one."""

from pathlib import Path

import pytest
from layouts import compiled_for_hopper

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tqdit.backends.triton import candidates
from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.layouts import HEADS_OF

SHARED_MEMORY = 232448  # bytes of a multiprocessor


@pytest.mark.long
def test_attention_to_a_context_compiles(tmp_path: Path) -> None:
    """Prompts in one tile and in several, whole and not; heads of 64 and 72 channels."""
    asked = [
        (keys, head_dim, mode.value, biased, list(candidates.attention(64, keys)[0]))
        for keys, head_dim, mode, biased in (
            (120, 72, rounding.UNIFORM, True), (77, 64, rounding.SOFTMAX, False),
            (77, 72, rounding.SOFTMAX_MERGED, True), (512, 72, rounding.UNIFORM, True),
            (300, 64, rounding.SOFTMAX, True), (1, 72, rounding.UNIFORM, False),
        )
    ]  # fmt: skip
    for kernel in compiled_for_hopper("cross", asked, tmp_path):
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["spilled"] <= 1024, kernel


@pytest.mark.long
def test_new_epilogues_compile(tmp_path: Path) -> None:
    configs = [candidates.linear(rows, False, 8)[0] for rows in (64, 16384)]
    names = ["plain", "residual-ungated", *HEADS_OF.values()]
    for kernel in compiled_for_hopper("ordinary", [(name, list(c)) for name in names for c in configs], tmp_path):
        assert kernel["shared"] <= SHARED_MEMORY, kernel


@pytest.mark.long
def test_quantize_compiles(tmp_path: Path) -> None:
    modes = (rounding.UNIFORM, rounding.GELU, rounding.GELU_MERGED)
    asked = [("bf16", mode.value, list(c)) for mode in modes for c in candidates.quantize()]
    found = compiled_for_hopper("quantize", asked, tmp_path)
    assert not any(kernel["spilled"] for kernel in found)
