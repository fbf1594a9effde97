"""Where the time of one decode step goes on a GPU: its kernels, sorted by what they are for.

Kernels may overlap: one that was launched early waits for its predecessor, and a profiler counts that as
its own time. Here a kernel has what passes from the end of the one before it to its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tidaldecode.integrations.transformers.decode_step import DecodeStep

DENSE, SELECTION, SPARSE = "attention to all tokens", "selection", "attention to selected tokens"
REST, GAPS = "weights and the rest of the model", "between kernels"
PARTS = (REST, DENSE, SELECTION, SPARSE, GAPS)
"""Keys of `step_parts`, in the order in which they are stacked."""

_KERNELS = {
    "_dense_kernel": DENSE,
    "_score_kernel": SELECTION,
    "select_kernel": SELECTION,  # with the merge of its attention's parts
    "_sparse_kernel": SPARSE,
}
_MERGE = "_merge_kernel"
"""Belongs to the attention before it."""


def is_profiled(device: torch.device) -> bool:
    """Whether `step_parts` can tell the parts of a step there."""
    return device.type == "cuda"


def step_parts(step: DecodeStep, milliseconds: float) -> dict[str, float]:
    """Milliseconds of every part of a step that takes ``milliseconds`` unwatched."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings():
        # Of cycles, of which there is one.
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with torch.profiler.profile(activities=activities) as profiler:
            step.run()
            torch.cuda.synchronize(step.tokens.device)
    # What the host does is among the events too.
    kernels = (e for e in profiler.events() if e.device_type.name == "CUDA")
    parts = sort_kernels(
        (e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in kernels
    )
    parts[GAPS] = max(0.0, milliseconds - sum(parts.values()))
    return parts


def sort_kernels(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """The time of kernels ``(name, start, end)`` of one stream by part, in the unit of their times."""
    parts = dict.fromkeys(PARTS, 0.0)
    attention = DENSE
    before = float("-inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[2]):
        part = attention if name == _MERGE else _KERNELS.get(name, REST)
        if part in (DENSE, SPARSE):
            attention = part
        parts[part] += end - max(start, before)
        before = end
    return parts
