"""Weights brought into the L2 cache before the kernel that reads them starts."""

import triton
import triton.language as tl

LINE = tl.constexpr(128)  # bytes that a request brings


@triton.jit
def fetch_ahead(first, first_lines, second, second_lines, LINES: tl.constexpr):
    """This program's LINES of the `first_lines` from `first` on, and of those of `second`; nothing waits for them.

    Two layers in the order of their use. Compiled alone: the interpreter has no caches.
    """
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    lines = tl.minimum(lines, first_lines + second_lines - 1)
    from_first = first.to(tl.int64) + lines.to(tl.int64) * LINE
    from_second = second.to(tl.int64) + (lines - first_lines).to(tl.int64) * LINE
    address = tl.where(lines < first_lines, from_first, from_second)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
    )
