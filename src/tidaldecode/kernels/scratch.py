"""Memory that is zero between kernels, so that a step clears it once and not once a layer."""

from __future__ import annotations

import torch


class Scratch:
    """Zeroed int32 memory that every kernel leaves zeroed. For one stream at a time."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def zeros(self, count: int, device: torch.device) -> torch.Tensor:
        """At least ``count`` zeros on ``device``; the same memory every time, while it suffices."""
        memory = self._memory
        if memory is None or memory.device != device or len(memory) < count:
            memory = self._memory = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        return memory
