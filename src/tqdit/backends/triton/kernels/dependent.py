"""Programmatic dependent launch: a kernel starts while the one before it in its stream still runs.

A kernel that is launched so waits until its predecessor has ended and its results can be read. What comes before the
wait may read nothing that the predecessor writes: barriers are initialized there, and the first blocks of a weight are
copied. So a kernel that writes a weight must not be launched right before a product with it. Copies by the driver, as
of offloading, are no kernels and always end first.
Every kernel that is launched so has to wait, also one that reads nothing: its end tells its successor that all kernels
before it have ended, too.

A kernel lets its successor start only after it has waited itself, and a product only when its last block is on its way:
successors that start sooner were slower on an H200.

Without such a launch both instructions do nothing. They exist from compute capability 9.0 on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait for the predecessor of a kernel, then let its successor start; nothing unless EARLY."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor():
    """Wait until the kernel before this one has ended and what it wrote can be read."""
    gdc_wait()


@triton.jit
def let_successor_start():
    """Let the next kernel of the stream start as soon as all programs of this one have come to this place."""
    gdc_launch_dependents()
