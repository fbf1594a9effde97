"""A barrier for the programs of one launch, which must all be on the GPU at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_all(arrived, goal):
    """Wait until ``goal`` arrivals are counted; what those programs wrote before is then visible.

    Read it past the first-level cache (``.cg``). ``arrived``: a counter, zero before the launch. Who
    waits for programs that the GPU has no room for waits forever: launch as a cooperative grid, which
    is refused then (CUDA C++ Programming Guide, "Grid Synchronization").
    """
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    # Reading is cheaper than what Triton has for it, adding nothing: many programs look at one place.
    while tl.load(arrived, volatile=True) < goal:
        pass
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()


@triton.jit
def leave(arrived, last):
    """Count a program out; the one that makes it ``last`` arrivals sets the counter back to zero."""
    if tl.atomic_add(arrived, 1, sem="relaxed") + 1 == last:
        tl.store(arrived, 0)
