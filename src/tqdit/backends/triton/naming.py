"""Name kernels and shapes: the keys under which configurations are kept."""

from collections.abc import Sequence

import torch
import triton

from tqdit.backends.triton.float_launch import FEW_ROWS
from tqdit.backends.triton.kernels.rounding import SOFTMAX_ROW, UNIFORM
from tqdit.backends.triton.layouts import BF16, FLASH, Config

CHANNELS = "-channels"  # the end of the name of an epilogue with channel factors


def linear_key(
    epilogue: str, rows: int, columns: int, depth: int, bits: int, two: bool, tile: int = 0, by_row: bool = False
) -> str:
    """Return the key of a linear kernel.

    `tile`: of `hopper.rows_of_tile`. Products for the Hopper kernel have candidates, and so a key, of their own.
    `by_row`: each row of the codes has a step of its own.
    """
    key = f"linear {epilogue} {bucket(rows)}x{columns}x{depth}, {bits} bits, {2 if two else 1} products"
    key += ", steps of rows" if by_row else ""
    return f"{key}, Hopper tiles of {tile} rows" if tile else key


def attention_key(sequences: int, tokens: int, head_dim: int, mode: int, hopper: bool = False) -> str:
    """Return the key of a self-attention.

    `sequences`: samples times heads; `mode`: of the probabilities, `rounding`; `hopper`: the Hopper kernel takes them.
    """
    return f"attention {bucket(sequences)}x{tokens}x{head_dim}, mode {mode}{', Hopper' if hopper else ''}"


def cross_attention_key(sequences: int, tokens: int, keys: int, head_dim: int, mode: int, biased: bool) -> str:
    """Return the key where keys are those of a context, or scores have a bias.

    Prompts of similar lengths share it.
    """
    of_keys = f"{bucket(keys)} keys{', bias' if biased else ''}"
    return f"attention {bucket(sequences)}x{tokens}x{head_dim}, mode {mode}, {of_keys}"


def with_more(key: str, more: Sequence[Config]) -> str:
    """Return the key of an attention that has further candidates: files without them do not hide these."""
    names = {FLASH: "one pass", BF16: "bf16"}
    return ", ".join([key, *(names[config.hopper] for config in more)])


def modes(mode: int) -> tuple[int, ...]:
    """Return a mode of probabilities and the mode of the nearest kernel: softmax rows are one product, as uniform."""
    return (mode, UNIFORM.value) if mode == SOFTMAX_ROW.value else (mode,)


def norm_key(rows: int, width: int, stream: torch.dtype, by_row: bool = False) -> str:
    """Return the key of `norm_quantize_kernel` for rows of `width` columns of a residual stream.

    `by_row`: to the grid of rows.
    """
    return f"norm{_suffix(stream)} {bucket(rows)}x{width}{', steps of rows' if by_row else ''}"


def quantize_key(rows: int, width: int, stream: torch.dtype, mode: int) -> str:
    """Return the key of `quantize_kernel` for rows of `width` columns."""
    return f"quantize{_suffix(stream)} {bucket(rows)}x{width}, mode {mode}"


def residual(stream: torch.dtype, gated: bool = True) -> str:
    """Return the name of the epilogue for a residual stream of a dtype."""
    return f"residual{'' if gated else '-ungated'}{_suffix(stream)}"


def activation(channels: bool) -> str:
    """Return the name of the epilogue that codes an activation; `channels`: with factors of its channels."""
    return f"gelu{CHANNELS if channels else ''}"


def epilogues(name: str) -> tuple[str, ...]:
    """Return the name of an epilogue and those of the nearest ones."""
    return (name, name.removesuffix(CHANNELS)) if name.endswith(CHANNELS) else (name,)


def _suffix(stream: torch.dtype) -> str:
    """Return the end of a name for a stream; fp16 has the configurations of bf16, since it moves the same bytes."""
    return "" if stream is torch.float32 else " bfloat16"


def float_key(rows: int, columns: int, depth: int, bits: int) -> str:
    """Return the key of a layer on float inputs.

    Few rows have a kernel of their own; tensor cores take eight at a time.
    """
    which = "float input, few rows," if rows <= FEW_ROWS else "float input"
    return f"{which} {triton.next_power_of_2(max(rows, 8))}x{columns}x{depth}, {bits} bits"


def bucket(rows: int) -> int:
    """Return the rows that share a configuration, up to the next power of two."""
    return triton.next_power_of_2(max(rows, 16))
