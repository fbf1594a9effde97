"""Programmatic dependent launch: the launch of a kernel overlaps the end of the one before it.

A step is hundreds of short kernels, between which the GPU drains and fills again. On Hopper and later
a kernel that is launched so may be set up while its predecessor still runs, and waits for its end by
itself (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization").
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    """What every program of every kernel does first: nothing that memory holds is certain before.

    A program that left without waiting would let the kernel after the next one start too early.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Keywords of every launch on ``device``: ``OVERLAP`` for the kernel, and how it is launched."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
